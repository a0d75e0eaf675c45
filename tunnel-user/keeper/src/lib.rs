//! The process that keeps the sockets of a server or agent over its sudden death, and its clients.
//!
//! A keeper ([`Service`]) holds duplicates of the sockets of other processes, their owners ([`Keeper`]). A socket
//! whose owner is killed stays open in the keeper, and the kernel of this host goes on to acknowledge what its peer
//! sends. The owner's next process takes the sockets ([`take`]).
//!
//! ```text
//! owner                     keeper                  next process
//!   ---- Hello + table ---->
//!   <-------- Done ---------
//!   ---- Keep + socket ---->
//!   ---- Drop ------------->
//!   killed                    the connection ends, the process is dead
//!                             <-------- Take --------
//!                             --- Left + table ----->
//!                             --- Kept + socket ---->
//!                             <-------- Take --------
//!                             ------ Nothing ------->
//!                             <---- Hello, Keep -----  of the same sockets
//!                             <------ Confirm -------
//! ```
//!
//! Invariants:
//!
//! * The keeper neither reads nor writes a kept socket, and parses nothing but these messages. So no peer of a
//!   socket can harm it.
//! * A set is given away only when its owner is dead, and to one process. So a socket has one user at any time.
//! * The keeper holds a set until the next process has confirmed that it keeps the sockets in its own. So that
//!   process can be killed at any time, too.
//! * The keeper has one thread and never blocks: a client that does not read loses its connection.
//! * A set is closed when no process takes it in time.
//! * Before the first client the process restricts itself to the system calls that it needs from then on.
//!
//! Bounds: 16 connections, 16 sets, 65,536 sockets in a set, 8 KiB per message.

mod client;
mod connect;
mod connection;
mod error;
mod filter;
mod listener;
mod message;
mod numbers;
mod owner;
pub mod position;
mod requests;
mod service;
mod sets;
mod table;
mod taking;
#[cfg(test)]
mod tests;

pub use client::{Keeper, Slot};
pub use error::KeeperError;
pub use position::Position;
pub use service::Service;
pub use table::{Entry, TableView};
pub use taking::{Kept, Left, Taken, take};
