//! Leases: create, read, replace, delete with preconditions, list and watch by labels.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Json, Response};
use futures_util::stream::{StreamExt, iter, unfold};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::{Shared, failure};

/// Namespace and name.
type Key = (String, String);

/// Parameters of a request.
type Parameters = Query<BTreeMap<String, String>>;

/// All leases, and everything that ever happened to them.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    known: BTreeMap<Key, Value>,
    events: Vec<Event>,
}

#[derive(Debug)]
struct Event {
    version: u64,
    namespace: String,
    kind: &'static str,
    lease: Value,
}

impl Leases {
    pub(crate) fn all(&self) -> Vec<Value> {
        self.known.values().cloned().collect()
    }

    /// Makes or changes one. Returns the version of the change.
    pub(crate) fn put(&mut self, mut lease: Value) -> u64 {
        let version = self.version() + 1;
        lease["apiVersion"] = "coordination.k8s.io/v1".into();
        lease["kind"] = "Lease".into();
        lease["metadata"]["resourceVersion"] = version.to_string().into();
        let text = |key: &str| {
            lease["metadata"][key]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let key = (text("namespace"), text("name"));
        let namespace = key.0.clone();
        let before = self.known.insert(key, lease.clone());
        let kind = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.events.push(Event {
            version,
            namespace,
            kind,
            lease,
        });
        version
    }

    /// Deletes one. Returns the version of the change.
    pub(crate) fn remove(&mut self, namespace: &str, name: &str) -> u64 {
        let removed = self.known.remove(&(namespace.into(), name.into()));
        let version = self.version() + u64::from(removed.is_some());
        if let Some(mut lease) = removed {
            lease["metadata"]["resourceVersion"] = version.to_string().into();
            self.events.push(Event {
                version,
                namespace: namespace.into(),
                kind: "DELETED",
                lease,
            });
        }
        version
    }

    fn version(&self) -> u64 {
        self.events.last().map_or(0, |event| event.version)
    }

    /// Returns the events after `version`, as lines of a watch, and the version to which they lead.
    fn since(&self, version: u64, namespace: &str, selector: &str) -> (Vec<u8>, u64) {
        let new = self.events.iter().filter(|event| {
            event.version > version
                && event.namespace == namespace
                && selects(selector, &event.lease)
        });
        let line =
            |event: &Event| format!("{}\n", json!({"type": event.kind, "object": event.lease}));
        let lines: String = new.map(line).collect();
        (lines.into_bytes(), self.version())
    }
}

/// Returns the first events of a watch for everything (`sendInitialEvents`): the existing objects,
/// and the mark behind them. Returns also the version to which they lead.
fn initial_events(leases: &Leases, namespace: &str, selector: &str) -> (String, u64) {
    let there = leases.known.iter();
    let there = there.filter(|((of, _), lease)| of == namespace && selects(selector, lease));
    let mut lines: String = there
        .map(|(_, lease)| format!("{}\n", json!({"type": "ADDED", "object": lease})))
        .collect();
    let end = json!({"type": "BOOKMARK", "object": {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "resourceVersion": leases.version().to_string(),
            "annotations": {"k8s.io/initial-events-end": "true"},
        },
        "spec": {},
    }});
    lines.push_str(&format!("{end}\n"));
    (lines, leases.version())
}

/// Whether a lease bears the labels of `selector`: `a=b,c=d`.
fn selects(selector: &str, lease: &Value) -> bool {
    let labels = &lease["metadata"]["labels"];
    let mut wanted = selector.split(',').filter_map(|pair| pair.split_once('='));
    wanted.all(|(key, value)| labels[key] == *value)
}

pub(crate) async fn list(
    State(shared): State<Arc<Shared>>,
    Path(namespace): Path<String>,
    Query(parameters): Parameters,
) -> Response {
    let selector = parameters.get("labelSelector").cloned().unwrap_or_default();
    if parameters.contains_key("watch") {
        return watch(shared, namespace, selector, &parameters);
    }
    let inner = shared.lock();
    let leases = &inner.leases;
    let items = leases
        .known
        .iter()
        .filter(|((of, _), lease)| *of == namespace && selects(&selector, lease));
    let items: Vec<_> = items.map(|(_, lease)| lease).collect();
    Json(json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "LeaseList",
        "metadata": {"resourceVersion": leases.version().to_string()},
        "items": items,
    }))
    .into_response()
}

