//! Health, metrics and status over HTTP, on loopback unless configured otherwise.
//!
//! | path | answer |
//! | --- | --- |
//! | `/healthz`, `/livez` | 200 while the process turns |
//! | `/readyz` | 200 when it can do its job, else 503 and why not |
//! | `/metrics` | Prometheus text, or OpenMetrics, by `Accept`; compressed, by `Accept-Encoding` |
//! | `/status` | JSON, what `cpc status` prints |
//! | `PUT /log` | puts the body in force as log filter |

mod listener;
pub mod status;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{MethodRouter, get, put};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tower_http::compression::CompressionLayer;

use crate::audit::events as audit;
use crate::exposition::Format;
use crate::logging::LogHandle;
use crate::metrics::ours;
use crate::process;
use cpc_host::descriptors;
use cpc_host::report::report;

/// Pages of a listener.
pub type Pages = Router;

/// Counter of connections that were refused because no file descriptor was left.
#[derive(Debug)]
struct Refused;

impl Collector for Refused {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(descriptors::refused());
        let (name, help) = (
            "connections_without_descriptor",
            "Connections that were refused because no file descriptor was left",
        );
        let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
        counter.encode(metric)
    }
}

/// The parts of health and status that differ between server and agent.
pub trait Source: Send + Sync {
    /// Whether the process can do its job.
    ///
    /// # Errors
    /// The reason why not.
    fn ready(&self) -> Result<(), String>;
    /// Returns the status as JSON.
    fn status(&self) -> Pin<Box<dyn Future<Output = serde_json::Value> + Send + '_>>;
    /// Updates metrics whose values are read elsewhere. Called before metrics are written.
    fn refresh(&self);
}

/// The admin service.
#[derive(Clone)]
pub struct Admin {
    registry: Arc<Registry>,
    log: LogHandle,
    source: Arc<dyn Source>,
}

impl Admin {
    /// Creates the service of a process.
    pub fn new(mut registry: Registry, log: LogHandle, source: Arc<dyn Source>) -> Self {
        log.register(ours(&mut registry));
        ours(&mut registry).register_collector(Box::new(Refused));
        process::register(&mut registry);
        Self {
            registry: Arc::new(registry),
            log,
            source,
        }
    }

    /// Whether the process can do its job.
    ///
    /// # Errors
    /// The reason why not.
    pub fn ready(&self) -> Result<(), String> {
        self.source.ready()
    }

    /// Returns the router of all pages.
    pub fn router(self) -> Router {
        Router::new()
            .route("/metrics", metrics_page())
            .route("/status", get(status_page))
            .route("/log", put(set_log))
            .with_state(self.clone())
            .merge(self.health_router())
    }

    /// Returns the router of health alone, for a port that unauthenticated peers reach.
    pub fn health_router(self) -> Router {
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(self)
    }
}

/// Serves `router` on `listener` without end, to at most `max` connections at once.
pub async fn serve(listener: std::net::TcpListener, router: Router, max: usize) {
    let served = async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener::Listener::new(listener, max), router).await
    };
    if let Err(error) = served.await {
        tracing::error!(error = report(&error), "an HTTP listener has ended");
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    match admin.ready() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

/// Returns the handler of the metrics page.
pub fn metrics_page() -> MethodRouter<Admin> {
    get(write_metrics).layer(CompressionLayer::new())
}

async fn write_metrics(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    admin.source.refresh();
    let accept = headers.get_all(header::ACCEPT).into_iter();
    let format = Format::accepted(accept.filter_map(|value| value.to_str().ok()));
    match format.page(&admin.registry) {
        Ok(page) => ([(header::CONTENT_TYPE, format.content_type())], page).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn status_page(State(admin): State<Admin>) -> Json<serde_json::Value> {
    Json(admin.source.status().await)
}

async fn set_log(State(admin): State<Admin>, filter: String) -> Response {
    match admin.log.set(filter.trim()) {
        Ok(()) => {
            tracing::info!(filter = filter.trim(), "log filter changed");
            audit::changed("log filter", Ok(()));
            "ok\n".into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}
