//! Breaches of the protocol by the other end.

/// Message that no honest end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The other end confirms bytes that it was not sent.
    #[error("the peer confirms bytes that it was not sent")]
    TooMuch,
    /// The other end takes back a confirmation.
    #[error("the peer takes back a confirmation")]
    Backwards,
    /// The other end confirms an end of file that there is not.
    #[error("the peer confirms an end that there is not")]
    NoEnd,
    /// The other end sends bytes behind its end of file.
    #[error("the peer sends bytes behind its end")]
    BehindEnd,
    /// The other end says that it is settled, and has not confirmed everything.
    #[error("the peer ends a session of which it has not confirmed everything")]
    NotSettled,
    /// The other end asks for bytes that it had confirmed, or that are not kept.
    #[error("the peer can't be sent what it asks for")]
    NotKept,
}
