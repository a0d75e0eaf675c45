//! Two endpoints over loopback, on one thread.

mod memory;
mod nat;

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::config::Setup;
use super::secret::Secret;
use super::steering::Spread;
use super::*;
use crate::tunnel::{Tunnel, TunnelRecv, TunnelSend};
use cpc_config::TlsFiles;
use cpc_config::TransportConfig;
use cpc_datapath::Budget;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_identity::issue::{Authority, Request};
use cpc_identity::{Material, Role, provider};

const SOON: Duration = Duration::from_secs(10);

struct Pair {
    _dir: TempDir,
    agents_endpoint: Endpoint,
    servers_endpoint: Endpoint,
    agent: Connection,
    server: Connection,
}

fn material(dir: &TempDir, role: Role, name: &str) -> Arc<Material> {
    let request = Request {
        role,
        name: name.into(),
        dns: Vec::new(),
        addresses: Vec::new(),
        not_after: SystemTime::now() + Duration::from_secs(3600),
    };
    let out = dir.path().join(name);
    let authority = Authority::open(dir.path()).unwrap();
    authority.issue(&request, &out).unwrap();
    let kind = match role {
        Role::Server => "server",
        _ => "agent",
    };
    let files = TlsFiles {
        cert: out.join(format!("{kind}.crt")),
        key: out.join(format!("{kind}.key")),
        ca: out.join("ca.crt"),
        trust: Vec::new(),
        revoked: None,
    };
    Material::load(files, role, provider()).unwrap()
}

impl Pair {
    async fn new() -> Self {
        Self::through(std::future::ready).await
    }

    /// The agent dials the address that `way` makes of the server's.
    async fn through<F: Future<Output = SocketAddr>>(way: impl FnOnce(SocketAddr) -> F) -> Self {
        let memory = MemoryBounds::new(Budget::new(1 << 30), 1 << 28);
        Self::within(memory, way).await
    }

    /// Bounds the memory of either endpoint.
    async fn within<F: Future<Output = SocketAddr>>(
        memory: MemoryBounds,
        way: impl FnOnce(SocketAddr) -> F,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let soon = SystemTime::now() + Duration::from_secs(3600);
        Authority::create(dir.path(), &"test.example".parse().unwrap(), soon).unwrap();
        let secret = Secret::load_or_create(dir.path()).unwrap();
        let udp = udp::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let transport = TransportConfig::default();
        let setup = Setup::new(transport, memory, &mut Registry::default());
        let server = material(&dir, Role::Server, "s1");
        let servers_endpoint = config::server(udp, &server, &secret, 0, &setup)
            .unwrap()
            .endpoint;
        let address = way(servers_endpoint.local_addr().unwrap()).await;
        let agent = material(&dir, Role::Agent, "w1");
        let spread = (Spread::random(false), 0);
        let (opened, config) = config::client(address, &agent, spread, &setup).unwrap();
        let agents_endpoint = opened.endpoint;
        let connecting = agents_endpoint.connect(config, address, "cpc.invalid");
        let accepted = async {
            let incoming = servers_endpoint.accept().await.unwrap();
            incoming.accept().await.unwrap()
        };
        let (agent, server) = tokio::join!(connecting.unwrap(), accepted);
        Self {
            _dir: dir,
            agent: agent.unwrap(),
            server,
            agents_endpoint,
            servers_endpoint,
        }
    }

    /// A stream that the server has opened, seen by both.
    async fn stream(&self) -> ((Send, Recv), (Send, Recv)) {
        let mut server = self.server.open_bi().await.unwrap();
        server.0.send(&mut Bytes::from_static(b"?")).await.unwrap();
        let mut agent = self.agent.accept_bi().await.unwrap();
        assert_eq!(take(&mut agent.1, 1).await, Ok(b"?".to_vec()));
        (server, agent)
    }
}

/// The next `count` bytes, or the end before them.
async fn take(recv: &mut Recv, count: usize) -> Result<Vec<u8>, RecvEnd> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let mut chunks = Vec::new();
        recv.recv(&mut chunks).await?;
        chunks
            .iter()
            .for_each(|chunk| taken.extend_from_slice(chunk));
    }
    Ok(taken)
}

