//! The part of the Kubernetes API that the connector uses, over plain HTTP: token reviews, nodes
//! and leases. Written from the API's documentation, not from the connector's requests.
//!
//! It serves on a thread of its own until it is dropped, so that tests with and without a runtime
//! may use it, in any network namespace: the caller opens the socket.

mod lease;
mod node;
mod review;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

pub use review::Review;

/// A running API server.
pub struct FakeKubernetes {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// State that the handlers share.
struct Shared {
    state: Mutex<Inner>,
    /// The version of the last change, for watches.
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    reviews: review::Reviews,
    leases: lease::Leases,
    nodes: node::Nodes,
    requests: Vec<String>,
    failure: Option<u16>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FakeKubernetes {
    /// Serves on a free port of loopback.
    ///
    /// # Errors
    /// What the system says.
    pub fn start() -> io::Result<Self> {
        Self::serve(TcpListener::bind("127.0.0.1:0")?)
    }

    /// Serves on `listener`.
    ///
    /// # Errors
    /// What the system says.
    pub fn serve(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            version: watch::Sender::new(0),
        });
        let router = router(shared.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("kubernetes".into());
        let thread = thread.spawn(move || {
            let served = async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(listener, router).await
            };
            runtime.block_on(async {
                tokio::select! {
                    _ = served => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self {
            address,
            shared,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Returns the address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns a kubeconfig for this API.
    pub fn kubeconfig(&self) -> String {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        config.to_string()
    }

    /// Fails every request with this status until further notice.
    pub fn fail_with(&self, status: impl Into<Option<u16>>) {
        self.shared.lock().failure = status.into();
    }

    /// Returns the requests so far: `GET /path?query`.
    pub fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }

    /// Returns the number of requests that contain `text`.
    pub fn count(&self, text: &str) -> usize {
        let requests = self.requests();
        requests.iter().filter(|asked| asked.contains(text)).count()
    }

    /// Sets the review of `token`.
    pub fn set_token(&self, token: &str, review: Review) {
        self.shared.lock().reviews.set(token, review);
    }

    /// Makes or changes a node: `metadata.name` must be there.
    pub fn put_node(&self, node: Value) {
        self.shared.lock().nodes.put(node);
    }

    /// Makes or changes a node that has one address.
    pub fn put_node_at(&self, name: &str, address: IpAddr) {
        self.put_node(json!({
            "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        }));
    }

    /// Deletes a node, if it is there.
    pub fn delete_node(&self, name: &str) {
        self.shared.lock().nodes.remove(name);
    }

    /// Returns all leases of all namespaces.
    pub fn leases(&self) -> Vec<Value> {
        self.shared.lock().leases.all()
    }

    /// Makes or changes a lease: `metadata.name` and `metadata.namespace` must be there.
    pub fn put_lease(&self, lease: Value) {
        let version = self.shared.lock().leases.put(lease);
        self.shared.version.send_replace(version);
    }

    /// Deletes a lease, if it is there.
    pub fn delete_lease(&self, namespace: &str, name: &str) {
        let version = self.shared.lock().leases.remove(namespace, name);
        self.shared.version.send_replace(version);
    }
}

impl Drop for FakeKubernetes {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn router(shared: Arc<Shared>) -> Router {
    let leases = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases";
    let one = format!("{leases}/{{name}}");
    Router::new()
        .route(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            post(review::create),
        )
        .route("/api/v1/nodes/{name}", get(node::get))
        .route(leases, get(lease::list).post(lease::create))
        .route(
            &one,
            get(lease::get).put(lease::replace).delete(lease::delete),
        )
        .fallback(async || failure(404, "NotFound"))
        .layer(from_fn_with_state(shared.clone(), note))
        .with_state(shared)
}

/// Records a request, and fails it if [`FakeKubernetes::fail_with`] demands that.
async fn note(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let told = {
        let mut inner = shared.lock();
        let asked = format!("{} {}", request.method(), request.uri());
        inner.requests.push(asked);
        inner.failure
    };
    match told {
        Some(status) => failure(status, "Told"),
        None => next.run(request).await,
    }
}

/// Returns a refusal in the API's form.
fn failure(code: u16, reason: &str) -> Response {
    let status = json!({
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": format!("the fake says {code}"),
    });
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, Json(status)).into_response()
}
