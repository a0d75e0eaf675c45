use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::*;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    name: &'static str,
}

fn registry() -> Registry {
    let mut registry = Registry::default();
    let cpc = registry.sub_registry_with_prefix("cpc");
    let packets = Counter::<u64>::default();
    packets.inc_by(3);
    cpc.register("packets", "Packets", packets);
    let open = Gauge::<i64>::default();
    cpc.register("open", "What is open", open);
    let seconds = Family::<Labels, Histogram, _>::new_with_constructor(|| {
        Histogram::new([0.000_001, 0.0001, 2.5, 10.0, 86_400.0, 1e6])
    });
    let odd = "} _bucket{le=\"1\"} 7";
    seconds.get_or_create(&Labels { name: odd }).observe(2.0);
    cpc.register("seconds", "How long", seconds);
    registry
}

/// The family of a counter has the suffix `_total` where its samples have it, and bounds are those
/// of Go.
#[test]
fn the_text_format_is_what_gos_parser_reads() {
    let page = Format::Text.page(&registry()).unwrap();
    let labels = "name=\"} _bucket{le=\\\"1\\\"} 7\"";
    let expected = format!(
        "# HELP cpc_packets_total Packets.\n\
         # TYPE cpc_packets_total counter\n\
         cpc_packets_total 3\n\
         # HELP cpc_open What is open.\n\
         # TYPE cpc_open gauge\n\
         cpc_open 0\n\
         # HELP cpc_seconds How long.\n\
         # TYPE cpc_seconds histogram\n\
         cpc_seconds_sum{{{labels}}} 2.0\n\
         cpc_seconds_count{{{labels}}} 1\n\
         cpc_seconds_bucket{{{labels},le=\"1e-06\"}} 0\n\
         cpc_seconds_bucket{{{labels},le=\"0.0001\"}} 0\n\
         cpc_seconds_bucket{{{labels},le=\"2.5\"}} 1\n\
         cpc_seconds_bucket{{{labels},le=\"10\"}} 1\n\
         cpc_seconds_bucket{{{labels},le=\"86400\"}} 1\n\
         cpc_seconds_bucket{{{labels},le=\"1e+06\"}} 1\n\
         cpc_seconds_bucket{{{labels},le=\"+Inf\"}} 1\n"
    );
    assert_eq!(page, expected);
}

#[test]
fn open_metrics_ends_with_its_mark() {
    let page = Format::OpenMetrics.page(&registry()).unwrap();
    for line in [
        "# TYPE cpc_packets counter",
        "cpc_packets_total 3",
        "le=\"1e-06\"} 0",
        "le=\"10.0\"} 1",
        "le=\"86400.0\"} 1",
        "le=\"+Inf\"} 1",
    ] {
        assert!(page.contains(&format!("{line}\n")), "no {line} in {page}");
    }
    assert!(page.ends_with("\n# EOF\n"));
}

#[test]
fn open_metrics_is_for_those_who_ask_for_it() {
    let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                      application/openmetrics-text;version=0.0.1;q=0.5,\
                      text/plain;version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    for (accept, expected) in [
        (&[][..], Format::Text),
        (&["*/*"], Format::Text),
        (&["text/html,application/xhtml+xml,*/*;q=0.8"], Format::Text),
        (&["application/openmetrics-text"], Format::OpenMetrics),
        (
            &["Application/OpenMetrics-Text; Version=\"1.0.0\""],
            Format::OpenMetrics,
        ),
        (&[prometheus], Format::OpenMetrics),
        (
            &["text/plain;q=0.5", "application/openmetrics-text"],
            Format::OpenMetrics,
        ),
        (
            &["text/plain", "application/openmetrics-text;q=0.5"],
            Format::Text,
        ),
        (&["application/openmetrics-text;q=0"], Format::Text),
        (&["application/openmetrics-text;q=much"], Format::Text),
        (
            &["application/openmetrics-text;version=2.0.0"],
            Format::Text,
        ),
        (
            &["application/openmetrics-text;version=2.0.0,text/plain"],
            Format::Text,
        ),
        (&[",;,=;q"], Format::Text),
    ] {
        assert_eq!(
            Format::accepted(accept.iter().copied()),
            expected,
            "{accept:?}"
        );
    }
}

#[test]
fn numbers_are_written_as_go_writes_them() {
    for (number, text, open_metrics) in [
        (0.0, "0", "0.0"),
        (1.0, "1", "1.0"),
        (0.000_25, "0.00025", "0.00025"),
        (0.000_025, "2.5e-05", "2.5e-05"),
        (1e-10, "1e-10", "1e-10"),
        (123_456.0, "123456", "123456.0"),
        (1_234_567.0, "1.234567e+06", "1.234567e+06"),
        (-2.5, "-2.5", "-2.5"),
    ] {
        assert_eq!(go_float(number, Format::Text), text);
        assert_eq!(go_float(number, Format::OpenMetrics), open_metrics);
    }
}
