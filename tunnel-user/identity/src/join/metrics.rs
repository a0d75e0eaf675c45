//! What the desk counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    kind: &'static str,
    outcome: &'static str,
}

/// Requests for certificates, by what became of them.
#[derive(Clone, Debug, Default)]
pub struct JoinMetrics(Family<Labels, Counter>);

impl JoinMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        for kind in ["join", "renewal"] {
            for outcome in ["issued", "refused", "failed"] {
                // A counter that begins at its first event hides that event from a rate.
                drop(self.0.get_or_create(&Labels { kind, outcome }));
            }
        }
        let help = "Requests for certificates of agents";
        registry.register("certificate_requests", help, self.0.clone());
    }

    /// Somebody wanted to join. Nothing was asked where the handshake failed, or it took too long.
    pub fn join(&self, outcome: Outcome) {
        self.count("join", outcome);
    }

    /// An agent wanted another certificate.
    pub fn renewal(&self, outcome: Outcome) {
        self.count("renewal", outcome);
    }

    fn count(&self, kind: &'static str, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Issued => "issued",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
        };
        self.0.get_or_create(&Labels { kind, outcome }).inc();
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There is a certificate.
    Issued,
    /// There is none, by the rules.
    Refused,
    /// There is none, and nobody wanted that.
    Failed,
}
