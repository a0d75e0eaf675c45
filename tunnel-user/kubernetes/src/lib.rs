//! Requests to the Kubernetes API: reviews of tokens ([`token`]), addresses of nodes ([`node`]), and
//! the number of servers ([`lease`]).
//!
//! Invariants: every request is bounded in time. Retries back off, with jitter: thousands of agents may
//! come at once, to an API server that has just come back. Requests run on the runtime that the client
//! was made on, not on a shard.

mod client;
mod delays;
pub mod lease;
pub mod node;
pub mod token;

pub use client::{AccessError, client};
