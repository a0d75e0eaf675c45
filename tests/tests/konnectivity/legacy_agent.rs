//! A stand-in for Konnectivity's agent, with its weaknesses: it walks a load balancer by server
//! ids and holds one stream a server, on which everything is done in turn.
//!
//! An endpoint that does not read stops the whole stream once its queue is full; a CLOSE_REQ drops
//! what is queued for the endpoint; there is no half-close.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::task::{AbortHandle, JoinHandle};
use tonic::Streaming;
use tonic::metadata::MetadataMap;
use tonic::transport::ClientTlsConfig;
use tunnel_tests::client::eventually;

use crate::client::{Client, metadata};
use crate::place::Place;
use crate::script::{Outbox, SOON};
use crate::wire::{self, CONNECT, Packet, Payload};

/// Packets that wait for one endpoint, or for the stream.
const QUEUE: usize = 150;
/// Maximum size of one read from an endpoint, in bytes.
const CHUNK: usize = 4096;
/// Time for an endpoint to accept.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// The most that the agent waits after an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Command line of the agent.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// `host:port`
    pub(crate) server: String,
    pub(crate) tls: ClientTlsConfig,
    pub(crate) id: String,
    /// Identifiers, in the form of `agentidentifiers`.
    pub(crate) identifiers: String,
    pub(crate) token: Option<PathBuf>,
    /// Between two looks at whether there are enough servers; the agent's default is a second.
    pub(crate) interval: Duration,
}

/// A running agent. Dropping it ends it as SIGKILL would.
#[derive(Debug)]
pub(crate) struct LegacyAgent {
    state: Arc<State>,
    walk: AbortHandle,
}

#[derive(Debug)]
struct State {
    options: Options,
    tunnels: Mutex<BTreeMap<String, AbortHandle>>,
    draining: AtomicBool,
    drained: Notify,
}

impl LegacyAgent {
    pub(crate) fn start(place: &Place, options: Options) -> Self {
        let state = Arc::new(State {
            options,
            tunnels: Mutex::default(),
            draining: AtomicBool::new(false),
            drained: Notify::new(),
        });
        let walk = place.spawn(walk(state.clone()));
        Self { state, walk }
    }

    /// The ids of the servers that it has a stream to.
    pub(crate) fn servers(&self) -> Vec<String> {
        self.state.tunnels().keys().cloned().collect()
    }

    /// Waits until it has a stream to `count` servers.
    pub(crate) fn wait_servers(&self, count: usize) -> Result<Vec<String>> {
        eventually(SOON, || {
            let servers = self.servers();
            ensure!(
                servers.len() == count,
                "{} has {servers:?}",
                self.state.options.id
            );
            Ok(servers)
        })
    }

    /// Waits until it has a stream to a server.
    pub(crate) fn wait_any(&self) -> Result<()> {
        eventually(SOON, || {
            ensure!(
                !self.servers().is_empty(),
                "{} has no server",
                self.state.options.id
            );
            Ok(())
        })
    }

    /// Does the work of the first SIGTERM: announces the drain on every stream, and goes on.
    pub(crate) fn drain(&self) {
        self.state.draining.store(true, Ordering::Relaxed);
        self.state.drained.notify_waiters();
    }
}

impl Drop for LegacyAgent {
    fn drop(&mut self) {
        self.walk.abort();
        for tunnel in self.state.tunnels().values() {
            tunnel.abort();
        }
    }
}

