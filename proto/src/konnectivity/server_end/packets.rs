//! Handling of each packet of an agent.

use std::time::Instant;

use bytes::Bytes;

use super::connection::Sending;
use super::{
    DialId, Event, IdOwner, LINGER, MAX_CLOSING, ReadEnd, STALLED_AFTER, ServerEnd, SlowReader,
    StreamError,
};
use crate::close::CloseReason;
use crate::konnectivity::Packet;

impl<W: Clone> ServerEnd<W> {
    /// Handles a packet of the stream. One that fits nothing is answered as proxy-server does, or
    /// ignored.
    ///
    /// # Errors
    /// [`StreamError::Flood`]: end the stream.
    pub fn handle_packet(&mut self, packet: Packet, now: Instant) -> Result<(), StreamError> {
        match packet {
            Packet::Data { connect_id, data } => self.handle_data(connect_id, data, now),
            Packet::CloseResponse { error, connect_id } => {
                match u64::try_from(connect_id) {
                    Ok(_) => self.handle_closed(connect_id, &error, now),
                    Err(_) => self.handle_barrier(connect_id.unsigned_abs(), now),
                }
                Ok(())
            }
            Packet::DialResponse {
                error,
                connect_id,
                random,
            } => self.handle_answer(DialId(random), connect_id, error),
            Packet::CloseDial { random } => {
                let text = "the agent cancelled the dial".to_owned();
                self.handle_answer(DialId(random), 0, text)
            }
            Packet::Drain => {
                self.events.push_back(Event::Draining);
                Ok(())
            }
            // No agent sends these to a server.
            Packet::DialRequest { .. } | Packet::CloseRequest { .. } | Packet::Unknown(_) => Ok(()),
        }
    }

    fn handle_data(&mut self, id: i64, data: Bytes, now: Instant) -> Result<(), StreamError> {
        match self.ids.get(&id) {
            Some(IdOwner::Connection(dial)) => {
                let dial = *dial;
                if let Some(connection) = self.connections.get_mut(&dial) {
                    connection.receive(data, now);
                    self.events
                        .push_back(Event::Changed(connection.waker.clone()));
                    if connection.is_full() && self.slow_reader.is_none() {
                        let until = now + STALLED_AFTER;
                        self.slow_reader = Some(SlowReader { dial, until });
                    }
                }
                Ok(())
            }
            Some(IdOwner::Closing(_)) => Ok(()),
            // "None" on the wire, and what only barriers are.
            None if id <= 0 => Ok(()),
            None => self.refuse(id),
        }
    }

    fn handle_closed(&mut self, id: i64, error: &str, now: Instant) {
        match self.ids.get(&id) {
            // An agent may name an id again that it has closed: it stays until the next barrier.
            None | Some(IdOwner::Closing(_)) => {}
            Some(IdOwner::Connection(dial)) => {
                let dial = *dial;
                self.ids.remove(&id);
                let end = if error.is_empty() {
                    ReadEnd::Finished
                } else {
                    ReadEnd::Reset(CloseReason::PeerReset)
                };
                self.end(dial, end, now);
            }
        }
    }

    fn handle_answer(&mut self, dial: DialId, id: i64, error: String) -> Result<(), StreamError> {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.is_dialling()) else {
            // Given up meanwhile.
            return if id > 0 && !self.ids.contains_key(&id) {
                self.refuse(id)
            } else {
                Ok(())
            };
        };
        self.events
            .push_back(Event::Changed(connection.waker.clone()));
        if !error.is_empty() {
            connection.fail(error);
        } else if id <= 0 || self.ids.contains_key(&id) {
            connection.fail(format!(
                "the agent answered with the invalid connect id {id}"
            ));
        } else {
            connection.connect_id = Some(id);
            self.ids.insert(id, IdOwner::Connection(dial));
        }
        Ok(())
    }

    fn handle_barrier(&mut self, seq: u64, now: Instant) {
        let Some(passed) = self.barriers.answered(seq, now) else {
            return;
        };
        for dial in passed {
            if let Some(connection) = self.connections.get_mut(&dial)
                && let Sending::Barrier(expected) = connection.sending
                && connection.read_end().is_none()
            {
                let until = now + LINGER;
                connection.sending = Sending::Linger { expected, until };
                // One answer may be waited for by many: what follows is for the next timeout.
                self.lingering.push(std::cmp::Reverse((now, dial)));
            }
        }
        if self.barriers.comes_alive() {
            self.events.push_back(Event::Alive);
        }
        // What was to be closed before the barrier is closed: nothing can come of it any more.
        while let Some(&(after, id)) = self.closing.front()
            && after < seq
        {
            self.closing.pop_front();
            if self.ids.get(&id) == Some(&IdOwner::Closing(after)) {
                self.ids.remove(&id);
            }
        }
    }

    /// Ends a connection for which no more packets come.
    fn end(&mut self, dial: DialId, end: ReadEnd, now: Instant) {
        let Some(connection) = self.connections.get_mut(&dial) else {
            return;
        };
        connection.end(end);
        self.events
            .push_back(Event::Changed(connection.waker.clone()));
        if connection.released {
            self.connections.remove(&dial);
            self.note_space(dial, now);
        }
    }

    /// Closes a connection that this server did not request.
    fn refuse(&mut self, id: i64) -> Result<(), StreamError> {
        if self.closing.len() >= MAX_CLOSING {
            return Err(StreamError::Flood);
        }
        self.transmit
            .push_back(Packet::CloseRequest { connect_id: id });
        self.close(id);
        Ok(())
    }
}
