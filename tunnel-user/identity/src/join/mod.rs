//! Who becomes an agent, and stays one: tokens that let a worker ask for a certificate, what was issued,
//! and the desk where both meet.
//!
//! ```text
//! cpc token create -> book <- desk <- join listener  <- cpc agent join   (a token, no certificate yet)
//!                                  <- control stream <- cpc agent        (renewal, over its tunnel)
//! ```
//!
//! Invariants: what a certificate says follows from the token and from what the node is known by, never
//! from the request, of which only the key counts. A name or an address that another key's certificate
//! holds is given away only by a token that names exactly it, or when that certificate is revoked, released,
//! or its node gone from Kubernetes. A token's use is counted before the certificate leaves; the key that
//! used it gets the same certificate when it asks again, since an answer can be lost. What was issued stays
//! on record while it is valid. A clock that steps, or is ahead at a start, ends none of that: [`clock`].
//!
//! [`book`] keeps [`pages`], tokens and what was issued, in one file; [`admit`] decides, without I/O;
//! [`desk`] asks both and the CA.

pub mod admit;
pub mod book;
pub mod clock;
pub mod desk;
pub mod metrics;
pub mod pages;
pub mod token;

pub use book::{Book, BookError};
pub use desk::Desk;
pub use metrics::JoinMetrics;
pub use token::Token;