impl State {
    fn tunnels(&self) -> MutexGuard<'_, BTreeMap<String, AbortHandle>> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks for servers until it has as many as they say there are.
async fn walk(state: Arc<State>) {
    let (mut count, mut pause) = (1, state.options.interval);
    loop {
        let enough = state.tunnels().len() >= count;
        if !enough && !state.draining.load(Ordering::Relaxed) {
            pause = match connect(&state).await {
                Ok(Some(of)) => {
                    count = of;
                    state.options.interval
                }
                Ok(None) => state.options.interval,
                Err(error) => {
                    println!("{}: {error:#}", state.options.id);
                    (pause * 3 / 2).min(LONGEST_PAUSE)
                }
            };
        }
        tokio::time::sleep(pause).await;
    }
}

/// Opens one stream; gives the number of servers, or nothing if this one is known.
async fn connect(state: &Arc<State>) -> Result<Option<usize>> {
    let options = &state.options;
    let mut entries = vec![
        ("agentid", options.id.as_str()),
        ("agentidentifiers", &options.identifiers),
    ];
    let token = match &options.token {
        Some(path) => Some(format!("Bearer {}", std::fs::read_to_string(path)?)),
        None => None,
    };
    entries.extend(token.as_deref().map(|token| ("authorization", token)));
    let client = Client::tls(options.server.clone(), options.tls.clone()).await?;
    let (outbox, answer) = client.open(CONNECT, metadata(&entries)?);
    let (headers, packets, _) = answer.await?.into_parts();
    let id = one(&headers, "serverid")?;
    let count = one(&headers, "servercount")?.parse()?;
    let mut tunnels = state.tunnels();
    if tunnels.contains_key(&id) {
        return Ok(None);
    }
    let serve = serve(state.clone(), client, outbox, packets);
    let (served, key) = (state.clone(), id.clone());
    let task = tokio::spawn(async move {
        if let Err(error) = serve.await {
            println!("{}: {error:#}", served.options.id);
        }
        served.tunnels().remove(&key);
    });
    tunnels.insert(id, task.abort_handle());
    Ok(Some(count))
}

fn one(headers: &MetadataMap, key: &str) -> Result<String> {
    let values: Vec<_> = headers.get_all(key).iter().collect();
    match values[..] {
        [value] => Ok(value.to_str()?.to_owned()),
        _ => bail!("expected one {key}, got {values:?}"),
    }
}

/// The connections of one stream. Dropping it closes them.
#[derive(Default)]
struct Connections(Mutex<HashMap<i64, Arc<Connection>>>);

impl Connections {
    fn lock(&self) -> MutexGuard<'_, HashMap<i64, Arc<Connection>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for connection in self.lock().values() {
            connection.abort();
        }
    }
}

/// One stream, until it ends: every packet is dealt with before the next one is taken.
async fn serve(
    state: Arc<State>,
    _client: Client,
    outbox: Outbox,
    mut packets: Streaming<Packet>,
) -> Result<()> {
    let connections = Arc::<Connections>::default();
    let mut last = 0;
    loop {
        let packet = tokio::select! {
            packet = packets.message() => packet?,
            () = state.drained.notified() => {
                outbox.send(Ok(wire::drain())).await?;
                continue;
            }
        };
        let Some(packet) = packet else {
            return Ok(());
        };
        match packet.content() {
            Some(Payload::DialRequest(request)) => {
                last += 1;
                let (outbox, connections) = (outbox.clone(), Arc::downgrade(&connections));
                let (address, random, id) = (request.address.clone(), request.random, last);
                tokio::spawn(async move {
                    let dialled = dial(&address).await;
                    let Some(connections) = connections.upgrade() else {
                        return;
                    };
                    let answer = match &dialled {
                        Ok(_) => wire::dialled(id, random),
                        Err(error) => wire::dial_failed(error, random),
                    };
                    let Ok(stream) = dialled else {
                        let _ = outbox.send(Ok(answer)).await;
                        return;
                    };
                    // Known before the answer goes out, so that what follows it is for somebody.
                    let connection = Connection::new(id, stream, outbox.clone());
                    connections.lock().insert(id, connection.clone());
                    if outbox.send(Ok(answer)).await.is_ok() {
                        connection.start(Arc::downgrade(&connections));
                    }
                });
            }
            Some(Payload::Data(data)) if data.connect_id == 0 => (),
            Some(Payload::Data(data)) => {
                let connection = connections.lock().get(&data.connect_id).cloned();
                match connection {
                    // Here the whole stream waits for one endpoint.
                    Some(connection) => connection.queue(data.data.clone()).await,
                    None => {
                        let answer = wire::closed(data.connect_id, "unrecognized connectID");
                        outbox.send(Ok(answer)).await?;
                    }
                }
            }
            Some(Payload::CloseRequest(request)) => {
                let connection = connections.lock().get(&request.connect_id).cloned();
                match connection {
                    Some(connection) => connection.close(&connections).await,
                    None => {
                        let answer = wire::closed(request.connect_id, "Unknown connectID");
                        outbox.send(Ok(answer)).await?;
                    }
                }
            }
            // DIAL_CLS is one of them.
            _ => (),
        }
    }
}

