//! The two ends of a session, over tunnels that are lost between any two bytes, and processes that are replaced or killed:
//! each program reads what the other one wrote, to its end or a reset.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::sessions::side::{AGENT, Ending, SERVER, Side, Way};
use tunnel_fuzz::take_byte;

/// Turn of an end: the kind of its action, and the amount.
const TURN: [(u8, u8); 8] = [
    (2, 0),
    (0, 192),
    (4, 255),
    (14, 0),
    (9, 255),
    (5, 255),
    (7, 255),
    (8, 0),
];

struct World {
    sides: [Side; 2],
    /// Ways from the server, and from the agent.
    tunnel: Option<[Way; 2]>,
    now: Instant,
    /// Whether a program has reset its socket, or a process was killed.
    is_reset: bool,
}

impl World {
    fn new(is_held: bool) -> Self {
        let mut sides = [SERVER, AGENT].map(Side::new);
        if is_held {
            sides.iter_mut().for_each(Side::hold);
        }
        Self {
            sides,
            tunnel: Some(Default::default()),
            now: Instant::now(),
            is_reset: false,
        }
    }

    fn step(&mut self, what: u8, number: usize, amount: u8) {
        let size = usize::from(amount);
        let side = &mut self.sides[number];
        // The way to the other end, and back.
        let ways = self.tunnel.as_mut().map(|[one, other]| match number {
            SERVER => (one, other),
            _ => (other, one),
        });
        match (what, ways) {
            (0 | 1, ways) => self.is_reset |= side.act(amount, ways),
            (2, Some(_)) => self.sides[SERVER].offer(),
            (3 | 4, Some((to, _))) => side.send(to, size),
            (5 | 6, Some((to, back))) => side.receive(back, to, size),
            (7, _) => side.write(size),
            (8, ways) => side.tell(ways.map(|(to, _)| to)),
            (9 | 10, Some((to, back))) => side.hear_some(back, to, size),
            (11, Some(_)) => {
                self.tunnel = None;
                self.sides.iter_mut().for_each(|side| side.cut(self.now));
            }
            (12, None) => self.connect(),
            (13, None) => side.hand_over(self.now),
            (14, Some((to, _))) => side.acknowledge(to),
            // The process is killed.
            (15, None) if amount < 16 => self.is_reset |= side.forget(),
            _ => {}
        }
        let [server, agent] = &mut self.sides;
        server.check(agent);
        agent.check(server);
    }

    fn connect(&mut self) {
        let mut ways: [Way; 2] = Default::default();
        let [server, agent] = &mut self.sides;
        if !server.request(&mut ways[SERVER]) {
            // No server resumes it: it expires.
            agent.forget();
        }
        self.tunnel = Some(ways);
    }

    /// Lets everything come to its end, over a tunnel that is not lost any more.
    fn settle(&mut self) {
        for _ in 0..1000 {
            self.step(12, SERVER, 0);
            for number in [SERVER, AGENT] {
                for (what, amount) in TURN {
                    self.step(what, number, amount);
                }
            }
            if self.sides.iter().all(|side| side.state.is_none()) {
                return;
            }
        }
        // A confirmation that comes before the answer of a resumption is lost with it. An end without a
        // socket expires.
        for side in &self.sides {
            let state = &side.state;
            assert!(state.is_none() || side.is_over(), "it hangs: {state:?}");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let is_held = take_byte(&mut data).unwrap_or_default() % 2 == 1;
    let mut world = World::new(is_held);
    while let Some(action) = take_byte(&mut data) {
        let amount = take_byte(&mut data).unwrap_or_default();
        world.step(action % 16, usize::from(action >> 7), amount);
    }
    world.settle();
    let [server, agent] = &world.sides;
    let endings = [server.ending, agent.ending];
    assert!(!endings.contains(&None));
    if is_held && !world.is_reset {
        assert!(!endings.contains(&Some(Ending::Reset)));
    }
    if endings == [Some(Ending::Finished); 2] {
        assert_eq!((server.input, agent.input), (agent.output, server.output));
    }
});
