//! The messages between the owner of sockets and their keeper (`keeper.proto`).
//!
//! The types have the form of the message, unchecked: the reader of a message checks it.

pub use self::generated::*;

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cpc.keeper.v1.rs"));
}
