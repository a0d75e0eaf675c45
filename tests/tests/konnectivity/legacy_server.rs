//! A stand-in for Konnectivity's server, with its weaknesses: one stream an agent, on which what
//! one client does not take stops everybody, and no half-close.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::transport::ServerTlsConfig;
use tonic::{Status, Streaming};
use tunnel_tests::client::eventually;

use crate::client::metadata;
use crate::legacy_connect;
use crate::place::Place;
use crate::script::{Outbox, SOON};
use crate::service::{Incoming, Streams};
use crate::wire::{self, CONNECT, DialRequest, PROXY, Packet, Payload};

/// Command line of the server.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) id: String,
    pub(crate) count: usize,
    /// Address for agents.
    pub(crate) agents: SocketAddr,
    /// Whether an agent may be asked that has not named the destination: the strategy default
    /// behind destHost.
    pub(crate) any: bool,
    pub(crate) tls: ServerTlsConfig,
    /// The one way in for clients.
    pub(crate) frontend: Option<Frontend>,
}

/// A Unix socket for clients.
#[derive(Clone, Debug)]
pub(crate) enum Frontend {
    Grpc(PathBuf),
    HttpConnect(PathBuf),
}

/// A running server. Dropping it ends it as SIGKILL would, once its [`Place`] is gone as well.
#[derive(Debug)]
pub(crate) struct LegacyServer {
    state: Arc<State>,
    _place: Place,
}

#[derive(Debug)]
pub(crate) struct State {
    options: Options,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    /// In the order in which they came.
    backends: Vec<Arc<Backend>>,
    pending: HashMap<i64, Arc<dyn Client>>,
    /// By agent and connection, as the peer does: two streams of one agent share the numbers.
    established: HashMap<(String, i64), Established>,
    /// For [`State::choose`].
    turn: usize,
}

#[derive(Debug)]
struct Established {
    client: Arc<dyn Client>,
    backend: Arc<Backend>,
}

/// One agent's stream.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) agent: String,
    hosts: Vec<String>,
    outbox: Outbox,
    gone: watch::Receiver<bool>,
    draining: AtomicBool,
}

impl Backend {
    /// Sends to the agent; waits while it does not read.
    pub(crate) async fn send(&self, packet: Packet) -> Result<()> {
        self.outbox
            .send(Ok(packet))
            .await
            .ok()
            .context("the agent is gone")
    }

    /// Waits until the agent's stream has ended.
    pub(crate) async fn gone(&self) {
        // The sender is dropped with the stream.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
    }
}

/// Client that requested a connection; the agent's stream waits until the client has taken its
/// packet.
pub(crate) trait Client: std::fmt::Debug + Send + Sync {
    /// Gives it a packet that the agent sent for it.
    fn deliver<'a>(&'a self, packet: Packet) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

    /// Returns the number of the server's stream, 0 if none.
    fn stream(&self) -> u64 {
        0
    }
}

impl LegacyServer {
    /// Starts it in a namespace.
    pub(crate) fn start(place: Place, options: Options) -> Result<Self> {
        let address = options.agents;
        let listener = place.run(async move { Ok(TcpListener::bind(address).await?) })?;
        let state = Arc::new(State {
            options: options.clone(),
            tables: Mutex::default(),
        });
        let served = state.clone();
        let agents = Streams::new(move |incoming| {
            tokio::spawn(serve_agent(served.clone(), incoming));
        });
        place.spawn(async move {
            if let Err(error) = agents.serve_tls(listener, options.tls).await {
                println!("{}: {error:#}", options.id);
            }
        });
        match options.frontend {
            Some(Frontend::Grpc(path)) => {
                let served = state.clone();
                let clients = Streams::new(move |incoming| {
                    tokio::spawn(serve_client(served.clone(), incoming));
                });
                // What an earlier one left.
                let _ = std::fs::remove_file(&path);
                place.spawn(async move {
                    if let Err(error) = clients.serve_unix(&path).await {
                        println!("{}: {error:#}", path.display());
                    }
                });
            }
            Some(Frontend::HttpConnect(path)) => {
                let _ = std::fs::remove_file(&path);
                let served = state.clone();
                place.spawn(async move {
                    if let Err(error) = legacy_connect::serve(served, &path).await {
                        println!("{}: {error:#}", path.display());
                    }
                });
            }
            None => (),
        }
        Ok(Self {
            state,
            _place: place,
        })
    }

    /// The ids of the agents that are connected, once for each of their streams.
    pub(crate) fn agents(&self) -> Vec<String> {
        self.state
            .tables()
            .backends
            .iter()
            .map(|backend| backend.agent.clone())
            .collect()
    }

