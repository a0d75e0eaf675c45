//! Live connections to which something happens: how many are cut, and how long they stand still.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::Socket;

use super::{Effort, Figure, percentile};
use crate::bench::path::{Installed, Running};
use crate::client::round_trips;
use crate::conversation::{Conversation, Pace};
use crate::frontend::Frontend;
use crate::lab::{Lab, address};
use crate::load::{Load, ask};
use crate::side::Side;
use crate::target::Behaviour;

/// Number of connections of which one talks most of the time. The pauses of these are measured.
const EACH: usize = 20;

/// Pause of the busy ones between two messages.
const PAUSE: Duration = Duration::from_millis(10);

/// Age from which on all connections are held, with room for 1,000 of them.
const HELD: Duration = Duration::from_secs(3);

/// Shortest time for everything to go on.
const SETTLED: Duration = Duration::from_secs(3);

/// Time for a process to take over.
const REPLACED: Duration = Duration::from_secs(20);

/// An event in the life of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process is killed, and started again at once.
    Killed(Side),
    /// A process takes the place of another one.
    Replaced(Side),
    /// The router loses its state: the packets of the tunnel vanish for good.
    TunnelLost,
}

impl Event {
    /// Every event.
    pub const ALL: [Self; 5] = [
        Self::Killed(Side::Server),
        Self::Killed(Side::Agent),
        Self::Replaced(Side::Server),
        Self::Replaced(Side::Agent),
        Self::TunnelLost,
    ];

    /// Returns a name for reports.
    pub fn name(self) -> String {
        match self {
            Self::Killed(side) => format!("{} killed", side.name()),
            Self::Replaced(side) => format!("{} replaced", side.name()),
            Self::TunnelLost => "tunnel lost".to_owned(),
        }
    }

    /// Lets it happen; `meanwhile` runs while a process or a tunnel is missing, if that is possible.
    fn happen(self, lab: &mut Lab, meanwhile: impl FnOnce()) -> Result<()> {
        match self {
            Self::Killed(side) => {
                let process = side.daemon(lab)?;
                process.kill()?;
                meanwhile();
                process.start()
            }
            Self::Replaced(side) => {
                meanwhile();
                side.daemon(lab)?.replace(REPLACED)
            }
            Self::TunnelLost => {
                lab.router.lose_flows()?;
                meanwhile();
                Ok(())
            }
        }
    }
}

/// Measures `count` connections, all of which are idle but one where `are_idle`.
pub(super) fn take(
    path: &mut Running,
    event: Event,
    (count, are_idle): (usize, bool),
    effort: &Effort,
) -> Result<Vec<Figure>> {
    let installed = path.installed.as_mut();
    let Installed { lab, .. } = installed.context("this path has no laboratory")?;
    for side in [Side::Server, Side::Agent] {
        side.daemon(lab)?.wait_ready(REPLACED)?;
    }
    // Those of the last measurement.
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(REPLACED, |status| status["connections"]["open"] == 0)?;
    match are_idle {
        true => idle(lab, event, count, SETTLED + 3 * effort.settle),
        false => mixed(lab, event, count, SETTLED + 3 * effort.settle),
    }
}

fn echo(worker: u8) -> SocketAddr {
    (address::node(worker), Behaviour::Echo.port()).into()
}

fn open(lab: &Lab, count: usize) -> Result<Vec<Socket>> {
    Frontend::Redirect.through(lab, |dial| (0..count).map(|_| dial(echo(1))).collect())
}

