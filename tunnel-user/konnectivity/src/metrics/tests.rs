use std::collections::BTreeSet;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tunnel_proto::konnectivity::Packet;

use super::*;
use cpc_kubernetes::lease::LeaseObserver;
use cpc_observe::exposition::Format;

/// Names of samples and their labels, as proxy-server and proxy-agent write them.
const SERVER: [&str; 18] = [
    "connection_duration_seconds",
    "culled_leases_count",
    "dial_duration_seconds",
    "dial_failure_count reason",
    "established_connections",
    "frontend_write_duration_seconds",
    "full_receive_channels service_method",
    "grpc_connections service_method",
    "http_connections",
    "lease_delete_latency_seconds http_status_code",
    "lease_delete_total http_status_code reason",
    "lease_list_latency_seconds http_status_code",
    "lease_list_total http_status_code reason",
    "pending_backend_dials",
    "ready_backend_connections",
    "ready_backends proxy_strategy",
    "stream_errors_total code packet_type segment",
    "stream_packets_total packet_type segment",
];

const AGENT: [&str; 11] = [
    "dial_duration_seconds",
    "endpoint_dial_failure_total reason",
    "known_server_count",
    "lease_list_latency_seconds http_response_code",
    "lease_lists_total http_response_code reason",
    "lease_watches_total http_response_code reason",
    "open_endpoint_connections",
    "open_server_connections",
    "server_connection_failure_count direction",
    "stream_errors_total code packet_type segment",
    "stream_packets_total packet_type segment",
];

fn text(registry: &Registry) -> String {
    Format::Text.page(registry).unwrap()
}

/// A failure that there was none of has no series: tests of Konnectivity's compare whole families.
fn is_counter_with_one_series(text: &str, name: &str) {
    assert!(
        text.contains(&format!("\n# TYPE {name} counter\n")),
        "{text}"
    );
    assert_eq!(text.matches(&format!("\n{name}{{")).count(), 1, "{text}");
}

/// Every sample without its value: its name less `prefix` and what a histogram adds, and its
/// labels in alphabetic order.
fn names(text: &str, prefix: &str) -> BTreeSet<String> {
    let histograms: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" histogram"))
        .collect();
    let name = |line: &str| {
        let (sample, _) = line.rsplit_once(' ').unwrap();
        let (full, labels) = sample.split_once('{').unwrap_or((sample, "}"));
        let family = histograms.iter().find(|h| {
            let suffix = full.strip_prefix(**h);
            suffix.is_some_and(|s| ["_bucket", "_sum", "_count"].contains(&s))
        });
        let full = family.copied().unwrap_or(full);
        let labels = labels.trim_end_matches('}').split(',');
        let keys = labels.filter_map(|label| Some(label.split_once('=')?.0));
        let keys: BTreeSet<_> = keys.filter(|key| *key != "le").collect();
        let mut name = full.strip_prefix(prefix).unwrap().to_owned();
        keys.iter().for_each(|key| name = format!("{name} {key}"));
        name
    };
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(name)
        .collect()
}

fn of(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.into()).collect()
}

const MOMENT: Duration = Duration::from_millis(2);

