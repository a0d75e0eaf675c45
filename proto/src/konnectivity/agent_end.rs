//! Our agent's end of one stream to a proxy-server, without I/O: dials, connections and closes.
//!
//! ```text
//! proxy-server                      agent
//!   DIAL_REQ (random)         ->      connect id := the next, from 1; a dial that fails has one too
//!                             <-    DIAL_RSP (random, connect id), or with an error
//!   DATA (connect id)        <->    DATA (connect id)
//!   CLOSE_REQ (connect id)    ->      what was received still reaches the target, then end of file
//!                             <-    CLOSE_RSP, at once; unasked when the target ends
//!   DATA without data         ->      from a server of ours: end of file, and the target may go on
//!   DIAL_CLS (random)         ->      the dial, or what came of it, is given up
//!                             <-    DRAIN
//! ```
//!
//! A driver hands packets to [`handle`](AgentEnd::handle), executes the returned commands, reports
//! the events of targets, and after each call sends the packets of
//! [`poll_transmit`](AgentEnd::poll_transmit), in order with the DATA of targets, which bypass this
//! machine.
//!
//! All connections share the stream, which has no flow control of its own. While a connection has
//! [`MAX_QUEUED`] bytes waiting for its target, the driver reads no further packet
//! ([`is_blocked`](AgentEnd::is_blocked)). A target that takes no data for [`STALL_TIMEOUT`] then
//! loses its connection, and the others go on.
//!
//! Bounds: one entry for each dial and connection, within the limits; each call causes one packet
//! at most.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Packet;
use super::text;
use crate::close::CloseReason;
use crate::preface::Destination;

/// Timeout of a dial, as in Konnectivity's own agent.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The bytes that may wait for one target, each packet's [`PACKET_COST`] included; only the last
/// packet may lie beyond.
pub const MAX_QUEUED: usize = 1 << 20;

/// Cost of a packet that waits for its target, beside its bytes: its entry in memory.
pub const PACKET_COST: usize = 64;

/// Maximum time for which a target may take no data while everything behind its bytes waits.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Bounds of one stream.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of concurrent dials.
    pub dials: usize,
    /// Maximum number of concurrent dials and connections.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            dials: 1024,
            connections: 64 << 10,
        }
    }
}

/// Command to the driver. `id` is the connect id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Dial, within [`DIAL_TIMEOUT`], and report by [`AgentEnd::dialled`] or
    /// [`AgentEnd::dial_failed`].
    Dial {
        /// The connection that it becomes.
        id: i64,
        /// Number of the dial at the server.
        random: i64,
        /// Requested destination.
        destination: Destination,
    },
    /// Queue this for the target, and report by [`AgentEnd::taken`].
    Deliver {
        /// Connect id.
        id: i64,
        /// The bytes, at least one.
        data: Bytes,
    },
    /// The server's half has ended: the target gets the bytes delivered before, then the end of
    /// file. The driver goes on to send data of the target.
    FinishHalf {
        /// Connect id.
        id: i64,
    },
    /// The connection is closed: the target gets the bytes delivered before, then the end of file.
    Finish {
        /// Connect id.
        id: i64,
    },
    /// The dial or the connection ends at once, without the rest of the delivered bytes.
    Abort {
        /// Connect id.
        id: i64,
        /// Reason of the end.
        reason: CloseReason,
    },
}

/// The agent's end of a stream; see the [module](self) for how to drive it.
#[derive(Debug, Default)]
pub struct AgentEnd {
    limits: Limits,
    last_id: i64,
    dials: usize,
    connections: HashMap<i64, Connection>,
    by_random: HashMap<i64, i64>,
    blocked: Option<Blocked>,
    draining: bool,
    /// Whether the server supports halves.
    halves: bool,
    transmits: VecDeque<Packet>,
}

#[derive(Debug)]
struct Connection {
    random: i64,
    state: State,
    /// Bytes delivered and not taken, packets counted as they cost.
    queued: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Dialling,
    Open,
    /// The target takes no more, or its end of file has arrived: later data for it is dropped.
    Discarding,
}

