//! The files of `cpc-session` without the crate: all but those that need a stream of a tunnel.

pub mod end;
pub mod pattern;
pub mod peer;
pub mod side;
pub mod tunnel;

#[allow(dead_code)]
#[path = "../../../tunnel-user/session/src/carried.rs"]
pub mod carried;
#[path = "../../../tunnel-user/session/src/inbound.rs"]
pub mod inbound;
// rustfmt would look for the files of tests beside these two.
#[allow(dead_code)]
#[rustfmt::skip]
#[path = "../../../tunnel-user/session/src/notices.rs"]
pub mod notices;
#[path = "../../../tunnel-user/session/src/outbound.rs"]
pub mod outbound;
#[path = "../../../tunnel-user/session/src/saved.rs"]
pub mod saved;
#[rustfmt::skip]
#[path = "../../../tunnel-user/session/src/session.rs"]
pub mod session;
#[path = "../../../tunnel-user/session/src/state.rs"]
pub mod state;
#[path = "../../../tunnel-user/session/src/unconfirmed.rs"]
pub mod unconfirmed;
#[path = "../../../tunnel-user/session/src/violation.rs"]
pub mod violation;
#[path = "../../../tunnel-user/session/src/window.rs"]
pub mod window;

pub use carried::Carried;
pub use notices::Notices;
pub use session::{Effect, Hold, Resumed, Session};
pub use state::{Bounds, Detached, Registration, SessionState};