#[test]
fn the_server_has_exactly_the_names_of_proxy_server() {
    let mut registry = Registry::default();
    let metrics = ProxyServerMetrics::default();
    metrics.register(&mut registry);
    metrics.leases.listed(Some((200, "")), MOMENT);
    metrics.leases.deleted(Some((409, "Conflict")), MOMENT);
    metrics
        .streams
        .error(Segment::ToAgent, "Unavailable", Some(PacketKind::Data));
    metrics.set_backends(3, [("destHost", 2)]);
    metrics.dialled(MOMENT);
    let clients = metrics.clients();
    clients.wrote(MOMENT);
    clients.sent(PacketKind::DialResponse);
    clients.not_sent("Canceled", PacketKind::Data);
    clients.not_received("Unavailable");
    metrics.ended(MOMENT);
    let _held = (metrics.http_connection(), metrics.rpc(Service::Proxy));
    drop((metrics.pending_dial(), metrics.established()));
    drop(metrics.full_receive_channel(Service::Connect));
    metrics.dial_failed(DialFailure::NoAgent);
    metrics.leases.cleared();
    let tally = metrics.streams.tally(Segment::FromClient);
    tally.count(PacketKind::DialRequest);
    tally.packet(&Packet::Drain);
    tally.packet(&Packet::Unknown(9));

    let text = text(&registry);
    let prefix = "konnectivity_network_proxy_server_";
    assert_eq!(names(&text, prefix), of(&SERVER));
    is_counter_with_one_series(&text, &format!("{prefix}dial_failure_count"));
    assert!(text.contains(&format!("\n# TYPE {prefix}culled_leases_count counter\n")));
    let bucket = "dial_duration_seconds_bucket{le=\"1e-05\"} 0";
    assert!(text.contains(&format!("\n{prefix}{bucket}\n")), "{text}");
    for sample in [
        "culled_leases_count 1",
        "dial_duration_seconds_count 1",
        "dial_failure_count{reason=\"no_agent\"} 1",
        "established_connections 0",
        "full_receive_channels{service_method=\"Connect\"} 0",
        "grpc_connections{service_method=\"Proxy\"} 1",
        "http_connections 1",
        "lease_delete_total{http_status_code=\"409\",reason=\"Conflict\"} 1",
        "lease_list_total{http_status_code=\"200\",reason=\"\"} 1",
        "frontend_write_duration_seconds_count 1",
        "stream_packets_total{segment=\"to_client\",packet_type=\"DIAL_RSP\"} 1",
        "stream_errors_total{segment=\"to_client\",code=\"Canceled\",packet_type=\"DATA\"} 1",
        "stream_errors_total{segment=\"from_client\",code=\"Unavailable\",packet_type=\"Unknown\"} 1",
        "ready_backend_connections 3",
        "ready_backends{proxy_strategy=\"destHost\"} 2",
        "stream_errors_total{segment=\"to_agent\",code=\"Unavailable\",packet_type=\"DATA\"} 1",
        "stream_packets_total{segment=\"from_client\",packet_type=\"DIAL_REQ\"} 1",
        "stream_packets_total{segment=\"from_client\",packet_type=\"DRAIN\"} 1",
        "stream_packets_total{segment=\"from_agent\",packet_type=\"DIAL_CLS\"} 0",
    ] {
        assert!(
            text.contains(&format!("\n{prefix}{sample}\n")),
            "no {sample} in {text}"
        );
    }
}

#[test]
fn the_agent_has_exactly_the_names_of_proxy_agent() {
    let mut registry = Registry::default();
    let metrics = ProxyAgentMetrics::default();
    metrics.register(&mut registry);
    metrics.leases.listed(Some((403, "Forbidden")), MOMENT);
    metrics.leases.watched(Some((200, "")));
    metrics.leases.watched(None);
    metrics.streams.error(Segment::FromAgent, "Canceled", None);
    metrics.dialled(MOMENT);
    metrics.dial_failed(DialTrouble::Timeout);
    metrics.server_failed(Direction::FromServer);
    metrics.set_servers(2, 3);
    metrics.endpoint_opened();
    metrics.endpoint_opened();
    metrics.endpoint_closed();

    let text = text(&registry);
    let prefix = "konnectivity_network_proxy_agent_";
    assert_eq!(names(&text, prefix), of(&AGENT));
    for name in [
        "server_connection_failure_count",
        "endpoint_dial_failure_total",
    ] {
        is_counter_with_one_series(&text, &format!("{prefix}{name}"));
    }
    for sample in [
        "endpoint_dial_failure_total{reason=\"timeout\"} 1",
        "known_server_count 3",
        "lease_lists_total{http_response_code=\"403\",reason=\"Forbidden\"} 1",
        "lease_watches_total{http_response_code=\"200\",reason=\"\"} 1",
        "open_endpoint_connections 1",
        "open_server_connections 2",
        "server_connection_failure_count{direction=\"from_server\"} 1",
        "stream_errors_total{segment=\"from_agent\",code=\"Canceled\",packet_type=\"Unknown\"} 1",
    ] {
        assert!(
            text.contains(&format!("\n{prefix}{sample}\n")),
            "no {sample} in {text}"
        );
    }
}
