//! The server's end of a stream of an agent that sends anything at any time: each reader gets its
//! own bytes, complete and in order.
#![no_main]

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::{blank, take_byte, take_number, take_piece};
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::server_end::{
    Answer, DialId, Event, ReadEnd, STALLED_AFTER, ServerEnd, StreamError,
};
use tunnel_proto::konnectivity::{Decoder, Packet};

/// Dial, as the driver knows it.
#[derive(Default)]
struct Client {
    /// Connect id, from the agent's answer to the last possible packet.
    id: Option<i64>,
    /// Unread data: the first byte of each chunk, and its length.
    unread: VecDeque<Bytes>,
    /// The client reads no more.
    stopped: bool,
    /// The client has cancelled it.
    reset: bool,
}

struct Driver {
    end: ServerEnd<i64>,
    now: Instant,
    clients: BTreeMap<i64, Client>,
    /// Written into each chunk, so that another one's is noticed.
    mark: u8,
}

impl Driver {
    fn handle(&mut self, packet: Packet) -> Result<(), StreamError> {
        // Whoever drives it takes nothing more off the stream meanwhile.
        if !self.end.wants_packets() {
            return Ok(());
        }
        let mut answered = None;
        match &packet {
            Packet::Data { connect_id, data } => {
                let mut clients = self.clients.values_mut();
                if let Some(client) = clients.find(|client| client.id == Some(*connect_id))
                    && !client.stopped
                    && !data.is_empty()
                {
                    client.unread.push_back(data.clone());
                }
            }
            Packet::CloseResponse { connect_id, .. } => {
                for client in self.clients.values_mut() {
                    client.id.take_if(|id| id == connect_id);
                }
            }
            Packet::DialResponse {
                connect_id, random, ..
            } => answered = Some((*random, *connect_id)),
            _ => {}
        }
        let was_open = |end: &ServerEnd<i64>, random| end.answer(DialId(random)).is_some();
        let before = answered.map(|(random, _)| was_open(&self.end, random));
        self.end.handle_packet(packet, self.now)?;
        if let Some((random, id)) = answered
            && before == Some(false)
            && self.end.answer(DialId(random)) == Some(Answer::Connected)
        {
            let taken = self.clients.values().any(|client| client.id == Some(id));
            assert!(id > 0 && !taken, "two connections are called {id}");
            self.clients.entry(random).or_default().id = Some(id);
        }
        self.look(1);
        Ok(())
    }

    /// Takes the output of the end; one call causes `packets` at most.
    fn look(&mut self, packets: usize) {
        let sent = std::iter::from_fn(|| self.end.poll_transmit()).count();
        assert!(sent <= packets, "{sent} packets at once");
        while let Some(event) = self.end.poll_event() {
            match event {
                Event::Stalled(dial) => self.drop_unread(dial),
                Event::Changed(dial) if self.end.reset_reason(DialId(dial)).is_some() => {
                    self.drop_unread(dial);
                }
                _ => {}
            }
        }
    }

    fn drop_unread(&mut self, dial: i64) {
        if let Some(client) = self.clients.get_mut(&dial) {
            (client.reset, client.stopped, client.id) = (true, true, None);
        }
    }

    fn read(&mut self, dial: i64) {
        let mut chunks = Vec::new();
        let read = self.end.read(DialId(dial), &mut chunks, self.now);
        let client = self.clients.entry(dial).or_default();
        if client.stopped {
            client.unread.clear();
            return;
        }
        assert_eq!(read == Ok(true), !chunks.is_empty());
        for chunk in chunks {
            assert_eq!(Some(chunk), client.unread.pop_front(), "lost or invented");
        }
        match read {
            Ok(true) => {}
            // All that came before the end was read.
            Ok(false) | Err(ReadEnd::Finished) => assert!(client.unread.is_empty()),
            Err(ReadEnd::Reset(_) | ReadEnd::Link(_)) => {}
        }
    }

