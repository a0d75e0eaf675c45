//! Token reviews.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use serde_json::{Value, json};

use crate::{Shared, failure};

/// Account of a token.
#[derive(Clone, Debug)]
pub struct Review {
    /// User name of the token.
    pub username: String,
    /// Audiences of the token.
    pub audiences: Vec<String>,
    /// The node of the pod that it was issued to.
    pub node: Option<String>,
    /// Unique id of the token (`JTI=..`).
    pub id: Option<String>,
    /// Instead of all that: why it can't be checked.
    pub error: Option<String>,
}

impl Review {
    /// Returns a token of a service account, for one audience.
    pub fn of(namespace: &str, service_account: &str, audience: &str) -> Self {
        Self {
            username: format!("system:serviceaccount:{namespace}:{service_account}"),
            audiences: vec![audience.into()],
            node: None,
            id: None,
            error: None,
        }
    }

    /// Returns a token that can't be checked.
    pub fn error(why: &str) -> Self {
        Self {
            username: String::new(),
            audiences: Vec::new(),
            node: None,
            id: None,
            error: Some(why.into()),
        }
    }
}

/// Known tokens.
#[derive(Debug, Default)]
pub(crate) struct Reviews(HashMap<String, Review>);

impl Reviews {
    pub(crate) fn set(&mut self, token: &str, review: Review) {
        self.0.insert(token.to_owned(), review);
    }

    /// Returns the status of a review of `token` for `audiences`.
    fn status(&self, token: &str, audiences: &[String]) -> Value {
        let Some(review) = self.0.get(token) else {
            return json!({"user": {}});
        };
        if let Some(error) = &review.error {
            return json!({"user": {}, "error": error});
        }
        let good_for = review.audiences.iter().filter(|a| audiences.contains(a));
        let good_for: Vec<_> = good_for.collect();
        if good_for.is_empty() {
            let error = format!(
                "token audiences {:?} is invalid for the target audiences {audiences:?}",
                review.audiences
            );
            return json!({"user": {}, "error": error});
        }
        let mut user = json!({"username": review.username, "uid": "1", "groups": []});
        if let Some(node) = &review.node {
            user["extra"]["authentication.kubernetes.io/node-name"] = json!([node]);
        }
        if let Some(id) = &review.id {
            user["extra"]["authentication.kubernetes.io/credential-id"] = json!([id]);
        }
        json!({"authenticated": true, "user": user, "audiences": good_for})
    }
}

pub(crate) async fn create(
    State(shared): State<Arc<Shared>>,
    Json(mut review): Json<Value>,
) -> Response {
    let spec = &review["spec"];
    let Some(token) = spec["token"].as_str() else {
        return failure(422, "Invalid");
    };
    let audiences = spec["audiences"].as_array();
    let audiences = audiences.into_iter().flatten().filter_map(Value::as_str);
    let audiences: Vec<_> = audiences.map(str::to_owned).collect();
    let status = shared.lock().reviews.status(token, &audiences);
    review["status"] = status;
    (StatusCode::CREATED, Json(review)).into_response()
}