    /// Waits until `count` streams of agents are there.
    pub(crate) fn wait_agents(&self, count: usize) -> Result<Vec<String>> {
        eventually(SOON, || {
            let agents = self.agents();
            ensure!(agents.len() == count, "{agents:?} are connected");
            Ok(agents)
        })
    }

    /// Returns the numbers of its connections, and of dials that wait for an answer.
    pub(crate) fn connections(&self) -> (usize, usize) {
        let tables = self.state.tables();
        (tables.established.len(), tables.pending.len())
    }
}

impl State {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By destination host, then any if that is allowed. Who drains is the last
    /// resort.
    pub(crate) fn choose(&self, destination: &str) -> Result<Arc<Backend>> {
        let host = destination
            .rsplit_once(':')
            .map_or(destination, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let mut tables = self.tables();
        tables.turn += 1;
        let turn = tables.turn;
        let named = tables
            .backends
            .iter()
            .filter(|one| one.hosts.iter().any(|own| own == host));
        let any = tables.backends.iter().filter(|_| self.options.any);
        for found in [named.collect::<Vec<_>>(), any.collect()] {
            let draining = |one: &&Arc<Backend>| one.draining.load(Ordering::Relaxed);
            let willing: Vec<_> = found.iter().copied().filter(|one| !draining(one)).collect();
            let from = if willing.is_empty() { found } else { willing };
            if !from.is_empty() {
                return Ok(from[turn % from.len()].clone());
            }
        }
        anyhow::bail!("No agent available")
    }

    pub(crate) fn add_pending(&self, random: i64, client: Arc<dyn Client>) {
        self.tables().pending.insert(random, client);
    }

    pub(crate) fn remove_pending(&self, random: i64) -> Option<Arc<dyn Client>> {
        self.tables().pending.remove(&random)
    }
}

/// One agent's stream, until it ends.
async fn serve_agent(state: Arc<State>, incoming: Incoming) {
    let entries = incoming.metadata.clone();
    if incoming.path != CONNECT {
        return incoming.refuse(Status::unimplemented("unknown method"));
    }
    let ids: Vec<_> = entries
        .get_all("agentid")
        .iter()
        .filter_map(|id| id.to_str().ok())
        .collect();
    let [agent] = ids[..] else {
        let text = format!("expected one agent ID in the context, got {ids:?}");
        return incoming.refuse(Status::unknown(text));
    };
    let identifiers = entries
        .get("agentidentifiers")
        .and_then(|text| text.to_str().ok());
    let identifiers = identifiers.unwrap_or_default().split('&');
    let of_host = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        ["ipv4", "ipv6", "host"]
            .contains(&key)
            .then(|| value.replace("%3A", ":"))
    };
    let hosts = identifiers.filter_map(of_host).collect();
    let count = state.options.count.to_string();
    let headers = metadata(&[("serverid", &state.options.id), ("servercount", &count)]);
    let (outbox, packets) = incoming.accept(headers.unwrap_or_default());
    let (leave, gone) = watch::channel(false);
    let (agent, draining) = (agent.to_owned(), false.into());
    let backend = Arc::new(Backend {
        agent,
        hosts,
        outbox,
        gone,
        draining,
    });
    state.tables().backends.push(backend.clone());
    if let Err(status) = route(&state, &backend, packets).await {
        println!("{}: {status}", backend.agent);
    }
    let _ = leave.send(true);
    let lost: Vec<_> = {
        let mut tables = state.tables();
        tables
            .backends
            .retain(|other| !Arc::ptr_eq(other, &backend));
        let of_agent =
            |_: &(String, i64), one: &mut Established| Arc::ptr_eq(&one.backend, &backend);
        tables.established.extract_if(of_agent).collect()
    };
    // Those that wait for an answer are forgotten, as the peer forgets them.
    for ((_, id), established) in lost {
        established.client.deliver(wire::closed(id, "")).await;
    }
}

/// Gives an agent's packets to whom they are for, one at a time.
async fn route(
    state: &State,
    backend: &Arc<Backend>,
    mut packets: Streaming<Packet>,
) -> Result<(), Status> {
    let key = |id: i64| (backend.agent.clone(), id);
    while let Some(packet) = packets.message().await? {
        match packet.content() {
            Some(Payload::DialResponse(response)) => {
                let client = state.remove_pending(response.random);
                let (id, failed) = (response.connect_id, !response.error.is_empty());
                match client {
                    Some(client) => {
                        if !failed {
                            let (client, backend) = (client.clone(), backend.clone());
                            let established = Established { client, backend };
                            state.tables().established.insert(key(id), established);
                        }
                        client.deliver(packet).await;
                    }
                    None if id != 0 => drop(backend.send(wire::close(id)).await),
                    None => (),
                }
            }
            Some(Payload::Data(data)) if data.connect_id == 0 => (),
            Some(Payload::Data(data)) => {
                let id = data.connect_id;
                let client = state
                    .tables()
                    .established
                    .get(&key(id))
                    .map(|one| one.client.clone());
                match client {
                    // Here the agent's whole stream waits for one client.
                    Some(client) => client.deliver(packet).await,
                    None => drop(backend.send(wire::close(id)).await),
                }
            }
            Some(Payload::CloseResponse(response)) => {
                let established = state.tables().established.remove(&key(response.connect_id));
                if let Some(established) = established {
                    established.client.deliver(packet).await;
                }
            }
            Some(Payload::CloseDial(close)) => {
                if let Some(client) = state.remove_pending(close.random) {
                    client.deliver(packet).await;
                }
            }
            Some(Payload::Drain(_)) => {
                backend.draining.store(true, Ordering::Relaxed);
            }
            _ => (),
        }
    }
    Ok(())
}

