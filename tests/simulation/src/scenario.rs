//! A scenario from a seed: faults and requests for a while, then a network without faults, in which
//! everything must work.

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};

use crate::endpoint::{HEADER, Script};
use crate::interpose::kernel;
use crate::kernel::network::Path;
use crate::topology::{STRANGER, TUNNEL_PORT};
use crate::world::{MS, Request, SECOND, Shared, World};

/// Time without faults before everything must work: the idle timeout of a tunnel, and the longest
/// interval between two dials of an agent.
const SETTLE: u64 = 45 * SECOND;

/// Time in which requests without faults end.
const PATIENCE: u64 = 20 * SECOND;

/// Result of a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub trace: u64,
    /// Number of events in it.
    pub events: u64,
    /// Requests.
    pub requests: u64,
    /// Requests that reached their target.
    pub ran: u64,
    /// Simulated time in nanoseconds.
    pub time: u64,
}

/// Runs the scenario of a seed.
///
/// # Errors
/// A violated invariant.
pub fn run(shared: Rc<Shared>, seed: u64, state: PathBuf) -> Result<Outcome> {
    let mut world = World::new(shared, seed, state)?;
    let start = world.now();
    let ran = play(&mut world);
    let seconds = || (world.now() - start) as f64 / SECOND as f64;
    ran.with_context(|| format!("at {:.3} s", seconds()))?;
    // Before pages are fetched, whose length depends on the process and its host.
    let (trace, events) = kernel(|kernel| kernel.trace());
    world.check_limits()?;
    let (ran, requests) = world.counts();
    Ok(Outcome {
        trace,
        events,
        requests,
        ran,
        time: world.now() - start,
    })
}

fn play(world: &mut World) -> Result<()> {
    for index in 0..world.topology.servers.len() {
        world.start_server(index)?;
    }
    for index in 0..world.topology.agents.len() {
        world.start_agent(index)?;
    }
    set_paths(world);
    if world.random.chance(3, 4) {
        world.run_until(world.now() + 2 * SECOND)?;
    }
    for _ in 0..world.random.between(5, 40) {
        match world.random.below(8) {
            0 => fault(world)?,
            _ => {
                let request = request(world, false);
                world.dial(request)?;
            }
        }
        let pause = match world.random.below(4) {
            0 => world.random.below(3 * SECOND),
            _ => world.random.below(100 * MS),
        };
        world.run_until(world.now() + pause)?;
    }
    heal(world)?;
    world.run_until(world.now() + SETTLE)?;
    check_recovery(world)?;
    Ok(())
}

/// Everything is served once faults have stopped.
fn check_recovery(world: &mut World) -> Result<()> {
    let mut dialled = Vec::new();
    for server in 0..world.topology.servers.len() {
        for to in world.topology.served() {
            let mut request = request(world, true);
            (request.server, request.to) = (server, to);
            dialled.push(world.dial(request)?);
        }
    }
    let end = world.now() + PATIENCE;
    while world.now() < end && !world.is_quiet() {
        world.run_until(world.now() + SECOND / 2)?;
    }
    for id in dialled {
        ensure!(
            world.is_over(id),
            "request {id} has not ended in 20 s:\n{}",
            world.describe()
        );
        world.check_succeeded(id)?;
    }
    // The programs learn of the last ends.
    world.run_until(world.now() + 2 * SECOND)?;
    world.check_rest()
}

fn set_paths(world: &mut World) {
    let mtu = world.topology.mtu;
    let random = &mut world.random;
    let path = Path {
        delay: random.pick(&[MS / 2, 5 * MS, 40 * MS, 150 * MS]),
        jitter: random.pick(&[0, 0, MS, 10 * MS, 80 * MS]),
        loss: random.pick(&[0, 0, 5, 50, 200]),
        duplicates: random.pick(&[0, 0, 20, 200]),
        damaged: random.pick(&[0, 0, 10, 100]),
        rate: random.pick(&[0, 0, 12_500_000, 1_250_000]),
        mtu,
        is_cut: false,
    };
    for_each_path(world, |_| path);
}

fn for_each_path(world: &World, change: impl Fn(Path) -> Path) {
    for server in &world.topology.servers {
        for agent in &world.topology.agents {
            kernel(|kernel| {
                for (from, to) in [(server.host, agent.host), (agent.host, server.host)] {
                    let path = change(kernel.path(from, to));
                    kernel.set_path(from, to, path);
                }
            });
        }
    }
}

/// Ends all faults.
fn heal(world: &mut World) -> Result<()> {
    for_each_path(world, |path| Path {
        delay: path.delay,
        rate: 0,
        mtu: path.mtu,
        ..Path::default()
    });
    world.end_drains();
    world.run_until(world.now() + 3 * SECOND)?;
    ensure!(
        !world.is_stopping(),
        "a drain has not ended 3 s after its second signal"
    );
    let targets = world.topology.targets.clone();
    for target in targets {
        let address = world.topology.hosts[target.host];
        kernel(|kernel| kernel.set_silent(address, false));
    }
    for index in 0..world.topology.servers.len() {
        if !world.has_server(index) {
            world.start_server(index)?;
        }
    }
    for index in 0..world.topology.agents.len() {
        if !world.has_agent(index) {
            world.start_agent(index)?;
        }
    }
    Ok(())
}

