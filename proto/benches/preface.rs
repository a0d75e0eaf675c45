//! Cost per connection at the edge of the wire: the head of its stream, and that of its CONNECT.

// A benchmark that can't be set up should stop.
#![allow(clippy::expect_used, missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use bytes::BytesMut;
use criterion::{Criterion, criterion_group, criterion_main};
use tunnel_proto::http_connect;
use tunnel_proto::preface::{ConnectionId, Destination, DialRequest, Host, StreamHead};

const CONNECT: &[u8] = b"CONNECT 10.99.1.2:10250 HTTP/1.1\r\nHost: 10.99.1.2:10250\r\n\
    User-Agent: Go-http-client/1.1\r\n\r\n";

fn request(host: &str) -> DialRequest {
    let host: Host = host.parse().expect("a host");
    DialRequest {
        session: None,
        id: ConnectionId([7; 16]),
        destination: Destination::new(host, 10_250),
        deadline: Duration::from_secs(10),
        attempt: 0,
    }
}

fn preface(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("preface");
    for host in ["10.99.1.2", "node-17.workers.example"] {
        let request = request(host);
        let mut wire = BytesMut::with_capacity(512);
        group.bench_function(format!("encode {host}"), |bencher| {
            bencher.iter(|| {
                wire.clear();
                black_box(&request).encode(&mut wire);
            });
        });
        let mut wire = BytesMut::new();
        request.encode(&mut wire);
        group.bench_function(format!("decode {host}"), |bencher| {
            bencher.iter(|| StreamHead::decode(black_box(&wire)));
        });
    }
    group.bench_function("parse CONNECT", |bencher| {
        bencher.iter(|| http_connect::parse(black_box(CONNECT)));
    });
    group.finish();
}

criterion_group!(benches, preface);
criterion_main!(benches);