fn run(test: impl AsyncFnOnce(Pair)) {
    run_alone(async || test(Pair::new().await).await);
}

fn run_alone(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let test = async { test().await };
    let test = async { timeout(SOON, test).await.unwrap() };
    LocalSet::new().block_on(&runtime, test);
}

fn pattern(length: usize, seed: usize) -> Bytes {
    (0..length).map(|i| ((i * 7 + seed) >> 3) as u8).collect()
}

#[test]
fn both_know_whom_they_speak_to() {
    run(async |pair| {
        assert_eq!(&*pair.agent.peer_identity().unwrap().name, "s1");
        assert_eq!(&*pair.server.peer_identity().unwrap().name, "w1");
        let address = pair.agents_endpoint.local_addr().unwrap();
        assert_eq!(pair.server.remote_address().port(), address.port());
        assert_eq!(pair.server.path().remote(), pair.server.remote_address());
        assert!(pair.agent.path().rtt() > Duration::ZERO);
    });
}

#[test]
fn many_streams_carry_many_bytes_and_end_in_order() {
    run(async |pair| {
        let (agent, server) = (pair.agent.clone(), pair.server.clone());
        let echo = tokio::task::spawn_local(async move {
            for _ in 0..20 {
                let (mut send, mut recv) = agent.accept_bi().await.unwrap();
                tokio::task::spawn_local(async move {
                    loop {
                        let mut chunks = Vec::new();
                        match recv.recv(&mut chunks).await {
                            Ok(()) => {
                                for mut chunk in chunks {
                                    send.send(&mut chunk).await.unwrap();
                                }
                            }
                            end => break assert_eq!(end, Err(RecvEnd::Finished)),
                        }
                    }
                    send.finish();
                    assert_eq!(send.stopped().await, SendEnd::Acknowledged);
                });
            }
        });
        let asked = (0..20).map(|seed| {
            let server = server.clone();
            async move {
                let (mut send, mut recv) = server.open_bi().await.unwrap();
                // More than a window, and more than one receive.
                let bytes = pattern(3 << 20, seed);
                let sent = async {
                    send.send(&mut bytes.clone()).await.unwrap();
                    send.finish();
                    assert_eq!(send.stopped().await, SendEnd::Acknowledged);
                };
                let (echoed, ()) = tokio::join!(take(&mut recv, bytes.len()), sent);
                assert!(echoed.unwrap() == bytes);
                assert_eq!(take(&mut recv, 1).await, Err(RecvEnd::Finished));
            }
        });
        futures_util::future::join_all(asked).await;
        echo.await.unwrap();
    });
}

#[test]
fn a_reset_and_a_stop_arrive_with_their_reasons() {
    run(async |pair| {
        let ((mut send, mut recv), (mut agents_send, mut agents_recv)) = pair.stream().await;
        send.reset(CloseReason::Cancelled);
        assert_eq!(agents_recv.reset().await, CloseReason::Cancelled);
        let end = Err(RecvEnd::Reset(CloseReason::Cancelled));
        assert_eq!(take(&mut agents_recv, 1).await, end);
        recv.stop(CloseReason::PeerGone);
        let end = SendEnd::Stopped(CloseReason::PeerGone);
        assert_eq!(agents_send.stopped().await, end);
        assert_eq!(
            agents_send.send(&mut Bytes::from_static(b"x")).await,
            Err(end)
        );
    });
}

#[test]
fn what_is_dropped_is_reset() {
    run(async |pair| {
        let (server, (agents_send, mut agents_recv)) = pair.stream().await;
        drop(server);
        let end = Err(RecvEnd::Reset(CloseReason::Aborted));
        assert_eq!(take(&mut agents_recv, 1).await, end);
        let end = SendEnd::Stopped(CloseReason::Aborted);
        assert_eq!(agents_send.stopped().await, end);
    });
}

