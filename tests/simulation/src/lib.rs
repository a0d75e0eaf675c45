//! A simulation of the whole system: servers and agents as they are, from the file that they read to the
//! socket that they write to, over a simulated kernel and with virtual time, on one thread.
//!
//! ```text
//! scenario (seed) --> world: clients, targets, invariants
//!                       |              |
//!                    process: server, agent, each a tokio runtime of its own
//!                       |              |
//!                    interpose: the C library's calls
//!                       |
//!                    kernel: descriptors, UDP, TCP, epoll, clock; paths with faults
//! ```
//!
//! A seed determines everything but the keys, on which nothing depends: the same seed has the same trace.
//! docs/adr/0034 has the reasons.

pub mod endpoint;
pub mod interpose;
pub mod kernel;
pub mod pki;
pub mod process;
pub mod random;
pub mod runner;
pub mod scenario;
pub mod topology;
pub mod world;
