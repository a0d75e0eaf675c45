//! The closed set of reasons why a connection or a session ends, for the wire, the metrics and the
//! logs.
//!
//! The code of a reason travels as QUIC application error code (RESET_STREAM, STOP_SENDING,
//! CONNECTION_CLOSE; RFC 9000, section 20.2) and in the dial response. The label is the metric
//! label and the log field, and `Display` writes a sentence for people. Codes are grouped in ranges
//! of 256, the [`CloseClass`]. The class alone decides what a peer may do next.
//!
//! A released code never gets another meaning.

use std::fmt;

use crate::varint::VarInt;

/// Class of a [`CloseReason`], which decides the next step of the peer: the high byte of the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CloseClass {
    /// Orderly end: both directions have ended.
    Finished,
    /// The target was not dialled: another agent may be tried.
    NotDialled,
    /// The target was dialled without success: another agent would not do better.
    DialFailed,
    /// The connection broke while it was in use.
    Reset,
    /// The connection was ended because a side is leaving.
    Drained,
    /// The session between agent and server could not continue.
    Session,
}

/// Declares the set, so that code, label and sentence of a reason are in one place.
macro_rules! close_reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $class:ident, $label:literal, $text:literal;)*) => {
        /// Reason why a connection or a session ended.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum CloseReason {
            $($(#[$doc])* $name = $code,)*
        }

        impl CloseReason {
            /// Every reason, by ascending code.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Returns the reason with this code; `None` if this release has none.
            #[must_use]
            pub fn from_code(code: u64) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Returns the metric label and log field: lower-case words joined by underscores.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }

            /// Returns the class, which decides the next step.
            #[must_use]
            pub fn class(self) -> CloseClass {
                match self {
                    $(Self::$name => CloseClass::$class,)*
                }
            }

            fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

close_reasons! {
    /// Both directions have ended.
    Finished = 0x000, Finished, "finished", "the connection ended cleanly";

    /// No claim covers the destination.
    NoRoute = 0x100, NotDialled, "no_route", "no agent serves this destination";
    /// A claim covers the destination, but no agent that holds it is connected and answers.
    NoAgent = 0x101, NotDialled, "no_agent", "no agent that serves this destination is connected";
    /// A policy, of the server or the agent, forbids the destination.
    PolicyDenied = 0x102, NotDialled, "policy_denied", "the destination is not allowed by policy";
    /// The agent takes no new connections because it is about to leave.
    Draining = 0x103, NotDialled, "draining", "the agent is draining and takes no new connections";
    /// A limit on connections or memory was reached.
    Overloaded = 0x104, NotDialled, "overloaded", "a limit on connections or memory was reached";
    /// The agent does not know this kind of stream.
    UnsupportedKind = 0x105, NotDialled, "unsupported_kind", "the agent does not support this kind of stream";
    /// The dial request could not be read.
    MalformedDial = 0x106, NotDialled, "malformed_dial", "the dial request could not be read";
    /// The client left before the target was dialled.
    Cancelled = 0x107, NotDialled, "cancelled", "the client left before the target was dialled";
    /// Dials of the destination keep timing out: it is not dialled for a while.
    CircuitOpen = 0x108, NotDialled, "circuit_open", "dials of this destination keep timing out; it is tried again later";

    /// The target answered with a reset.
    ConnectionRefused = 0x200, DialFailed, "connection_refused", "the target refused the connection";
    /// No route from the agent to the target, or no neighbour with its address.
    HostUnreachable = 0x201, DialFailed, "host_unreachable", "the agent can't reach the target host";
    /// No route from the agent to the target's network.
    NetworkUnreachable = 0x202, DialFailed, "network_unreachable", "the agent can't reach the target network";
    /// The target did not answer before the dial's deadline.
    DialTimeout = 0x203, DialFailed, "dial_timeout", "the target did not answer in time";
    /// The agent's resolver does not know the name.
    NameNotFound = 0x204, DialFailed, "name_not_found", "the agent's resolver does not know the name";
    /// The dial failed for another cause; the detail names it.
    DialFailed = 0x205, DialFailed, "dial_failed", "the agent could not connect to the target";

    /// The sender's socket was reset by its peer.
    PeerReset = 0x300, Reset, "peer_reset", "the other socket was reset";
    /// The sender's socket takes no more bytes, because its peer has closed it.
    PeerGone = 0x301, Reset, "peer_gone", "the other socket no longer takes bytes";
    /// The tunnel that carried the connection was lost.
    LinkLost = 0x302, Reset, "link_lost", "the tunnel was lost";
    /// No byte moved for longer than the idle timeout.
    IdleTimeout = 0x303, Reset, "idle_timeout", "no packet arrived for longer than the idle timeout";
    /// The process is ending at once.
    Aborted = 0x304, Reset, "aborted", "the process is ending";
    /// Internal fault; the log has the details.
    Internal = 0x305, Reset, "internal", "an internal fault; see the log of the side that closed";
    /// The reader took no data for so long that it blocked the other connections of its tunnel.
    Stalled = 0x306, Reset, "stalled", "the reader stopped and held up the other connections of the tunnel";
    /// A memory limit refused data of the peer that was not read yet.
    MemoryLimit = 0x307, Reset, "memory_limit", "the connection held more unread data than a memory limit allows";

    /// The connection outlived the deadline of a drain.
    Drained = 0x400, Drained, "drained", "the drain deadline passed";
    /// The process was asked to end.
    Shutdown = 0x401, Drained, "shutdown", "the process was stopped";

    /// The peer violated the protocol.
    ProtocolError = 0x500, Session, "protocol_error", "the peer broke the protocol";
    /// The peer speaks another major version.
    UnsupportedVersion = 0x501, Session, "unsupported_version", "the peer speaks another major version of the protocol";
    /// The peer's certificate does not entitle it to a session.
    IdentityRefused = 0x502, Session, "identity_refused", "the peer's identity is not accepted";
    /// A newer session took this one's place.
    Replaced = 0x503, Session, "replaced", "a newer session took the place of this one";
    /// The peer did not introduce itself in time.
    HandshakeTimeout = 0x504, Session, "handshake_timeout", "the peer did not introduce itself in time";
    /// The agent holds a tunnel to this server already.
    DuplicateServer = 0x505, Session, "duplicate_server", "the agent already holds a tunnel to this server";
    /// A successor of the process goes on with its sessions.
    HandedOver = 0x506, Session, "handed_over", "another process takes the place of this one and goes on with its connections";
}

impl CloseReason {
    /// Returns the code on the wire.
    #[must_use]
    pub fn code(self) -> u64 {
        u64::from(self as u16)
    }
}

impl From<CloseReason> for VarInt {
    fn from(reason: CloseReason) -> Self {
        Self::from(reason as u16)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_lead_back_to_their_reasons() {
        for &reason in CloseReason::ALL {
            assert_eq!(CloseReason::from_code(reason.code()), Some(reason));
            assert_eq!(VarInt::from(reason).into_inner(), reason.code());
        }
        assert_eq!(CloseReason::from_code(0x001), None);
        assert_eq!(CloseReason::from_code(u64::MAX), None);
    }

    #[test]
    fn the_class_is_the_high_byte() {
        for &reason in CloseReason::ALL {
            let class = match reason.code() >> 8 {
                0 => CloseClass::Finished,
                1 => CloseClass::NotDialled,
                2 => CloseClass::DialFailed,
                3 => CloseClass::Reset,
                4 => CloseClass::Drained,
                5 => CloseClass::Session,
                other => panic!("{reason:?} is in no range: {other:#x}"),
            };
            assert_eq!(reason.class(), class, "{reason:?}");
        }
    }

    #[test]
    fn labels_are_distinct_and_fit_for_metrics() {
        let labels: HashSet<_> = CloseReason::ALL
            .iter()
            .map(|reason| reason.label())
            .collect();
        assert_eq!(labels.len(), CloseReason::ALL.len());
        for label in labels {
            assert!(
                label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{label}"
            );
        }
    }

    /// Codes are on the wire, and labels in dashboards: a change here is a change of protocol.
    #[test]
    fn codes_and_labels_do_not_change() {
        let table: Vec<_> = CloseReason::ALL
            .iter()
            .map(|reason| format!("{:#05x} {}", reason.code(), reason.label()))
            .collect();
        assert_eq!(
            table,
            [
                "0x000 finished",
                "0x100 no_route",
                "0x101 no_agent",
                "0x102 policy_denied",
                "0x103 draining",
                "0x104 overloaded",
                "0x105 unsupported_kind",
                "0x106 malformed_dial",
                "0x107 cancelled",
                "0x108 circuit_open",
                "0x200 connection_refused",
                "0x201 host_unreachable",
                "0x202 network_unreachable",
                "0x203 dial_timeout",
                "0x204 name_not_found",
                "0x205 dial_failed",
                "0x300 peer_reset",
                "0x301 peer_gone",
                "0x302 link_lost",
                "0x303 idle_timeout",
                "0x304 aborted",
                "0x305 internal",
                "0x306 stalled",
                "0x307 memory_limit",
                "0x400 drained",
                "0x401 shutdown",
                "0x500 protocol_error",
                "0x501 unsupported_version",
                "0x502 identity_refused",
                "0x503 replaced",
                "0x504 handshake_timeout",
                "0x505 duplicate_server",
                "0x506 handed_over",
            ]
        );
    }
}
