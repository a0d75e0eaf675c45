//! The files of `cpc-session` that do no I/O, without the crate.

pub mod end;
pub mod pattern;
pub mod peer;
pub mod side;

#[path = "../../../tunnel-user/session/src/inbound.rs"]
pub mod inbound;
#[path = "../../../tunnel-user/session/src/outbound.rs"]
pub mod outbound;
#[path = "../../../tunnel-user/session/src/saved.rs"]
pub mod saved;
// rustfmt would look for the file of tests beside this one.
#[rustfmt::skip]
#[path = "../../../tunnel-user/session/src/session.rs"]
pub mod session;
#[path = "../../../tunnel-user/session/src/state.rs"]
pub mod state;
#[path = "../../../tunnel-user/session/src/unconfirmed.rs"]
pub mod unconfirmed;
#[path = "../../../tunnel-user/session/src/violation.rs"]
pub mod violation;

pub use session::{Effect, Hold, Resumed, Session};
pub use state::{Bounds, Detached, Registration, SessionState};
