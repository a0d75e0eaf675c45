//! The relay between a real socket and a stream that is always ready: the cost of moving bytes without
//! QUIC.

// A benchmark that can't be set up should stop.
#![allow(clippy::expect_used, missing_docs)]

use std::future::{Future, pending};

use bytes::Bytes;
use cpc_datapath::kept::KeepNothing;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_datapath::{Budget, Meter, Progress, relay};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tunnel_proto::close::CloseReason;

/// Bytes moved per iteration.
const TOTAL: usize = 16 << 20;
/// The payload of a packet at the usual MTU.
const CHUNK: usize = 1400;
/// Number of packets per receive.
const BATCH: usize = 44;

/// A send half that accepts everything.
struct Sink;

impl SendHalf for Sink {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        chunk.clear();
        Ok(())
    }
    fn finish(&mut self) {}
    fn reset(&mut self, _: CloseReason) {}
    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        pending()
    }
}

/// A receive half that gives the number of bytes, in packets.
struct Source(usize);

impl RecvHalf for Source {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        if self.0 == 0 {
            return Err(RecvEnd::Finished);
        }
        for _ in 0..BATCH {
            let count = CHUNK.min(self.0);
            into.push(Bytes::from_static(&[0; CHUNK]).split_to(count));
            self.0 -= count;
        }
        into.retain(|chunk| !chunk.is_empty());
        Ok(())
    }
    async fn reset(&mut self) -> CloseReason {
        pending().await
    }
    fn stop(&mut self, _: CloseReason) {}
}

struct Uncounted;

impl Meter for Uncounted {
    fn outbound(&self, _: usize) {}
    fn inbound(&self, _: usize) {}
}

/// Moves bytes through one relay: `outward` from its socket, `inward` to it.
async fn run(outward: usize, inward: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (mut from, mut to) = client.expect("a connection").into_split();
    let (local, _) = accepted.expect("its other end");
    let budget = Budget::new(1 << 30);
    let zeros = vec![0; 256 << 10];
    let send = async {
        let mut left = outward;
        while left > 0 {
            let count = zeros.len().min(left);
            to.write_all(&zeros[..count]).await.expect("a write");
            left -= count;
        }
        to.shutdown().await.expect("an end");
    };
    let receive = async {
        let mut buffer = vec![0; 256 << 10];
        while from.read(&mut buffer).await.expect("a read") > 0 {}
    };
    let mut start = Progress::default();
    let relayed = async move {
        let mut source = Source(inward);
        relay(
            &local,
            &mut Sink,
            &mut source,
            &mut start,
            &budget,
            (&Uncounted, &KeepNothing),
        )
        .await
    };
    tokio::join!(relayed, send, receive);
}

fn relays(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let mut group = criterion.benchmark_group("relay");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(TOTAL as u64));
    group.bench_function("socket to stream", |bencher| {
        bencher.iter(|| runtime.block_on(run(TOTAL, 0)));
    });
    group.bench_function("stream to socket", |bencher| {
        bencher.iter(|| runtime.block_on(run(0, TOTAL)));
    });
    group.finish();
}

criterion_group!(benches, relays);
criterion_main!(benches);