fn fault(world: &mut World) -> Result<()> {
    let server = world.random.below(world.topology.servers.len() as u64) as usize;
    let agent = world.random.below(world.topology.agents.len() as u64) as usize;
    match world.random.below(14) {
        0 => {
            world.crash_server(server);
            // At once, as a service manager does.
            if world.random.chance(2, 3) {
                world.start_server(server)?;
            }
        }
        1 => {
            world.crash_agent(agent);
            if world.random.chance(2, 3) {
                world.start_agent(agent)?;
            }
        }
        2 | 3 => cut(world, server, agent),
        4 => for_each_path(world, |path| Path {
            is_cut: false,
            ..path
        }),
        5 => set_paths(world),
        6 => {
            let day = 24 * 3600 * SECOND as i64;
            let by = world
                .random
                .pick(&[-300 * day, -day, -60_000_000_000, 60_000_000_000, day]);
            match world.random.chance(1, 2) {
                true => world.step_clock(true, server, by),
                false => world.step_clock(false, agent, by),
            }
        }
        7 => silence(world),
        8 => attack(world, server, agent),
        9 => world.stop_server(server),
        10 => {
            // A rollout, in either order.
            let has_former = world.has_agent(agent);
            let stops_first = world.random.chance(1, 2);
            if has_former && stops_first {
                world.stop_agent(agent);
            }
            world.start_agent(agent)?;
            if has_former && !stops_first {
                world.stop_former_agent(agent);
            }
        }
        11 => {
            let host = world.topology.agents[agent].host;
            let mapping = 1000 * world.random.below(20) as u16;
            kernel(|kernel| kernel.set_mapping(host, mapping));
        }
        12 => {
            for index in 0..world.topology.servers.len() {
                if !world.has_server(index) {
                    world.start_server(index)?;
                }
            }
        }
        _ => world.reload(),
    }
    Ok(())
}

/// Cuts the path between a server and an agent, in one direction or both.
fn cut(world: &mut World, server: usize, agent: usize) {
    let server = world.topology.servers[server].host;
    let agent = world.topology.agents[agent].host;
    let directions = world.random.between(1, 3);
    kernel(|kernel| {
        for (bit, (from, to)) in [(1, (server, agent)), (2, (agent, server))] {
            if directions & bit != 0 {
                let path = kernel.path(from, to);
                kernel.set_path(
                    from,
                    to,
                    Path {
                        is_cut: true,
                        ..path
                    },
                );
            }
        }
    });
}

/// Makes a target answer no connect, or answer again.
fn silence(world: &mut World) {
    let targets = &world.topology.targets;
    let target = targets[world.random.below(targets.len() as u64) as usize];
    let address = world.topology.hosts[target.host];
    let is_silent = world.random.chance(2, 3);
    kernel(|kernel| kernel.set_silent(address, is_silent));
}

/// Sends packets that are no packets of a tunnel, also in the name of a peer.
fn attack(world: &mut World, server: usize, agent: usize) {
    let server = SocketAddrV4::new(world.topology.servers[server].address, TUNNEL_PORT);
    let agent = world.topology.agents[agent].address;
    for _ in 0..world.random.between(1, 50) {
        let length = world.random.pick(&[0, 1, 20, 40, 1200, 1472]);
        let mut bytes: Vec<u8> = (0..length).map(|_| world.random.next() as u8).collect();
        if let [first, version @ .., _] = &mut bytes[..]
            && world.random.chance(1, 2)
        {
            *first |= 0xc0;
            if let Some(version) = version.first_chunk_mut() {
                *version = 1u32.to_be_bytes();
            }
        }
        let port = world.random.between(32_768, 32_800) as u16;
        let stranger = SocketAddrV4::new(STRANGER, port);
        let peer = SocketAddrV4::new(agent, port);
        let (from, to) = match world.random.below(3) {
            0 => (stranger, server),
            1 => (peer, server),
            _ => (server, peer),
        };
        kernel(|kernel| kernel.inject(from, to, bytes));
    }
}

/// Chooses a request: to where, and what both ends do.
fn request(world: &mut World, is_calm: bool) -> Request {
    let now = world.now();
    let servers = world.topology.servers.len() as u64;
    let (served, unserved) = (world.topology.served(), world.topology.unserved());
    let refusing = world.topology.refusing();
    let random = &mut world.random;
    let server = random.below(servers) as usize;
    let to = match random.below(20) {
        0 | 1 => random.pick(&unserved),
        2 => random.pick(&refusing),
        _ => random.pick(&served),
    };
    let mut script = |header: u64| {
        let send = match random.below(6) {
            0 => 0,
            1 => random.below(300 << 10),
            2 => random.below(40 << 10),
            _ => random.below(2000),
        };
        let is_stalled = !is_calm && random.chance(1, 8);
        Script {
            send: header + send,
            start: match random.chance(1, 6) && !is_calm {
                true => now + random.below(3 * SECOND),
                false => now,
            },
            rest: match random.chance(1, 8) && !is_calm && send < 20_000 {
                true => random.below(300 * MS),
                false => 0,
            },
            write: random.pick(&[1000, 4096, 16 << 10]),
            stall_at: random.below(send + 1),
            stall: if is_stalled {
                random.below(15 * SECOND)
            } else {
                0
            },
            abort_at: (!is_calm && random.chance(1, 8)).then(|| HEADER + random.below(20_000)),
            waits: random.chance(1, 2),
        }
    };
    let (mut client, target) = (script(HEADER), script(0));
    // Two that wait for each other would never end.
    client.waits &= !target.waits;
    Request {
        server,
        to,
        client,
        target,
        must_succeed: is_calm,
    }
}
