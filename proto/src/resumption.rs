//! Resumption: what the two ends of a tunnelled connection tell each other so that it can outlive its tunnel.
//!
//! A relayed connection, a *session*, has a [`SessionId`] and on each tunnel a number. The dial request
//! carries both ([`SessionKey`]). While a tunnel carries the session, its ends exchange [`Notice`]s on a stream
//! that all sessions of the tunnel share. A session continues on another tunnel by a stream that begins
//! with a [`ResumeRequest`](crate::preface::ResumeRequest).
//!
//! ```text
//! key:           session id (16 bytes)   number (varint)
//! confirmation:  written (varint)   flags (1 byte)   [reason (varint), where the session was given up]
//! flags:         bit 0: finished   bit 1: refused   bits 2 and 3: 0 open, 1 settled, 2 aborted, 3 acknowledged
//!                bit 4: safe
//! notice:        number (varint)   1 (1 byte)   confirmation
//!                number (varint)   0 (1 byte): the sender does not know this session
//! ```

mod id;
mod notice;
mod state;

pub use self::id::{SessionId, SessionKey};
pub use self::notice::{Notice, NoticeError};
pub use self::state::{Accepted, Confirmation, Status};
