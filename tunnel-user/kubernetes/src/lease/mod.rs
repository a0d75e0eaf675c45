//! Leases by which agents know the number of servers: each server holds one for each of its ids
//! ([`LeaseHolder`]), agents count the held ones ([`LeaseCounter`]).
//!
//! Their format is that of proxy-server, which may run beside ours.

mod counter;
mod holder;
mod observer;

pub use counter::LeaseCounter;
pub use holder::LeaseHolder;
pub use observer::{LeaseObserver, Outcome};

use std::time::{Duration, SystemTime};

use k8s_openapi::api::coordination::v1::Lease;

/// Returns the time from `now` for which `lease` is held. `None` when it is not.
fn held_for(lease: &Lease, now: SystemTime) -> Option<Duration> {
    let spec = lease.spec.as_ref()?;
    let renewed = spec.renew_time.as_ref().or(spec.acquire_time.as_ref())?;
    let duration = u64::try_from(spec.lease_duration_seconds?).ok()?;
    let end = SystemTime::from(renewed.0) + Duration::from_secs(duration);
    end.duration_since(now).ok().filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::coordination::v1::LeaseSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
    use k8s_openapi::jiff::Timestamp;
    use serde_json::{Value, json};
    use tempfile::NamedTempFile;
    use tunnel_fake_kubernetes::FakeKubernetes;

    use super::*;
    use crate::client;
    use cpc_config::kubernetes::Access;

    pub(super) async fn client_of(api: &FakeKubernetes) -> kube::Client {
        let kubeconfig = NamedTempFile::new().unwrap();
        std::fs::write(kubeconfig.path(), api.kubeconfig()).unwrap();
        let access = Access {
            kubeconfig: Some(kubeconfig.path().into()),
            rate: None,
        };
        client(&access).await.unwrap()
    }

    /// Returns the API's form of a lease that was renewed some seconds ago.
    pub(super) fn lease(name: &str, label: &str, ago: i64, seconds: i32) -> Value {
        let renewed = Timestamp::now() - Duration::from_secs(ago.unsigned_abs());
        json!({
            "metadata": {"name": name, "namespace": "n", "labels": {"app": label}},
            "spec": {
                "holderIdentity": name,
                "leaseDurationSeconds": seconds,
                "renewTime": renewed.to_string(),
            },
        })
    }

    #[test]
    fn a_lease_is_held_for_its_duration() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let micro = |seconds| Some(MicroTime(Timestamp::from_second(seconds).unwrap()));
        let mut spec = LeaseSpec {
            acquire_time: micro(100),
            lease_duration_seconds: Some(30),
            ..LeaseSpec::default()
        };
        let held = |spec: &LeaseSpec, now| {
            let lease = Lease {
                spec: Some(spec.clone()),
                ..Lease::default()
            };
            held_for(&lease, at(now)).map(|left| left.as_secs())
        };
        assert_eq!(held(&spec, 110), Some(20));
        assert_eq!(held(&spec, 130), None);
        spec.renew_time = micro(115);
        assert_eq!(held(&spec, 130), Some(15));
        spec.lease_duration_seconds = Some(-1);
        assert_eq!(held(&spec, 115), None);
        spec.lease_duration_seconds = None;
        assert_eq!(held(&spec, 115), None);
        assert_eq!(held_for(&Lease::default(), at(0)), None);
    }
}
