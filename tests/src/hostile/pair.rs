//! The well-behaved pair that works beside a misdeed: worker 1 with its agent, clients that ask
//! without a pause through the redirect and through HTTP CONNECT, and one long stream.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, address};
use crate::ledger::Ledger;
use crate::load::{Attempt, Load, ask, ask_through};
use crate::pattern::{self, Checker};
use crate::target::Behaviour;

/// Clients; every other one asks through HTTP CONNECT.
const CLIENTS: usize = 4;
/// A piece of the long stream, there and back.
const PIECE: usize = 16 * 1024;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(5);
/// Time after which a piece of the long stream counts as lost.
const PATIENCE: Duration = Duration::from_secs(12);
/// Address of the ledger, which the agent may dial.
pub(super) const LEDGER: u16 = 8001;

/// The pair at work.
#[derive(Debug)]
pub(super) struct Pair {
    load: Load,
    ledger: Ledger,
    long: Long,
}

/// All that it did.
pub(super) struct Done {
    pub(super) attempts: Vec<Attempt>,
    /// Bytes of the long stream, all of them right, there and back.
    pub(super) bytes: u64,
}

impl Pair {
    pub(super) fn start(lab: &Lab) -> Result<Self> {
        let target = SocketAddr::from((address::node(1), LEDGER));
        let ledger = Ledger::start(&lab.workers[0].netns, target, "w1")?;
        let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
        let load = Load::start(&lab.control_plane, CLIENTS, move |request| {
            let odd = request.starts_with(['1', '3']);
            match odd {
                true => ask_through(&proxy, target, request),
                false => ask(target, request),
            }
        })?;
        let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
        let connect = || Ok(TcpStream::connect(echo)?);
        let long = Long::start(lab.control_plane.netns.enter(connect)?)?;
        Ok(Self { load, ledger, long })
    }

    /// Returns the number of bytes of the long stream that have come back.
    pub(super) fn bytes(&self) -> u64 {
        self.long.bytes.load(Ordering::Relaxed)
    }

    /// Ends the pair.
    ///
    /// # Errors
    ///
    /// The long stream broke or came back changed, an answer was another's, or a request that was
    /// answered did not arrive exactly once.
    pub(super) fn finish(self) -> Result<Done> {
        let attempts = self.load.stop();
        let bytes = self.long.finish()?;
        let mut arrived = self.ledger.requests();
        arrived.sort_unstable();
        for attempt in &attempts {
            let Ok(answer) = &attempt.result else {
                continue;
            };
            let expected = format!("w1 {}", attempt.request);
            ensure!(*answer == expected, "{answer:?} came for {expected:?}");
            let from = arrived.partition_point(|it| *it < attempt.request);
            let to = arrived.partition_point(|it| *it <= attempt.request);
            ensure!(
                to - from == 1,
                "{:?} ran {} times",
                attempt.request,
                to - from
            );
        }
        ensure!(
            arrived.len() <= attempts.len(),
            "{} requests arrived, {} were made",
            arrived.len(),
            attempts.len()
        );
        Ok(Done { attempts, bytes })
    }
}

/// A connection that lasts as long as the pair.
#[derive(Debug)]
struct Long {
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Long {
    fn start(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let (stop, bytes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counted) = (stop.clone(), bytes.clone());
        let thread = thread::spawn(move || {
            let result = echo(stream, &stopped, &counted);
            let begun = counted.load(Ordering::Relaxed);
            result.with_context(|| format!("the long stream broke after {begun} bytes"))
        });
        Ok(Self {
            stop,
            bytes,
            thread,
        })
    }

    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(self.bytes.load(Ordering::Relaxed))
    }
}

fn echo(mut stream: TcpStream, stop: &AtomicBool, bytes: &AtomicU64) -> Result<()> {
    let mut checker = Checker::default();
    let mut buffer = vec![0; PIECE];
    while !stop.load(Ordering::Relaxed) {
        pattern::fill(checker.position(), &mut buffer);
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        checker.update(&buffer)?;
        bytes.store(checker.position(), Ordering::Relaxed);
        thread::sleep(PAUSE);
    }
    // An end in order both ways: nothing more comes, and nothing is reset.
    stream.shutdown(std::net::Shutdown::Write)?;
    ensure!(stream.read(&mut buffer)? == 0, "bytes that nobody sent");
    Ok(())
}

/// Results of the requests within a window.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    pub(super) requests: usize,
    pub(super) failures: usize,
    pub(super) p50: Duration,
    pub(super) p99: Duration,
}

impl Window {
    /// Returns the results of the requests between `from` and `to`.
    pub(super) fn of(attempts: &[Attempt], from: Instant, to: Instant) -> Self {
        let within = |attempt: &&Attempt| attempt.end >= from && attempt.start <= to;
        let attempts: Vec<_> = attempts.iter().filter(within).collect();
        let mut times: Vec<_> = attempts.iter().map(|it| it.end - it.start).collect();
        times.sort_unstable();
        let at = |part: usize| {
            let index = (times.len() * part / 100).min(times.len().saturating_sub(1));
            times.get(index).copied().unwrap_or_default()
        };
        Self {
            requests: attempts.len(),
            failures: attempts.iter().filter(|it| it.result.is_err()).count(),
            p50: at(50),
            p99: at(99),
        }
    }
}
