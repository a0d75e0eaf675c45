use std::io;
use std::sync::Arc;

use tracing::{info, warn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, fmt};

use super::fields::Network;
use super::*;

const RATES: Rates = Rates {
    source: rate(3, Duration::from_secs(10)),
    identities: rate(5, Duration::from_secs(1)),
    networks: rate(4, Duration::from_secs(1)),
};

fn identity(name: &str) -> Source<'_> {
    Source::Identity(name)
}

fn address(text: &str) -> Source<'_> {
    Source::Network(Network::Prefix(text.parse().unwrap()))
}

#[test]
fn a_source_has_a_burst_and_then_a_rate() {
    let start = Instant::now();
    let throttle = Throttle::new(RATES, start);
    let admits = |at| throttle.admits(1, "x", &identity("w1"), start + Duration::from_secs(at));
    assert_eq!([0; 5].map(admits), [true, true, true, false, false]);
    assert!(!admits(9));
    assert!(admits(10));
    assert!(!admits(11));
    let suppressed = throttle.take_suppressed();
    let expected = Suppressed {
        kind: "x".into(),
        lines: 4,
        last: "w1".into(),
    };
    assert_eq!(suppressed, [expected]);
    assert_eq!(throttle.take_suppressed(), []);
    assert_eq!(throttle.total(), 4);
}

#[test]
fn one_source_hides_no_other_and_one_kind_no_other() {
    let start = Instant::now();
    let throttle = Throttle::new(RATES, start);
    for _ in 0..1000 {
        throttle.admits(1, "x", &identity("w1"), start);
    }
    assert!(throttle.admits(1, "x", &identity("w2"), start));
    assert!(throttle.admits(2, "y", &identity("w1"), start));
}

#[test]
fn many_sources_of_a_kind_share_a_bound() {
    let start = Instant::now();
    let throttle = Throttle::new(RATES, start);
    let many = (0..1000).map(|n| format!("10.{}.{}.1", n / 250, n % 250));
    let admitted = many.filter(|text| throttle.admits(1, "x", &address(text), start));
    assert_eq!(admitted.count(), 4);
    let many = (0..1000).map(|n| format!("w{n}"));
    let admitted = many.filter(|name| throttle.admits(2, "y", &identity(name), start));
    assert_eq!(admitted.count(), 5);
    assert!(throttle.admits(1, "x", &address("10.9.9.9"), start + Duration::from_secs(1)));
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl io::Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines as a subscriber writes them, through the filter.
fn written(log: impl FnOnce()) -> (Vec<String>, Throttle) {
    let lines = Shared::default();
    let throttle = Throttle::new(RATES, Instant::now());
    let layer = fmt::layer()
        .with_ansi(false)
        .with_writer({
            let lines = lines.clone();
            move || lines.clone()
        })
        .with_filter(throttle.clone());
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::with_default(subscriber, log);
    let bytes = lines.0.lock().unwrap().clone();
    let text = String::from_utf8(bytes).unwrap();
    (text.lines().map(str::to_owned).collect(), throttle)
}

#[test]
fn lines_are_throttled_by_whom_they_name_whatever_else_they_say() {
    let (lines, throttle) = written(|| {
        for n in 0..100 {
            // The port and the error change; the network does not.
            let remote = std::net::SocketAddr::from(([10, 0, 0, 1], 1000 + n));
            warn!(%remote, error = n, "handshake failed");
        }
        for n in 0..2 {
            info!(agent = %format_args!("w{n}"), remote = "10.0.0.1:7", "agent is draining");
        }
    });
    assert_eq!(lines.len(), 3 + 2, "{lines:?}");
    let suppressed = throttle.take_suppressed();
    assert_eq!(suppressed.len(), 1);
    assert_eq!(
        (
            &*suppressed[0].kind,
            suppressed[0].lines,
            &*suppressed[0].last
        ),
        ("handshake failed", 97, "10.0.0.1")
    );
}

#[test]
fn a_network_of_ipv6_is_one_source_and_listeners_are_apart() {
    let (lines, _) = written(|| {
        for listener in ["tunnel", "join"] {
            for n in 0..50 {
                info!(event = "peer_refused", listener, remote = %format_args!("[2001:db8::{n:x}]:1"));
            }
        }
    });
    assert_eq!(lines.len(), 2 * 3, "{lines:?}");
}

#[test]
fn access_debug_and_what_tells_of_left_out_lines_pass() {
    let (lines, throttle) = written(|| {
        for _ in 0..20 {
            info!(target: ACCESS, client = "10.0.0.1:7", "connection");
            warn!(suppressed = 7, "lines left out");
            tracing::debug!(agent = "w1", "detail");
        }
    });
    assert_eq!(lines.len(), 60);
    assert_eq!(throttle.total(), 0);
}

#[test]
fn long_values_are_looked_at_in_part() {
    let long = "\u{e4}".repeat(10_000);
    let (_, throttle) = written(|| {
        for _ in 0..4 {
            info!(agent = long, "{long}");
        }
    });
    let suppressed = throttle.take_suppressed();
    assert!(suppressed[0].kind.len() <= 256 && suppressed[0].last.len() <= 256);
}
