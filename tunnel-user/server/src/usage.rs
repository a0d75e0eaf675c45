//! The part of each limit that is in use now.

use super::limits::Limit;
use super::shard::Common;
use super::tenants::Tenant;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_observe::limits::LimitMetrics;

/// Updates the metrics of limits: refused work, and the part of each limit that is in use.
pub(super) fn refresh(metrics: &LimitMetrics, common: &Common) {
    let routes = common.control.route_usage();
    for (limit, refused) in routes.take_refused() {
        metrics.refusals(limit.label()).inc_by(refused);
    }
    let (all_routes, most_routes) = routes.taken();
    let tenants = || common.tenants.all();
    let inside = |gate: &ConcurrencyLimit| gate.in_use() as u64;
    let most = |gate: fn(&Tenant) -> &ConcurrencyLimit| {
        tenants().map(|t| inside(gate(t))).max().unwrap_or(0)
    };
    let most_held = tenants().map(|t| t.budget.used()).max();
    for (limit, used) in [
        (Limit::Connections, inside(&common.connections)),
        (Limit::ConnectionsPerTenant, most(|t| &t.connections)),
        (Limit::Dials, inside(&common.dials)),
        (Limit::DialsPerTenant, most(|t| &t.dials)),
        (Limit::StalledBytes, common.budget.used()),
        (Limit::StalledBytesPerTenant, most_held.unwrap_or(0)),
        (Limit::Agents, inside(&common.tunnels)),
        (Limit::AgentsPerTenant, most(|t| &t.agents)),
        (Limit::Routes, all_routes),
        (Limit::RoutesPerTenant, most_routes),
        (Limit::WaitingSessions, inside(&common.waiting_sessions)),
        (
            Limit::WaitingSessionsPerTenant,
            most(|t| &t.waiting_sessions),
        ),
        (Limit::Handshakes, common.handshakes.in_progress() as u64),
    ] {
        metrics.set_used(limit.label(), used);
    }
}