fn watch(
    shared: Arc<Shared>,
    namespace: String,
    selector: String,
    parameters: &BTreeMap<String, String>,
) -> Response {
    let number = |key: &str| parameters.get(key).and_then(|value| value.parse().ok());
    let (first, from) = match parameters.get("sendInitialEvents").map(String::as_str) {
        Some("true") => initial_events(&shared.lock().leases, &namespace, &selector),
        _ => (String::new(), number("resourceVersion").unwrap_or_default()),
    };
    let end = Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(300));
    let changes = shared.version.subscribe();
    let events = unfold((from, changes), move |(mut seen, mut changes)| {
        let (shared, namespace, selector) = (shared.clone(), namespace.clone(), selector.clone());
        async move {
            loop {
                let _ = changes.borrow_and_update();
                let (lines, now) = shared.lock().leases.since(seen, &namespace, &selector);
                seen = now;
                if !lines.is_empty() {
                    return Some((Ok::<_, Infallible>(Bytes::from(lines)), (seen, changes)));
                }
                timeout_at(end, changes.changed()).await.ok()?.ok()?;
            }
        }
    });
    let first = (!first.is_empty()).then(|| Ok(Bytes::from(first)));
    let events = iter(first).chain(events);
    let json = [(CONTENT_TYPE, "application/json")];
    (json, Body::from_stream(events)).into_response()
}

pub(crate) async fn get(State(shared): State<Arc<Shared>>, Path(key): Path<Key>) -> Response {
    match shared.lock().leases.known.get(&key) {
        Some(lease) => Json(lease).into_response(),
        None => failure(404, "NotFound"),
    }
}

pub(crate) async fn create(
    State(shared): State<Arc<Shared>>,
    Path(namespace): Path<String>,
    Json(mut lease): Json<Value>,
) -> Response {
    let Some(name) = lease["metadata"]["name"].as_str() else {
        return failure(422, "Invalid");
    };
    let key = (namespace.clone(), name.to_owned());
    if shared.lock().leases.known.contains_key(&key) {
        return failure(409, "AlreadyExists");
    }
    lease["metadata"]["namespace"] = namespace.into();
    put(&shared, key, lease, StatusCode::CREATED)
}

pub(crate) async fn replace(
    State(shared): State<Arc<Shared>>,
    Path(key): Path<Key>,
    Json(lease): Json<Value>,
) -> Response {
    let wanted = lease["metadata"]["resourceVersion"].as_str();
    if let Some(refused) = refused(&shared, &key, wanted) {
        return refused;
    }
    put(&shared, key, lease, StatusCode::OK)
}

fn put(shared: &Shared, key: Key, lease: Value, status: StatusCode) -> Response {
    let mut inner = shared.lock();
    let version = inner.leases.put(lease);
    shared.version.send_replace(version);
    (status, Json(inner.leases.known[&key].clone())).into_response()
}

pub(crate) async fn delete(
    State(shared): State<Arc<Shared>>,
    Path(key): Path<Key>,
    body: Bytes,
) -> Response {
    let options: Value = serde_json::from_slice(&body).unwrap_or_default();
    let wanted = options["preconditions"]["resourceVersion"].as_str();
    if let Some(refused) = refused(&shared, &key, wanted) {
        return refused;
    }
    let version = shared.lock().leases.remove(&key.0, &key.1);
    shared.version.send_replace(version);
    Json(json!({"apiVersion": "v1", "kind": "Status", "status": "Success"})).into_response()
}

/// Returns the refusal when a lease does not exist, or has changed since `version` if that is set.
fn refused(shared: &Shared, key: &Key, version: Option<&str>) -> Option<Response> {
    let inner = shared.lock();
    let Some(lease) = inner.leases.known.get(key) else {
        return Some(failure(404, "NotFound"));
    };
    let changed = version.is_some_and(|v| lease["metadata"]["resourceVersion"] != *v);
    changed.then(|| failure(409, "Conflict"))
}