/// Dials as the agent does, with Go's words for what goes wrong.
async fn dial(address: &str) -> Result<TcpStream, String> {
    if let Some((host, _)) = address.split_once(".invalid:") {
        return Err(format!("dial tcp: lookup {host}.invalid: no such host"));
    }
    match tokio::time::timeout(DIAL_LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            Err(format!("dial tcp {address}: connect: connection refused"))
        }
        Ok(Err(error)) => Err(format!("dial tcp {address}: connect: {error}")),
        Err(_) => Err(format!("dial tcp {address}: i/o timeout")),
    }
}

/// A connection to an endpoint.
struct Connection {
    id: i64,
    outbox: Outbox,
    /// Towards the endpoint.
    to_endpoint: mpsc::Sender<Bytes>,
    stream: Mutex<Option<(TcpStream, mpsc::Receiver<Bytes>)>>,
    work: Mutex<Option<Work>>,
    closed: AtomicBool,
}

/// Task of a connection.
struct Work {
    read: JoinHandle<()>,
    send: JoinHandle<()>,
    write: JoinHandle<()>,
}

impl Connection {
    fn new(id: i64, stream: TcpStream, outbox: Outbox) -> Arc<Self> {
        let (to_endpoint, queue) = mpsc::channel(QUEUE);
        Arc::new(Self {
            id,
            outbox,
            to_endpoint,
            stream: Mutex::new(Some((stream, queue))),
            work: Mutex::default(),
            closed: AtomicBool::new(false),
        })
    }

    fn start(self: Arc<Self>, connections: std::sync::Weak<Connections>) {
        let stream = self
            .stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((stream, queue)) = stream else {
            return;
        };
        let (read, write) = stream.into_split();
        let (to_server, from_endpoint) = mpsc::channel(QUEUE);
        let connection = self.clone();
        let work = Work {
            read: tokio::spawn(async move {
                read_endpoint(read, to_server).await;
                // An end of file closes both ways, in a task of its own: it ends this one.
                tokio::spawn(async move {
                    if let Some(connections) = connections.upgrade() {
                        connection.close(&connections).await;
                    }
                });
            }),
            send: tokio::spawn(send_data(self.id, from_endpoint, self.outbox.clone())),
            write: tokio::spawn(write_endpoint(write, queue)),
        };
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = Some(work);
    }

    async fn queue(&self, data: Bytes) {
        // What comes for an endpoint that is gone is dropped.
        let _ = self.to_endpoint.send(data).await;
    }

    /// Sends what the endpoint has said, answers, and closes: what is queued for it is lost.
    async fn close(&self, connections: &Connections) {
        if self.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        let work = self
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(work) = work {
            work.read.abort();
            let _ = work.send.await;
            let _ = self.outbox.send(Ok(wire::closed(self.id, ""))).await;
            work.write.abort();
        }
        connections.lock().remove(&self.id);
    }

    fn abort(&self) {
        let work = self
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(work) = work {
            work.read.abort();
            work.send.abort();
            work.write.abort();
        }
    }
}

async fn read_endpoint(mut read: OwnedReadHalf, queue: mpsc::Sender<Bytes>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = read.read(&mut buffer).await {
        let chunk = Bytes::copy_from_slice(&buffer[..count]);
        if queue.send(chunk).await.is_err() {
            return;
        }
    }
}

async fn send_data(id: i64, mut queue: mpsc::Receiver<Bytes>, outbox: Outbox) {
    while let Some(chunk) = queue.recv().await {
        if outbox.send(Ok(wire::data(id, chunk))).await.is_err() {
            return;
        }
    }
}

async fn write_endpoint(mut write: OwnedWriteHalf, mut queue: mpsc::Receiver<Bytes>) {
    let mut broken = false;
    while let Some(chunk) = queue.recv().await {
        // Taken off the queue all the same, for the stream's sake.
        broken = broken || write.write_all(&chunk).await.is_err();
    }
}