/// The connection that everything waits for: one at most, since nothing is read meanwhile.
#[derive(Debug)]
struct Blocked {
    id: i64,
    until: Instant,
}

impl AgentEnd {
    /// Creates the end of a new stream.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// Creates the end of a new stream to a server that supports halves, if `halves`: DATA without
    /// data is then the end of its half.
    #[must_use]
    pub fn with_halves(mut self, halves: bool) -> Self {
        self.halves = halves;
        self
    }

    /// Takes a packet off the stream.
    pub fn handle(&mut self, packet: Packet, now: Instant) -> Option<Command> {
        match packet {
            Packet::DialRequest {
                protocol,
                address,
                random,
            } => self.dial(&protocol, &address, random),
            Packet::Data { connect_id, data } => self.deliver(connect_id, data, now),
            Packet::CloseRequest { connect_id } => {
                let closed = self.close(connect_id);
                let error = if closed { "" } else { text::UNKNOWN_CONNECTION };
                self.close_response(connect_id, error);
                closed.then_some(Command::Finish { id: connect_id })
            }
            Packet::CloseDial { random } => self.close_dial(random),
            // Not for an agent, or of a later release.
            Packet::DialResponse { .. }
            | Packet::CloseResponse { .. }
            | Packet::Drain
            | Packet::Unknown(_) => None,
        }
    }