#[test]
fn a_reader_that_stops_holds_up_its_own_stream_alone() {
    run(async |pair| {
        let ((mut send, _recv), (_agents_send, mut agents_recv)) = pair.stream().await;
        let mut much = pattern(8 << 20, 1);
        let blocked = timeout(Duration::from_millis(300), send.send(&mut much)).await;
        assert!(blocked.is_err() && much.len() >= 7 << 20, "{}", much.len());
        let ((mut other, _recv), (_agents_send, mut agents_other)) = pair.stream().await;
        other.send(&mut pattern(100_000, 2)).await.unwrap();
        assert!(take(&mut agents_other, 100_000).await.unwrap() == pattern(100_000, 2));
        // Cancelling has lost nothing.
        let rest = async {
            send.send(&mut much).await.unwrap();
        };
        let (all, ()) = tokio::join!(take(&mut agents_recv, 8 << 20), rest);
        assert!(all.unwrap() == pattern(8 << 20, 1));
    });
}

/// Eight streams send 1 MiB each. What is small then waits for no more than a run of one of them,
/// and for the packets that are under way.
#[test]
fn what_is_small_overtakes_what_is_large() {
    const LARGE: usize = 1 << 20;
    run(async |pair| {
        let ((mut small, _recv), (_agents_send, mut agents_small)) = pair.stream().await;
        let mut streams = Vec::new();
        for _ in 0..8 {
            streams.push(pair.stream().await);
        }
        let (arrived, begun) = (Rc::new(Cell::new(0)), Rc::new(Notify::new()));
        let large = streams.into_iter().enumerate().map(|(seed, stream)| {
            let ((mut send, recv), (agents_send, mut agents_recv)) = stream;
            let (arrived, begun) = (arrived.clone(), begun.clone());
            let sends = async move {
                let mut left = pattern(LARGE, seed);
                while !left.is_empty() {
                    let mut chunk = left.split_to(64 << 10);
                    send.send(&mut chunk).await.unwrap();
                }
                send
            };
            let receives = async move {
                let mut all = Vec::new();
                while all.len() < LARGE {
                    let more = take(&mut agents_recv, 1).await.unwrap();
                    arrived.set(arrived.get() + more.len());
                    begun.notify_one();
                    all.extend(more);
                }
                assert!(all == pattern(LARGE, seed));
                (recv, agents_send, agents_recv)
            };
            tokio::task::spawn_local(async { tokio::join!(sends, receives) })
        });
        let large: Vec<_> = large.collect();
        begun.notified().await;
        let before = arrived.get();
        small.send(&mut pattern(100, 9)).await.unwrap();
        assert!(take(&mut agents_small, 100).await.unwrap() == pattern(100, 9));
        let waited_for = arrived.get() - before;
        assert!(waited_for < LARGE / 2, "{waited_for} bytes went ahead");
        for one in large {
            one.await.unwrap();
        }
    });
}

#[test]
fn streams_wait_for_permission_and_get_it() {
    run(async |pair| {
        // An agent may open one stream.
        let (mut first, _) = pair.agent.open_bi().await.unwrap();
        first.send(&mut Bytes::from_static(b"x")).await.unwrap();
        let second = timeout(Duration::from_millis(100), pair.agent.open_bi()).await;
        assert!(second.is_err());
        first.finish();
        let (mut send, mut recv) = pair.server.accept_bi().await.unwrap();
        assert_eq!(take(&mut recv, 1).await, Ok(b"x".to_vec()));
        assert_eq!(take(&mut recv, 1).await, Err(RecvEnd::Finished));
        send.finish();
        pair.agent.open_bi().await.unwrap();
    });
}

#[test]
fn the_end_of_a_connection_reaches_whoever_waits() {
    run(async |pair| {
        let ((mut send, mut recv), (agents_send, mut agents_recv)) = pair.stream().await;
        send.send(&mut Bytes::from_static(b"last")).await.unwrap();
        assert_eq!(take(&mut agents_recv, 4).await.unwrap(), b"last");
        let reason = CloseReason::Shutdown;
        pair.server.close(error_code(reason), b"the end");
        assert_eq!(take(&mut recv, 1).await, Err(RecvEnd::Link(reason)));
        assert_eq!(take(&mut agents_recv, 1).await, Err(RecvEnd::Link(reason)));
        assert_eq!(agents_send.stopped().await, SendEnd::Link(reason));
        let error = pair.agent.accept_bi().await.unwrap_err();
        assert!(error.to_string().contains("the end"), "{error}");
        pair.agents_endpoint.wait_idle().await;
        pair.servers_endpoint.wait_idle().await;
    });
}