    fn wait(&mut self, time: Duration) -> Result<(), StreamError> {
        self.now += time;
        // What is due may uncover what else is, once for each of our connections.
        for _ in 0..=self.clients.len() + 3 {
            if self.end.poll_timeout() > self.now {
                return Ok(());
            }
            self.end.handle_timeout(self.now)?;
            self.look(2 + self.clients.len());
        }
        panic!("due again and again");
    }

    fn chunk(&mut self, length: usize) -> Bytes {
        self.mark = self.mark.wrapping_add(1);
        match length {
            // Told apart by what is in them where that is cheap, else by their length.
            0..=64 => Bytes::copy_from_slice(&vec![self.mark; length]),
            _ => {
                let mut chunk = blank(length);
                chunk.advance(usize::from(self.mark) % 32);
                chunk
            }
        }
    }
}

fn run(mut data: &[u8]) -> Result<(), StreamError> {
    let now = Instant::now();
    let mut driver = Driver {
        end: ServerEnd::new(now),
        now,
        clients: BTreeMap::new(),
        mark: 0,
    };
    driver.look(1);
    let mut decoder = Decoder::default();
    while let Some(action) = take_byte(&mut data) {
        let dial = match action % 16 {
            0..8 => take_number(&mut data),
            _ => 0,
        };
        match action % 16 {
            0 => {
                let new = !driver.clients.contains_key(&dial);
                let asked = driver
                    .end
                    .dial(DialId(dial), "10.99.1.2:10250".to_owned(), dial);
                assert!(asked.is_ok() || !new, "a fresh number is in use");
                if asked.is_ok() {
                    driver.clients.insert(dial, Client::default());
                }
            }
            1 => driver.read(dial),
            2 => driver.end.finish(DialId(dial), driver.now),
            3 => {
                driver.end.stop(DialId(dial), driver.now);
                driver.clients.entry(dial).or_default().stopped = true;
            }
            4 => {
                driver
                    .end
                    .reset(DialId(dial), CloseReason::Cancelled, driver.now);
                driver.drop_unread(dial);
            }
            5 => {
                driver.end.release(DialId(dial), driver.now);
                // Its id goes with it, now or when it has been closed in order.
                if let Some(client) = driver.clients.get_mut(&dial) {
                    (client.stopped, client.id) = (true, None);
                }
            }
            6 => {
                let bytes = usize::from(take_byte(&mut data).unwrap_or_default()) << 12;
                driver.end.sent(DialId(dial), bytes, driver.now);
            }
            7 => driver.handle(Packet::DialResponse {
                error: if action < 250 { "" } else { "refused" }.to_owned(),
                connect_id: take_number(&mut data),
                random: dial,
            })?,
            8..11 => {
                let connect_id = take_number(&mut data);
                let length = usize::from(take_byte(&mut data).unwrap_or_default());
                // Short ones by the byte, long ones so that a queue is soon full.
                let data = driver.chunk(if length < 64 { length } else { length << 11 });
                driver.handle(Packet::Data { connect_id, data })?;
            }
            11 => driver.handle(Packet::CloseResponse {
                error: if action < 250 { "" } else { "broken" }.to_owned(),
                connect_id: take_number(&mut data),
            })?,
            12 => {
                let random = take_number(&mut data);
                driver.handle(Packet::CloseDial { random })?;
            }
            13 => {
                let mut bytes = Bytes::copy_from_slice(take_piece(&mut data).unwrap_or_default());
                while let Ok(Some(packet)) = decoder.decode(&mut bytes) {
                    driver.handle(packet)?;
                }
            }
            14 => driver.wait(STALLED_AFTER * u32::from(action) / 255)?,
            _ => driver.wait(Duration::from_millis(u64::from(action)))?,
        }
        driver.look(1);
    }
    driver.end.close_all(CloseReason::Shutdown);
    let dials: Vec<_> = driver.clients.keys().copied().collect();
    for dial in dials {
        let end = driver.end.write_end(DialId(dial));
        assert!(end.is_some() || driver.end.answer(DialId(dial)).is_none());
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    if let Err(error) = run(data) {
        let _ = (error.reason(), error.to_string());
    }
});
