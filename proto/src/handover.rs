//! The messages between a process and its successor (`handover.proto`).
//!
//! The types have the form of the message, unchecked: who reads one checks it.

pub use self::generated::*;

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cpc.handover.v1.rs"));
}
