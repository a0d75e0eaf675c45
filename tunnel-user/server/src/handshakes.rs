//! Handshakes at one port: admits them by their source, and counts those that fail.

use std::net::IpAddr;
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use cpc_config::server::HandshakesConfig;
use cpc_host::source_limiter::{HandshakePermit, Overload, SourceLimiter, Verdict};

/// Reason why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeFailure {
    /// TLS, certificates included.
    Tls,
    /// The certificate's identity.
    Identity,
    /// The peer gave it up.
    Peer,
    /// The peer did not finish in time.
    Timeout,
    /// All places were taken.
    Overload,
    /// The share of its source was taken.
    SourceShare,
    /// The source of the peer began too many.
    SourceRate,
}

impl HandshakeFailure {
    /// All of them, in order.
    pub(super) const ALL: [Self; 7] = [
        Self::Tls,
        Self::Identity,
        Self::Peer,
        Self::Timeout,
        Self::Overload,
        Self::SourceShare,
        Self::SourceRate,
    ];

    /// Metric label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Identity => "identity",
            Self::Peer => "peer",
            Self::Timeout => "timeout",
            Self::Overload => "overload",
            Self::SourceShare => "source_share",
            Self::SourceRate => "source_rate",
        }
    }
}

impl From<Overload> for HandshakeFailure {
    fn from(crowded: Overload) -> Self {
        match crowded {
            Overload::Full => Self::Overload,
            Overload::Share => Self::SourceShare,
            Overload::Rate => Self::SourceRate,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    why: &'static str,
}

/// Handshakes that failed, by [`HandshakeFailure`].
#[derive(Clone, Debug, Default)]
pub(super) struct FailureCounters(Family<FailureLabels, Counter>);

impl FailureCounters {
    /// Registers them as `name`.
    pub(super) fn register(&self, registry: &mut Registry, name: &str, help: &str) {
        for why in HandshakeFailure::ALL {
            // A counter that begins at its first event hides that event from a rate.
            drop(self.0.get_or_create(&FailureLabels { why: why.label() }));
        }
        registry.register(name, help, self.0.clone());
    }

    /// Counts one.
    pub(super) fn count(&self, why: HandshakeFailure) {
        self.0
            .get_or_create(&FailureLabels { why: why.label() })
            .inc();
    }
}

/// Limits the handshakes of one port, on all shards.
#[derive(Clone, Debug)]
pub struct HandshakeLimiter {
    sources: SourceLimiter,
    failures: FailureCounters,
}

impl HandshakeLimiter {
    /// The limits of a port. `failures` counts the handshakes that fail there.
    pub(super) fn new(limits: &HandshakesConfig, failures: FailureCounters) -> Self {
        Self {
            sources: SourceLimiter::new(limits.bounds(), Instant::now()),
            failures,
        }
    }

    /// Decides on a peer. `is_proven`: TCP or a Retry token has proven its address.
    pub(super) fn judge(&self, address: IpAddr, is_proven: bool) -> Verdict {
        self.sources.judge(address, is_proven, Instant::now())
    }

    /// Admits a peer whose address TCP has proven.
    ///
    /// # Errors
    /// [`Overload`].
    pub fn admit(&self, address: IpAddr) -> Result<HandshakePermit, Overload> {
        match self.judge(address, true) {
            Verdict::Enter(place) => Ok(place),
            Verdict::Refuse(why) => Err(why),
            // There is nothing left to prove.
            Verdict::Prove => Err(Overload::Rate),
        }
    }

    /// The number of handshakes under way.
    pub(super) fn in_progress(&self) -> usize {
        self.sources.in_use()
    }

    /// Counts a failure.
    pub fn failed(&self, why: HandshakeFailure) {
        self.failures.count(why);
    }
}