    /// Whether no further packet is to be handled for now.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// Returns the next time at which to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.blocked.as_ref().map(|blocked| blocked.until)
    }

    /// Does everything due by `now`.
    pub fn handle_timeout(&mut self, now: Instant) -> Option<Command> {
        let Blocked { id, .. } = *self.blocked.as_ref().filter(|b| b.until <= now)?;
        let reason = CloseReason::Stalled;
        self.reset(id, &reason.to_string());
        Some(Command::Abort { id, reason })
    }

    /// Returns the next packet for the stream.
    pub fn poll_transmit(&mut self) -> Option<Packet> {
        self.transmits.pop_front()
    }

    /// Reports that a target was reached. Without effect after the dial was cancelled.
    pub fn dialled(&mut self, id: i64) {
        if let Some(connection) = self.dialling(id) {
            connection.state = State::Open;
            let random = connection.random;
            self.dials -= 1;
            self.dial_response(String::new(), id, random);
        }
    }

    /// Reports that a target was not reached; `error` is for the server's caller.
    pub fn dial_failed(&mut self, id: i64, error: String) {
        if let Some(random) = self.dialling(id).map(|connection| connection.random) {
            self.forget(id);
            self.dial_response(error, 0, random);
        }
    }

    /// Reports that a target has taken `bytes`, and with them the rest of so many packets.
    pub fn taken(&mut self, id: i64, bytes: usize, packets: usize, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let taken = bytes + packets * PACKET_COST;
        connection.queued = connection.queued.saturating_sub(taken);
        let full = connection.queued >= MAX_QUEUED;
        if let Some(blocked) = self.blocked.as_mut().filter(|blocked| blocked.id == id) {
            blocked.until = now + STALL_TIMEOUT;
            if !full {
                self.blocked = None;
            }
        }
    }

    /// Reports that a target takes no more; it may still send.
    pub fn stop(&mut self, id: i64) {
        if let Some(connection) = self.connections.get_mut(&id) {
            if connection.state == State::Open {
                connection.state = State::Discarding;
            }
            connection.queued = 0;
            self.unblock(id);
        }
    }

    /// Reports that a target has ended, and that all its data is on the stream.
    pub fn finish(&mut self, id: i64) {
        if self.close(id) {
            self.close_response(id, "");
        }
    }

    /// Reports that a target or its connection is broken. A dial is no connection yet: the server
    /// gets an answer.
    pub fn reset(&mut self, id: i64, error: &str) {
        if self.dialling(id).is_some() {
            self.dial_failed(id, error.to_owned());
        } else if self.close(id) {
            self.close_response(id, error);
        }
    }

    /// Asks the server, once, to prefer other agents for new dials.
    pub fn drain(&mut self) {
        if !std::mem::replace(&mut self.draining, true) {
            self.transmits.push_back(Packet::Drain);
        }
    }

    /// Returns the number of concurrent dials and connections.
    #[must_use]
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there are neither dials nor connections.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    fn dial(&mut self, protocol: &str, address: &str, random: i64) -> Option<Command> {
        self.last_id += 1;
        let id = self.last_id;
        let destination = match self.admit(protocol, address) {
            Ok(destination) => destination,
            Err(error) => {
                self.dial_response(error, 0, random);
                return None;
            }
        };
        let connection = Connection {
            random,
            state: State::Dialling,
            queued: 0,
        };
        self.dials += 1;
        self.connections.insert(id, connection);
        self.by_random.insert(random, id);
        Some(Command::Dial {
            id,
            random,
            destination,
        })
    }

    /// Returns the destination of a permitted request, or the reason of the refusal.
    fn admit(&self, protocol: &str, address: &str) -> Result<Destination, String> {
        if protocol != "tcp" {
            return Err("dial: unknown network; this agent dials tcp alone".to_owned());
        }
        let destination: Destination = address
            .parse()
            .map_err(|error| format!("dial tcp: {error}"))?;
        if self.dials >= self.limits.dials || self.connections.len() >= self.limits.connections {
            let detail = "this agent has as many dials or connections as it may on one stream";
            let reason = CloseReason::Overloaded;
            return Err(text::go_error(address, reason, detail));
        }
        Ok(destination)
    }

    fn deliver(&mut self, id: i64, data: Bytes, now: Instant) -> Option<Command> {
        // Says nothing about any connection.
        if id == 0 {
            return None;
        }
        let Some(connection) = self
            .connections
            .get_mut(&id)
            .filter(|connection| connection.state != State::Dialling)
        else {
            self.close_response(id, text::UNRECOGNIZED_CONNECTION);
            return None;
        };
        if connection.state == State::Discarding {
            return None;
        }
        if data.is_empty() {
            if !self.halves {
                return None;
            }
            connection.state = State::Discarding;
            return Some(Command::FinishHalf { id });
        }
        connection.queued += data.len() + PACKET_COST;
        if connection.queued >= MAX_QUEUED {
            let until = now + STALL_TIMEOUT;
            self.blocked = Some(Blocked { id, until });
        }
        Some(Command::Deliver { id, data })
    }

    fn close_dial(&mut self, random: i64) -> Option<Command> {
        let id = *self.by_random.get(&random)?;
        // Its answer may be on the way to a server that has forgotten the dial.
        let answered = self.dialling(id).is_none();
        self.forget(id);
        if answered {
            self.close_response(id, "");
        }
        let reason = CloseReason::Cancelled;
        Some(Command::Abort { id, reason })
    }

    fn dialling(&mut self, id: i64) -> Option<&mut Connection> {
        self.connections
            .get_mut(&id)
            .filter(|connection| connection.state == State::Dialling)
    }

    /// Whether there was a connection of that id, other than a dial, which the server can't know.
    fn close(&mut self, id: i64) -> bool {
        self.dialling(id).is_none() && self.forget(id)
    }

    fn forget(&mut self, id: i64) -> bool {
        let Some(connection) = self.connections.remove(&id) else {
            return false;
        };
        if connection.state == State::Dialling {
            self.dials -= 1;
        }
        // A server may have given a later dial the same number.
        if self.by_random.get(&connection.random) == Some(&id) {
            self.by_random.remove(&connection.random);
        }
        self.unblock(id);
        true
    }

    fn unblock(&mut self, id: i64) {
        self.blocked.take_if(|blocked| blocked.id == id);
    }

    fn dial_response(&mut self, error: String, connect_id: i64, random: i64) {
        self.transmits.push_back(Packet::DialResponse {
            error,
            connect_id,
            random,
        });
    }

    fn close_response(&mut self, connect_id: i64, error: &str) {
        self.transmits.push_back(Packet::CloseResponse {
            error: error.to_owned(),
            connect_id,
        });
    }
}

#[cfg(test)]
mod tests;
