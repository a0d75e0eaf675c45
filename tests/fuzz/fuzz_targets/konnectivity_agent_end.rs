//! The agent's end of a stream to a proxy-server that sends anything at any time, with targets that
//! do anything at any time.
#![no_main]

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::{blank, take_byte, take_number, take_piece};
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::agent_end::{
    AgentEnd, Command, Limits, MAX_QUEUED, PACKET_COST, STALL_TIMEOUT,
};
use tunnel_proto::konnectivity::{Decoder, Packet};

/// Small enough to be reached.
const LIMITS: Limits = Limits {
    dials: 3,
    connections: 6,
};

/// Connection, as the driver knows it.
#[derive(Default)]
struct Target {
    connected: bool,
    deaf: bool,
    /// Lengths of the packets that were delivered and not taken.
    queue: Vec<usize>,
}

impl Target {
    fn cost(&self) -> usize {
        self.queue.iter().map(|bytes| bytes + PACKET_COST).sum()
    }
}

struct Driver {
    end: AgentEnd,
    now: Instant,
    targets: HashMap<i64, Target>,
    last_id: i64,
    /// Requested dials, and answers, by their number.
    asked: HashMap<i64, usize>,
    answered: HashMap<i64, usize>,
    drains: usize,
}

impl Driver {
    fn new() -> Self {
        Self {
            end: AgentEnd::new(LIMITS),
            now: Instant::now(),
            targets: HashMap::new(),
            last_id: 0,
            asked: HashMap::new(),
            answered: HashMap::new(),
            drains: 0,
        }
    }

    fn handle(&mut self, packet: Packet) {
        // Whoever drives it takes nothing more off the stream meanwhile.
        if self.end.is_blocked() {
            return;
        }
        if let Packet::DialRequest { random, .. } = &packet {
            *self.asked.entry(*random).or_default() += 1;
        }
        let command = self.end.handle(packet, self.now);
        if let Some(command) = command {
            self.obey(command);
        }
        self.check(1);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Dial { id, .. } => {
                assert!(id > self.last_id, "an id is used again");
                self.last_id = id;
                self.targets.insert(id, Target::default());
            }
            Command::Deliver { id, data } => {
                let target = self.targets.get_mut(&id).expect("delivered to nobody");
                assert!(target.connected && !target.deaf && !data.is_empty());
                assert!(target.cost() < MAX_QUEUED, "delivered beyond what may wait");
                target.queue.push(data.len());
            }
            // Only servers that support halves send this.
            Command::FinishHalf { .. } => {}
            Command::Finish { id } => {
                let target = self
                    .targets
                    .remove(&id)
                    .expect("finished without being there");
                assert!(target.connected, "a dial was finished");
            }
            Command::Abort { id, .. } => {
                self.targets
                    .remove(&id)
                    .expect("aborted without being there");
            }
        }
    }

    /// Checks what holds after each call, which may cause `packets` at most.
    fn check(&mut self, packets: usize) {
        let mut sent = 0;
        while let Some(packet) = self.end.poll_transmit() {
            sent += 1;
            match packet {
                Packet::DialResponse { random, .. } => {
                    *self.answered.entry(random).or_default() += 1;
                }
                Packet::Drain => self.drains += 1,
                Packet::CloseResponse { .. } => {}
                other => panic!("an agent sent {other:?}"),
            }
        }
        assert!(sent <= packets, "{sent} packets at once");
        assert_eq!(self.end.len(), self.targets.len());
        assert!(self.targets.len() <= LIMITS.connections);
        let dials = self.targets.values().filter(|target| !target.connected);
        assert!(dials.count() <= LIMITS.dials);
        let full = |target: &Target| target.cost() >= MAX_QUEUED;
        assert_eq!(self.end.is_blocked(), self.targets.values().any(full));
        assert_eq!(self.end.poll_timeout().is_some(), self.end.is_blocked());
        assert!(self.drains <= 1);
    }

    /// Reports `what` about a target, and updates the model.
    fn report(&mut self, what: u8, id: i64, amount: u8) {
        let dialling = self
            .targets
            .get(&id)
            .is_some_and(|target| !target.connected);
        match what {
            0 => {
                self.end.dialled(id);
                if let Some(target) = self.targets.get_mut(&id) {
                    target.connected = true;
                }
            }
            1 => {
                self.end.dial_failed(id, "refused".to_owned());
                if dialling {
                    self.targets.remove(&id);
                }
            }
            2 => {
                let queue = self.targets.get_mut(&id).map(|target| &mut target.queue);
                let taken = queue.map_or(0, |queue| {
                    let count = usize::from(amount).min(queue.len());
                    let bytes: usize = queue.drain(..count).sum();
                    self.end.taken(id, bytes, count, self.now);
                    count
                });
                assert!(taken <= usize::from(amount));
            }
            3 => {
                self.end.stop(id);
                if let Some(target) = self.targets.get_mut(&id) {
                    target.queue.clear();
                    target.deaf |= target.connected;
                }
            }
            4 => {
                self.end.finish(id);
                if !dialling {
                    self.targets.remove(&id);
                }
            }
            _ => {
                self.end.reset(id, &CloseReason::PeerReset.to_string());
                self.targets.remove(&id);
            }
        }
        self.check(1);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let due = self.end.poll_timeout().is_some_and(|due| due <= self.now);
        let command = self.end.handle_timeout(self.now);
        assert_eq!(command.is_some(), due, "a timeout without its time");
        if let Some(command) = command {
            self.obey(command);
            assert!(!self.end.is_blocked());
        }
        self.check(1);
    }
}

fn run(mut data: &[u8]) {
    let mut driver = Driver::new();
    let mut decoder = Decoder::default();
    while let Some(action) = take_byte(&mut data) {
        match action % 16 {
            0 | 1 => {
                let address = match take_byte(&mut data).unwrap_or_default() {
                    0 => String::from_utf8_lossy(take_piece(&mut data).unwrap_or_default()).into(),
                    n => format!("10.99.1.{n}:10250"),
                };
                driver.handle(Packet::DialRequest {
                    protocol: if action < 250 { "tcp" } else { "unix" }.to_owned(),
                    address,
                    random: take_number(&mut data),
                });
            }
            2 | 3 => {
                let connect_id = take_number(&mut data);
                let length = usize::from(take_byte(&mut data).unwrap_or_default()) << 11;
                let data = blank(length);
                driver.handle(Packet::Data { connect_id, data });
            }
            4 => {
                let connect_id = take_number(&mut data);
                driver.handle(Packet::CloseRequest { connect_id });
            }
            5 => {
                let random = take_number(&mut data);
                driver.handle(Packet::CloseDial { random });
            }
            6 => {
                let mut bytes = Bytes::copy_from_slice(take_piece(&mut data).unwrap_or_default());
                while let Ok(Some(packet)) = decoder.decode(&mut bytes) {
                    driver.handle(packet);
                }
            }
            7 => driver.wait(STALL_TIMEOUT * u32::from(action) / 255),
            8 => {
                driver.end.drain();
                driver.check(1);
            }
            what => {
                let id = take_number(&mut data);
                let amount = take_byte(&mut data).unwrap_or_default();
                driver.report(what.saturating_sub(9), id, amount);
            }
        }
    }
    // No dial is answered twice.
    let numbers: HashSet<_> = driver.answered.keys().collect();
    for number in numbers {
        assert!(driver.answered[number] <= driver.asked.get(number).copied().unwrap_or_default());
    }
}

fuzz_target!(|data: &[u8]| run(data));
