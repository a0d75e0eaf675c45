//! The protocol between the two ends of a tunnel: the bytes on the wire, and the decisions that
//! follow from them.
//!
//! | module | content |
//! | --- | --- |
//! | [`close`] | the closed set of reasons why a connection or a session ends |
//! | [`varint`] | QUIC's variable-length integer |
//! | [`preface`] | the dial request and response at the head of each tunnelled stream |
//! | [`resumption`] | what lets a connection outlive its tunnel |
//! | [`control`] | the messages of the control stream and their framing |
//! | [`route`] | claims of an agent |
//! | [`certificate`] | requests for certificates, and the answers |
//! | [`join`] | the same for a worker without a certificate |
//! | [`trust_domain`] | the name space of identities |
//! | [`session`] | both ends of a control stream, without I/O |
//! | [`handover`] | the messages between a process and its successor |
//! | [`keeper`] | the messages between the owner of sockets and their keeper |
//! | [`http_connect`] | the HTTP `CONNECT` request and its answers |
//! | [`konnectivity`] | the messages of Konnectivity, and its machines |
//!
//! This crate opens no socket, reads no clock and makes no random number: time and randomness are
//! arguments. Every decoder bounds its input before it allocates, asks for more bytes by
//! `Ok(None)`, never takes more than its input, and never panics.
#![forbid(unsafe_code)]

pub mod certificate;
pub mod close;
pub mod control;
pub mod handover;
pub mod http_connect;
pub mod join;
pub mod keeper;
pub mod konnectivity;
pub mod preface;
pub mod resumption;
pub mod route;
pub mod session;
mod text;
pub mod trust_domain;
pub mod varint;