/// A client's stream.
#[derive(Debug)]
struct GrpcClient {
    stream: u64,
    outbox: Outbox,
}

impl Client for GrpcClient {
    fn deliver<'a>(&'a self, packet: Packet) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        // A client that is gone wants nothing.
        Box::pin(async move { drop(self.outbox.send(Ok(packet)).await) })
    }

    fn stream(&self) -> u64 {
        self.stream
    }
}

/// One client's stream, until it ends: one connection, as the client library has it.
async fn serve_client(state: Arc<State>, incoming: Incoming) {
    static STREAMS: AtomicU64 = AtomicU64::new(1);
    if incoming.path != PROXY {
        return incoming.refuse(Status::unimplemented("unknown method"));
    }
    let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
    let (outbox, mut packets) = incoming.accept(MetadataMap::new());
    let client = Arc::new(GrpcClient { stream, outbox });
    let mut backend = None;
    if proxy(&state, &client, &mut backend, &mut packets)
        .await
        .is_ok()
    {
        // It is read to its end all the same.
        while let Ok(Some(_)) = packets.message().await {}
    }
    let (pending, established): (Vec<_>, Vec<_>) = {
        let mut tables = state.tables();
        let own = |other: &Arc<dyn Client>| other.stream() == stream;
        let pending = tables.pending.extract_if(|_, one| own(one)).collect();
        let established = tables
            .established
            .extract_if(|_, one| own(&one.client))
            .collect();
        (pending, established)
    };
    for (random, _) in pending {
        if let Some(backend) = &backend {
            let _ = backend.send(wire::close_dial(random)).await;
        }
    }
    for ((_, id), established) in established {
        let _ = established.backend.send(wire::close(id)).await;
    }
}

async fn proxy(
    state: &State,
    client: &Arc<GrpcClient>,
    backend: &mut Option<Arc<Backend>>,
    packets: &mut Streaming<Packet>,
) -> Result<(), Status> {
    let mut first = None;
    while let Some(packet) = packets.message().await? {
        match (packet.content(), backend.as_ref()) {
            (
                Some(Payload::DialRequest(DialRequest {
                    address, random, ..
                })),
                _,
            ) => {
                let chosen = match state.choose(address) {
                    Ok(chosen) => backend.insert(chosen),
                    Err(error) => {
                        client.deliver(wire::dial_failed(error, *random)).await;
                        return Ok(());
                    }
                };
                let random = *random;
                state.add_pending(random, client.clone());
                if let Err(error) = chosen.send(packet).await {
                    state.remove_pending(random);
                    client.deliver(wire::dial_failed(error, random)).await;
                    return Ok(());
                }
            }
            (Some(Payload::CloseRequest(request)), None) => {
                let answer = wire::closed(request.connect_id, "backend uninitialized");
                client.deliver(answer).await;
            }
            (Some(Payload::CloseRequest(request)), Some(backend)) => {
                let id = request.connect_id;
                if backend.send(packet).await.is_err() {
                    client
                        .deliver(wire::closed(id, "CLOSE_REQ to backend failed"))
                        .await;
                }
                return Ok(());
            }
            (Some(Payload::CloseDial(close)), _) => drop(state.remove_pending(close.random)),
            (Some(Payload::Data(data)), None) => {
                let answer = wire::closed(data.connect_id, "backend not initialized");
                client.deliver(answer).await;
                return Ok(());
            }
            (Some(Payload::Data(data)), Some(_)) if data.connect_id == 0 => (),
            (Some(Payload::Data(data)), Some(backend)) => {
                let id = data.connect_id;
                let first = *first.get_or_insert(id);
                if first == id {
                    let _ = backend.send(packet).await;
                    continue;
                }
                for id in [id, first] {
                    let _ = backend.send(wire::close(id)).await;
                    client
                        .deliver(wire::closed(id, "mismatched connection IDs"))
                        .await;
                }
                return Ok(());
            }
            _ => (),
        }
    }
    Ok(())
}
