//! Access to the Kubernetes API: by a kubeconfig, or as a pod.

use std::path::PathBuf;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use kube::client::ClientBuilder;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::Status;
use kube::{Client, Config, Error};
use tokio::time::timeout;
use tower::limit::RateLimitLayer;

use cpc_config::kubernetes::{Access, Rate};

/// Timeout of the connection to an API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of the answer to a request.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Name in the API server's audit log.
const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("cpc/", env!("CARGO_PKG_VERSION")));

/// Reason why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The kubeconfig is unusable.
    #[error("kubeconfig {}: {why}", path.display())]
    Kubeconfig {
        /// Path of the file.
        path: PathBuf,
        /// Fault of the file.
        why: Box<KubeconfigError>,
    },
    /// The process does not run in a pod.
    #[error("this is no pod ({0}): name a kubeconfig, or run as a pod with a service account")]
    Pod(InClusterError),
    /// The kubeconfig or the files of the pod give no client.
    #[error("the Kubernetes API can't be used: {0}")]
    Client(Error),
    /// The rate allows no request.
    #[error(
        "{per_second} requests per second with a burst of {burst} allow none; both must be more than 0"
    )]
    Rate {
        /// Requests per second.
        per_second: f32,
        /// Requests at once.
        burst: u32,
    },
}

impl From<InClusterError> for AccessError {
    fn from(why: InClusterError) -> Self {
        Self::Pod(why)
    }
}

impl From<Error> for AccessError {
    fn from(why: Error) -> Self {
        Self::Client(why)
    }
}

/// Creates a client of the API, without a request.
///
/// # Errors
/// [`AccessError`].
pub async fn client(access: &Access) -> Result<Client, AccessError> {
    let mut config = match &access.kubeconfig {
        Some(path) => by_kubeconfig(path)
            .await
            .map_err(|why| AccessError::Kubeconfig {
                path: path.clone(),
                why: why.into(),
            })?,
        None => Config::incluster()?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Who asks knows better when to ask again.
    config.default_retry = false;
    config.headers.push((header::USER_AGENT, USER_AGENT));
    let builder = ClientBuilder::try_from(config)?;
    Ok(match access.rate {
        Some(rate) => builder.with_layer(&layer(rate)?).build(),
        None => builder.build(),
    })
}

async fn by_kubeconfig(path: &PathBuf) -> Result<Config, KubeconfigError> {
    let file = Kubeconfig::read_from(path)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await
}

fn layer(rate: Rate) -> Result<RateLimitLayer, AccessError> {
    let Rate { per_second, burst } = rate;
    // Refuses what is no number, too.
    let period = Duration::try_from_secs_f32(burst as f32 / per_second);
    match period {
        Ok(period) if burst > 0 && !period.is_zero() => {
            Ok(RateLimitLayer::new(burst.into(), period))
        }
        _ => Err(AccessError::Rate { per_second, burst }),
    }
}

/// Failure of a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The API server refused the request.
    #[error("{} ({} {})", .0.message, .0.code, .0.reason)]
    Refused(Box<Status>),
    /// The API server did not answer in time.
    #[error(
        "the API server did not answer within {}",
        humantime::format_duration(CALL_TIMEOUT)
    )]
    Late,
    /// The API server was not reached, or its answer was not understood.
    #[error("{}", chain(.0))]
    Failed(Error),
}

impl CallError {
    /// Whether a retry a moment later may succeed.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Refused(status) => status.code == 429 || status.code >= 500,
            Self::Late | Self::Failed(_) => true,
        }
    }

    /// Whether this request alone is at fault: Bad Request, Content Too Large, Unprocessable.
    pub(super) fn is_bad_request(&self) -> bool {
        matches!(self, Self::Refused(status) if matches!(status.code, 400 | 413 | 422))
    }

    /// Whether the requested object does not exist.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused(status) if status.is_not_found())
    }

    /// Whether another client has changed the object meanwhile.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused(status) if status.is_conflict())
    }
}

/// Returns the API server's answer for metrics: status code and reason. `None` when there was none.
pub(super) fn outcome<T>(answer: &Result<T, CallError>) -> Option<(u16, &str)> {
    match answer {
        Ok(_) => Some((200, "")),
        Err(CallError::Refused(status)) => Some((status.code, &status.reason)),
        Err(CallError::Late | CallError::Failed(_)) => None,
    }
}

/// Waits for the answer to `request`, at most [`CALL_TIMEOUT`].
///
/// # Errors
/// [`CallError`].
pub(super) async fn call<T>(
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, CallError> {
    match timeout(CALL_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(CallError::Late),
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::Api(status) => Self::Refused(status),
            error => Self::Failed(error),
        }
    }
}

/// Returns the innermost cause, which has the fault; the outer ones only tell the path of the error.
fn chain(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    format!("the API server was not reached: {cause}")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use k8s_openapi::api::coordination::v1::Lease;
    use kube::Api;
    use tunnel_fake_kubernetes::FakeKubernetes;

    use super::*;

    async fn limited(api: &FakeKubernetes, per_second: f32) -> Result<Client, AccessError> {
        let kubeconfig = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kubeconfig.path(), api.kubeconfig()).unwrap();
        let rate = Rate {
            per_second,
            burst: 2,
        };
        let access = Access {
            kubeconfig: Some(kubeconfig.path().into()),
            rate: Some(rate),
        };
        client(&access).await
    }

    #[tokio::test]
    async fn requests_are_bounded_by_the_rate() {
        let api = FakeKubernetes::start().unwrap();
        for none in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let error = limited(&api, none).await.err();
            assert!(matches!(error, Some(AccessError::Rate { .. })), "{none}");
        }
        let leases: Api<Lease> = Api::namespaced(limited(&api, 20.0).await.unwrap(), "n");
        let start = Instant::now();
        for _ in 0..6 {
            call(leases.get_opt("x")).await.unwrap();
        }
        // Two at once, each 100 ms.
        assert!(start.elapsed() >= Duration::from_millis(200));
        assert_eq!(api.count("leases/x"), 6);
    }

    #[tokio::test]
    async fn errors_name_their_cause() {
        let access = Access {
            kubeconfig: Some("/nowhere/kubeconfig".into()),
            rate: None,
        };
        let error = client(&access).await.err().unwrap().to_string();
        assert!(error.contains("/nowhere/kubeconfig"), "{error}");

        let missing = std::env::VarError::NotPresent;
        let error = InClusterError::ReadEnvironmentVariable(missing.clone());
        let text = format!("{:#}", anyhow::Error::new(AccessError::from(error)));
        assert_eq!(text.matches(&missing.to_string()).count(), 1, "{text}");

        let api = FakeKubernetes::start().unwrap();
        let leases: Api<Lease> = Api::namespaced(limited(&api, 100.0).await.unwrap(), "n");
        api.fail_with(403);
        let refused = call(leases.get("x")).await.unwrap_err();
        assert_eq!(refused.to_string(), "the fake says 403 (403 Told)");
        assert!(!refused.may_pass());
        drop(api);
        let lost = call(leases.get("x")).await.unwrap_err();
        assert!(lost.to_string().contains("not reached"), "{lost}");
        assert!(lost.may_pass());
    }
}
