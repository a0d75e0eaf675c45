//! Nodes.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Json, Response};
use serde_json::Value;

use crate::{Shared, failure};

/// Nodes that there are.
#[derive(Debug, Default)]
pub(crate) struct Nodes(HashMap<String, Value>);

impl Nodes {
    pub(crate) fn put(&mut self, mut node: Value) {
        node["apiVersion"] = "v1".into();
        node["kind"] = "Node".into();
        let name = node["metadata"]["name"].as_str().unwrap_or_default();
        self.0.insert(name.to_owned(), node);
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }
}

pub(crate) async fn get(State(shared): State<Arc<Shared>>, Path(name): Path<String>) -> Response {
    match shared.lock().nodes.0.get(&name) {
        Some(node) => Json(node.clone()).into_response(),
        None => failure(404, "NotFound"),
    }
}
