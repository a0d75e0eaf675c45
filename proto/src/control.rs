//! The messages of the control stream (`tunnel.proto`, package `cpc.v1`) and their framing.
//!
//! The types here have the form of the wire, unchecked: strings of any length, absent fields, texts
//! that are not addresses. [`crate::session`] checks them and returns its own types; only that
//! module uses these.

mod frame;

pub use self::frame::{FrameDecoder, FrameError, MAX_FRAME, encode};
pub use self::generated::*;

/// The version of the protocol that this release speaks.
pub const VERSION: Version = Version { major: 1, minor: 0 };

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cpc.v1.rs"));
}
