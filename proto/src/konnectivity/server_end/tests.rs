//! Scripts on a virtual clock, and random interleavings with an agent that behaves like the real
//! one.

mod closing;
mod dials;
mod interleaving;
mod readers;
mod silence;

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::*;

/// A server's end, and all its packets and events.
struct Bench {
    now: Instant,
    end: ServerEnd<&'static str>,
}

const ONE: DialId = DialId(1);
const TWO: DialId = DialId(2);

impl Bench {
    /// Creates the end of a new stream.
    fn new() -> Self {
        // The only use of a clock: there is no other way to an Instant.
        let now = Instant::now();
        Self {
            now,
            end: ServerEnd::new(now),
        }
    }

    /// Creates the end of an agent that has answered, with [`ONE`] connected as 1 and [`TWO`] as 2.
    fn connected() -> Self {
        let mut bench = Self::new();
        bench.receive(closed(-1));
        bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
        bench.end.dial(TWO, "w1:2".into(), "two").unwrap();
        bench.receive(dialled(ONE, 1));
        bench.receive(dialled(TWO, 2));
        bench.sent();
        bench.events();
        bench
    }

    fn receive(&mut self, packet: Packet) {
        assert!(self.end.wants_packets());
        self.end.handle_packet(packet, self.now).unwrap();
    }

    /// Returns the packets since the last call, without heartbeats.
    fn sent(&mut self) -> Vec<Packet> {
        std::iter::from_fn(|| self.end.poll_transmit())
            .filter(
                |packet| !matches!(packet, Packet::CloseRequest { connect_id } if *connect_id < 0),
            )
            .collect()
    }

    /// Returns the events since the last call.
    fn events(&mut self) -> Vec<Event<&'static str>> {
        std::iter::from_fn(|| self.end.poll_event()).collect()
    }

    /// Lets time pass, from one due event to the next.
    fn pass(&mut self, time: Duration) -> Result<(), StreamError> {
        let until = self.now + time;
        while self.end.poll_timeout() <= until {
            self.now = self.now.max(self.end.poll_timeout());
            self.end.handle_timeout(self.now)?;
        }
        self.now = until;
        Ok(())
    }

    /// Lets time pass with an agent that answers each barrier.
    fn pass_answered(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            self.answer_barriers();
            let next = self.end.poll_timeout();
            if next > until {
                break;
            }
            self.now = self.now.max(next);
            self.end.handle_timeout(self.now).unwrap();
        }
        self.now = until;
    }

    /// Answers every barrier that is out.
    fn answer_barriers(&mut self) {
        let last = i64::try_from(self.end.barriers.sent()).unwrap();
        self.end.handle_packet(closed(-last), self.now).unwrap();
    }

    fn read(&mut self, dial: DialId) -> Result<Vec<u8>, ReadEnd> {
        let mut chunks = Vec::new();
        self.end.read(dial, &mut chunks, self.now)?;
        Ok(chunks.concat())
    }
}

fn dialled(dial: DialId, connect_id: i64) -> Packet {
    Packet::DialResponse {
        error: String::new(),
        connect_id,
        random: dial.0,
    }
}

fn data(connect_id: i64, data: &'static [u8]) -> Packet {
    let data = Bytes::from_static(data);
    Packet::Data { connect_id, data }
}

fn closed(connect_id: i64) -> Packet {
    let error = if connect_id < 0 {
        "Unknown connectID"
    } else {
        ""
    };
    Packet::CloseResponse {
        error: error.into(),
        connect_id,
    }
}

fn close(connect_id: i64) -> Packet {
    Packet::CloseRequest { connect_id }
}
