//! Health as Konnectivity's programs tell it, for probes and scrapers that were made for them.
//!
//! | path | server | agent |
//! | --- | --- | --- |
//! | `/healthz` | 200 `ok` | 200 `ok` |
//! | `/readyz`, `/ready` | 200 `ok`, else 500 | 200 `ok`, else 503 and each check; with `?verbose` always each check |
//! | `/metrics` | as on the admin port | as on the admin port |

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;

use cpc_observe::admin::{Admin, Pages, metrics_page};

/// Returns the pages of a proxy-server.
pub(crate) fn server_router(admin: Admin) -> Pages {
    let ready = get(server_ready);
    pages(
        Router::new()
            .route("/readyz", ready.clone())
            .route("/ready", ready),
    )
    .with_state(admin)
}

/// Returns the pages of a proxy-agent.
pub(crate) fn agent_router(admin: Admin) -> Pages {
    let ready = get(agent_ready);
    pages(
        Router::new()
            .route("/readyz", ready.clone())
            .route("/ready", ready),
    )
    .with_state(admin)
}

fn pages(router: Router<Admin>) -> Router<Admin> {
    router
        .route("/healthz", get(|| async { "ok" }))
        .route("/metrics", metrics_page())
}

/// Answers the readiness of a server. `/readyz` of the admin port has the reason in our own words.
async fn server_ready(State(admin): State<Admin>) -> Response {
    match admin.ready() {
        Ok(()) => "ok".into_response(),
        Err(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "no connection to any proxy agent",
        )
            .into_response(),
    }
}

#[derive(Deserialize)]
struct Detail {
    verbose: Option<String>,
}

async fn agent_ready(State(admin): State<Admin>, Query(detail): Query<Detail>) -> Response {
    let ping = "[+]ping ok\n";
    match admin.ready() {
        Ok(()) if detail.verbose.is_none() => "ok".into_response(),
        Ok(()) => format!("{ping}[+]server-connected ok\ncheck passed\n").into_response(),
        Err(_) => {
            let body = format!("{ping}[-]server-connected failed: no servers connected\n");
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}
