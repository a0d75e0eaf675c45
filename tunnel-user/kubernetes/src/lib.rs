//! What is asked of the Kubernetes API: whose a token is ([`token`]), which addresses a node has
//! ([`node`]), and how many servers there are ([`lease`]).
//!
//! Invariants: every request is bounded in time, and who fails asks again ever more rarely, never
//! in step with others: thousands of agents may come at once, to an API server that has just come
//! back. Requests run on the runtime that the client was made on, not on a shard.

mod client;
mod delays;
pub mod lease;
pub mod node;
pub mod token;

pub use client::{AccessError, client};
