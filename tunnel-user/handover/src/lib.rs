//! The exchange by which a process hands its sockets and sessions over to its successor.
//!
//! Both processes live ([`successor`], [`predecessor`], over the socket of an [`endpoint`]):
//!
//! ```text
//! predecessor          successor
//!      <---- Request ----
//!      ------ Offer ---->   with the listeners; the predecessor goes on
//!                           the successor prepares: files, sockets, programs
//!      <----- Ready -----
//!   stops                   the predecessor sends nothing and reads nothing any more
//!      ------ State ---->   with the sockets of connections
//!      <---- Accepted ---
//!      ----- Released -->
//!   exits                   serves
//! ```
//!
//! A predecessor that gets no `Accepted` goes on with what it has stopped. A successor that gets no `Released`
//! uses nothing. So a socket has one user at any time, whichever process dies.
//!
//! One process after the other ([`store`]): the service manager keeps `Offer` and `State`, with all
//! descriptors, from the end of the first process to the start of the second one.

pub mod endpoint;
pub mod error;
pub mod keeper;
pub mod kept;
pub mod listeners;
pub mod parcel;
pub mod predecessor;
pub mod restored;
pub mod store;
pub mod succession;
pub mod successor;

pub use endpoint::Endpoint;
pub use error::HandoverError;
pub use keeper::{KeeperHandle, KeeperSpec, peek_offset};
pub use listeners::KeptListeners;
pub use parcel::Parcel;
pub use predecessor::{Predecessor, find};
pub use restored::understood;
pub use succession::{Service, Succession};
pub use successor::Successor;
