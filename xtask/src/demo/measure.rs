//! The tunnel beside a direct connection: the same work over both paths, in turns, in one run.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use tunnel_tests::client::{self, median};
use tunnel_tests::target::Behaviour;

use super::story::Evidence;

/// Number of turns of each path; the turns alternate, so that both meet the same disturbances.
const TURNS: usize = 3;
const CONNECTIONS: usize = 50;
const ROUND_TRIPS: usize = 500;
const BYTES: u64 = 64 << 20;

/// A connected stream.
pub(super) trait Duplex: Read + Write {
    /// Ends the sending half.
    fn finish(&self) -> std::io::Result<()>;
}

impl Duplex for TcpStream {
    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Duplex for UnixStream {
    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Opens a connection to a target on the worker.
pub(super) type Open<'a> = dyn Fn(Behaviour) -> Result<Box<dyn Duplex>> + Sync + 'a;

/// One path, with one value per turn.
#[derive(Default)]
struct Way {
    /// Microseconds.
    first_byte: Vec<f64>,
    /// Microseconds.
    round_trip: Vec<f64>,
    /// Megabytes a second.
    download: Vec<f64>,
    /// Megabytes a second.
    upload: Vec<f64>,
}

impl Way {
    fn measure(&mut self, open: &Open<'_>) -> Result<()> {
        let mut first_bytes = (0..CONNECTIONS)
            .map(|_| {
                let start = Instant::now();
                client::round_trips(&mut open(Behaviour::Echo)?, 1)?;
                Ok(start.elapsed())
            })
            .collect::<Result<Vec<_>>>()?;
        self.first_byte.push(micros(median(&mut first_bytes)));
        let mut round_trips = client::round_trips(open(Behaviour::Echo)?, ROUND_TRIPS)?;
        self.round_trip.push(micros(median(&mut round_trips)));
        let download = client::download(open(Behaviour::Source)?, BYTES)?;
        self.download.push(download.megabytes_per_second());
        let upload = client::upload(open(Behaviour::Sink)?, BYTES, |stream| stream.finish())?;
        self.upload.push(upload.megabytes_per_second());
        Ok(())
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Wrapper that runs a measurement in its place, for example in a namespace.
pub(super) type Place<'a> = dyn Fn(&mut (dyn FnMut() -> Result<()> + Send)) -> Result<()> + 'a;

/// Measures `direct` and `tunnel` in turns and adds a table; compares every byte on the way.
pub(super) fn compare(
    evidence: &mut Evidence,
    direct: (&Place<'_>, &Open<'_>),
    tunnel: (&Place<'_>, &Open<'_>),
) -> Result<()> {
    let (mut a, mut b) = (Way::default(), Way::default());
    for _ in 0..TURNS {
        direct.0(&mut || a.measure(direct.1))?;
        tunnel.0(&mut || b.measure(tunnel.1))?;
    }
    evidence.note(format!("{:<32}{:>24}{:>24}", "", "direct", "tunnel"));
    let mut row = |name: &str, unit: &str, direct: &mut [f64], tunnel: &mut [f64]| {
        let (direct, tunnel) = (spread(direct, unit), spread(tunnel, unit));
        evidence.note(format!("{name:<32}{direct:>24}{tunnel:>24}"));
    };
    row(
        "connect, send and receive a byte",
        "µs",
        &mut a.first_byte,
        &mut b.first_byte,
    );
    row(
        "round trip of a byte",
        "µs",
        &mut a.round_trip,
        &mut b.round_trip,
    );
    row("download", "MB/s", &mut a.download, &mut b.download);
    row("upload", "MB/s", &mut a.upload, &mut b.upload);
    evidence.note(format!(
        "the middle of {TURNS} turns (least-most); {} MiB each way and turn, every byte compared",
        BYTES >> 20
    ));
    Ok(())
}

/// Returns the median, and in brackets the minimum and the maximum.
fn spread(samples: &mut [f64], unit: &str) -> String {
    samples.sort_by(f64::total_cmp);
    let at = |index: usize| samples.get(index).copied().unwrap_or_default();
    let (middle, last) = (samples.len() / 2, samples.len().saturating_sub(1));
    format!("{:.0} {unit} ({:.0}-{:.0})", at(middle), at(0), at(last))
}
