//! Joining and renewal: tokens with which a worker requests a certificate, the record of issued
//! certificates, and the issuer that uses both.
//!
//! ```text
//! cpc token create -> issue log <- issuer <- join listener  <- cpc agent join   (a token, no certificate yet)
//!                                       <- control stream <- cpc agent     (renewal, over its tunnel)
//! ```
//!
//! Invariants:
//! * The content of a certificate follows from the token and from the node's proven identity, never from
//!   the request, of which only the key counts.
//! * A name or address in the certificate of another key goes to a new holder only by a token that names
//!   exactly it, or after that certificate is revoked, released, or its node gone from Kubernetes.
//! * The use of a token is counted before the certificate leaves. The same key gets the same certificate
//!   again when it repeats the request, because an answer can be lost.
//! * Issued certificates stay on record while they are valid. A clock that steps, or is ahead at a start,
//!   ends none of that: [`clock`].
//!
//! [`issue_log`] keeps [`issue_records`], the tokens and issued certificates, in one file; [`admit`] decides, without
//! I/O; [`issuer`] uses both and the CA.

pub mod admit;
pub mod clock;
pub mod issue_log;
pub mod issue_records;
pub mod issuer;
pub mod metrics;
pub mod token;

pub use issue_log::{IssueLog, IssueLogError};
pub use issuer::Issuer;
pub use metrics::JoinMetrics;
pub use token::Token;