/// Connections of every kind, and clients that connect meanwhile.
fn mixed(lab: &mut Lab, event: Event, count: usize, settle: Duration) -> Result<Vec<Figure>> {
    let pace = |number| match number % EACH {
        _ if number == 0 => Pace::Bulk,
        1 => Pace::Messages(100, PAUSE),
        // Pieces of a copy.
        2 => Pace::Messages(20_000, Duration::from_millis(100)),
        _ => Pace::Messages(1, Duration::from_secs(1)),
    };
    let sockets = open(lab, count)?.into_iter().enumerate();
    let talks = sockets.map(|(number, socket)| Conversation::start(socket, pace(number)));
    let mut talks = talks.collect::<Result<Vec<_>>>()?;
    thread::sleep(HELD);
    let load = Load::start(&lab.control_plane, 2, |request| ask(echo(1), request))?;
    load.wait_answered(50, REPLACED)?;
    // Their clients end their half meanwhile.
    let ending = talks.split_off(count - count / EACH);
    let began = Instant::now();
    event.happen(lab, || ending.iter().for_each(Conversation::stop))?;
    thread::sleep(settle);
    let attempts = load.stop();
    talks.iter().for_each(Conversation::stop);
    let (mut cut, mut pauses, mut bytes) = (0, Vec::new(), 0);
    for (number, talk) in talks.into_iter().chain(ending).enumerate() {
        match talk.finish() {
            Ok(summary) => {
                bytes += summary.bytes;
                if number % EACH == 1 {
                    pauses.push(summary.longest_gap.saturating_sub(PAUSE));
                }
            }
            Err(error) => {
                cut += 1;
                eprintln!("connection {number}: {error:#}");
            }
        }
    }
    pauses.sort_unstable();
    // A request that a killed process had already got ends with it.
    let is_new = |start: Instant| !matches!(event, Event::Killed(_)) || start >= began;
    let failed = attempts.iter().filter(|it| it.result.is_err());
    let refused = failed.filter(|it| is_new(it.start)).count();
    let slowest = attempts.iter().map(|it| it.end - it.start).max();
    Ok(vec![
        Figure::new("cut or wrong", "connections", f64::from(cut)),
        Figure::millis("pause p50", percentile(&pauses, 0.5)),
        Figure::millis("pause p99", percentile(&pauses, 0.99)),
        Figure::new("new, refused", "connections", refused as f64),
        Figure::new("new", "connections", attempts.len() as f64),
        Figure::millis("slowest new", slowest.unwrap_or_default()),
        Figure::new("compared", "MB", bytes as f64 / 1e6),
    ])
}

/// Idle connections beside one that talks.
fn idle(lab: &mut Lab, event: Event, count: usize, settle: Duration) -> Result<Vec<Figure>> {
    let echoes = match event {
        Event::Replaced(Side::Server) => &[1, 2][..],
        _ => &[1],
    };
    let echoes = echoes.iter().map(|worker| echo(*worker)).cycle();
    let idle = Frontend::Redirect.through(lab, |dial| {
        let opened = echoes.take(count).map(|address| {
            let socket = dial(address)?;
            round_trips(&socket, 1)?;
            Ok(socket)
        });
        opened.collect::<Result<Vec<_>>>()
    })?;
    let [socket] = <[Socket; 1]>::try_from(open(lab, 1)?)
        .ok()
        .context("one connection")?;
    let talk = Conversation::start(socket, Pace::Messages(100, PAUSE))?;
    thread::sleep(HELD);
    event.happen(lab, || ())?;
    thread::sleep(settle);
    let taken = taken_over(lab, event)?;
    let summary = talk.finish();
    let cut = idle.iter().filter(|it| round_trips(*it, 1).is_err());
    let cut = cut.count() + usize::from(summary.is_err());
    let pause = summary.map(|it| it.longest_gap.saturating_sub(PAUSE))?;
    Ok(vec![
        Figure::new("cut or wrong", "connections", cut as f64),
        Figure::millis("taken over in", taken),
        Figure::millis("pause", pause),
    ])
}

/// Returns the time in which the last process has taken everything over from the one before, as it has logged that.
fn taken_over(lab: &mut Lab, event: Event) -> Result<Duration> {
    let Event::Replaced(side) = event else {
        return Ok(Duration::ZERO);
    };
    let log = side.daemon(lab)?.log();
    let number = log.rsplit_once("took_ms=").map(|(_, rest)| rest);
    let number = number.and_then(|rest| rest.split_whitespace().next());
    let number = number.context("no process has taken over")?;
    Ok(Duration::from_millis(number.parse()?))
}
