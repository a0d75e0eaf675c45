//! Links: what a connected agent looks like to a dial, whatever it speaks.
//!
//! A link opens streams, as the two halves in [`crate::datapath::stream`]; it lives on one shard and
//! never leaves it. QUIC is the one kind there is: [`accept()`] lets an agent in, [`session`] listens
//! to it, [`QuicLink`] is what dials use.

mod accept;
mod quic;
mod session;

pub(super) use accept::accept;
pub(super) use quic::QuicLink;