/// At both ends, and for streams as for the tunnel: sessions go on or end by it.
#[test]
fn a_closed_tunnel_has_one_reason() {
    run(async |pair| {
        let ((send, mut recv), _agents_halves) = pair.stream().await;
        let reason = CloseReason::HandedOver;
        Tunnel::close(&pair.server, reason, "");
        assert_eq!(take(&mut recv, 1).await, Err(RecvEnd::Link(reason)));
        let told = [send.tunnel_error(), recv.tunnel_error()];
        assert_eq!(told.map(|it| it.unwrap().reason()), [reason; 2]);
        for tunnel in [&pair.server, &pair.agent] {
            let accepted = Tunnel::accept(tunnel).await.map(drop).unwrap_err();
            let opened = Tunnel::open(tunnel).await.map(drop).unwrap_err();
            assert_eq!([accepted.reason(), opened.reason()], [reason; 2]);
        }
    });
}

#[test]
fn the_last_handle_closes_the_connection() {
    run(async |pair| {
        let Pair {
            agent,
            server,
            agents_endpoint,
            ..
        } = pair;
        drop(server);
        let error = agent.accept_bi().await.unwrap_err();
        assert!(
            matches!(error, ConnectionError::ApplicationClosed(_)),
            "{error}"
        );
        drop(agent);
        agents_endpoint.wait_idle().await;
    });
}

#[test]
fn a_closed_endpoint_lets_nobody_in() {
    run(async |pair| {
        pair.servers_endpoint
            .close(error_code(CloseReason::Shutdown), b"");
        assert!(pair.servers_endpoint.accept().await.is_none());
        assert!(pair.agent.accept_bi().await.is_err());
        pair.servers_endpoint.wait_idle().await;
    });
}

/// A shard sends a newcomer to another one, on the same port, and there the handshake is finished.
#[test]
fn a_newcomer_is_sent_to_another_shard() {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let test = async {
        let dir = tempfile::tempdir().unwrap();
        let soon = SystemTime::now() + Duration::from_secs(3600);
        Authority::create(dir.path(), &"test.example".parse().unwrap(), soon).unwrap();
        let secret = Secret::load_or_create(dir.path()).unwrap();
        let memory = MemoryBounds::new(Budget::new(1 << 30), 1 << 28);
        let setup = Setup::new(TransportConfig::default(), memory, &mut Registry::default());
        let server = material(&dir, Role::Server, "s1");
        let first = udp::bind_to_share(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let mut group = vec![first];
        udp::widen(&mut group, 2).unwrap();
        steering::steer(&group).unwrap();
        let shards = group.into_iter().zip(0..);
        let shards: Vec<_> = shards
            .map(|(udp, shard)| config::server(udp, &server, &secret, shard, &setup).unwrap())
            .map(|opened| opened.endpoint)
            .collect();
        let address = shards[0].local_addr().unwrap();
        let agent = material(&dir, Role::Agent, "w1");
        for several in [false, true] {
            let spread = (Spread::random(several), 0);
            let (opened, config) = config::client(address, &agent, spread, &setup).unwrap();
            let connecting = opened.endpoint.connect(config, address, "cpc.invalid");
            let accepted = async {
                let (incoming, other) = tokio::select! {
                    incoming = shards[0].accept() => (incoming.unwrap(), 1),
                    incoming = shards[1].accept() => (incoming.unwrap(), 0),
                };
                assert_eq!(incoming.is_placed(), several);
                assert!(incoming.may_retry());
                incoming.retry(other);
                let incoming = shards[usize::from(other)].accept().await.unwrap();
                assert!(!incoming.may_retry());
                incoming.accept().await.unwrap()
            };
            let (agent, server) = tokio::join!(connecting.unwrap(), accepted);
            let mut stream = server.open_bi().await.unwrap();
            stream.0.send(&mut Bytes::from_static(b"?")).await.unwrap();
            let mut other = agent.unwrap().accept_bi().await.unwrap();
            assert_eq!(take(&mut other.1, 1).await, Ok(b"?".to_vec()));
        }
    };
    let test = async { timeout(SOON, test).await.unwrap() };
    LocalSet::new().block_on(&runtime, test);
}
