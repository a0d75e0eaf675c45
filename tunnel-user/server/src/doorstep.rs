//! Strangers at a port until they are known: who may begin, and what is counted of those who fail.

use std::net::IpAddr;
use std::time::Instant;

use super::metrics::Failures;
use cpc_config::server::HandshakesConfig;
use cpc_host::sources::{Crowded, Place, Sources, Verdict};

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// TLS, certificates included.
    Tls,
    /// The certificate's identity.
    Identity,
    /// The peer thought better of it.
    Peer,
    /// It was not finished in time.
    Timeout,
    /// All places were taken.
    Overload,
    /// The share of its source was taken.
    SourceShare,
    /// Its source began too many.
    SourceRate,
}

impl Why {
    /// All there are, in their order.
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

impl From<Crowded> for Why {
    fn from(crowded: Crowded) -> Self {
        match crowded {
            Crowded::Full => Self::Overload,
            Crowded::Share => Self::SourceShare,
            Crowded::Rate => Self::SourceRate,
        }
    }
}

/// One port's, on all shards.
#[derive(Clone, Debug)]
pub(super) struct Doorstep {
    sources: Sources,
    failures: Failures,
}

impl Doorstep {
    /// Of a port whose failed handshakes count as `failures`.
    pub(super) fn new(limits: &HandshakesConfig, failures: Failures) -> Self {
        Self {
            sources: Sources::new(limits.bounds(), Instant::now()),
            failures,
        }
    }

    /// What to do with a stranger whose address nothing has proven yet, or a token that only he has.
    pub(super) fn judge(&self, address: IpAddr, is_proven: bool) -> Verdict {
        self.sources.judge(address, is_proven, Instant::now())
    }

    /// Takes in a stranger whose address TCP has proven.
    ///
    /// # Errors
    /// [`Crowded`].
    pub(super) fn enter(&self, address: IpAddr) -> Result<Place, Crowded> {
        match self.judge(address, true) {
            Verdict::Enter(place) => Ok(place),
            Verdict::Refuse(why) => Err(why),
            // There is nothing left to prove.
            Verdict::Prove => Err(Crowded::Rate),
        }
    }

    /// Handshakes under way.
    pub(super) fn inside(&self) -> usize {
        self.sources.inside()
    }

    /// Counts a failure.
    pub(super) fn failed(&self, why: Why) {
        self.failures.count(why);
    }
}
