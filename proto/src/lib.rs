//! What the two ends of a tunnel agree on: the bytes on the wire, and the decisions that follow
//! from them.
//!
//! | module | what |
//! | --- | --- |
//! | [`close`] | the one closed set of reasons why a connection or a session ends |
//! | [`varint`] | QUIC's variable-length integer |
//! | [`preface`] | the dial request and response at the head of each tunnelled stream |
//! | [`control`] | the messages of the control stream and their framing |
//! | [`route`] | what an agent claims to serve |
//! | [`certificate`] | asking for a certificate, and the answer |
//! | [`join`] | the same for who has none yet |
//! | [`trust_domain`] | who vouches for an identity |
//! | [`session`] | the agent's and the server's end of a control stream, without I/O |
//! | [`http_connect`] | the HTTP `CONNECT` request and its answers |
//! | [`konnectivity`] | the messages of Kubernetes' Konnectivity and what goes with them |
//!
//! Nothing here opens a socket, reads a clock or makes a random number: time and randomness are
//! arguments. Every decoder bounds what it reads before it allocates, asks for more bytes by
//! `Ok(None)`, never takes more than it was given, and does not panic whatever it is given.
#![forbid(unsafe_code)]

pub mod certificate;
pub mod close;
pub mod control;
pub mod http_connect;
pub mod join;
pub mod konnectivity;
pub mod preface;
pub mod route;
pub mod session;
mod text;
pub mod trust_domain;
pub mod varint;
