//! A server with a genuine certificate that does not keep to the protocol. The agent must outlive
//! it, say what it did, and go on serving the honest one.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use serde_json::json;
use tokio::runtime::Handle;
use tunnel_proto::control::VERSION;
use tunnel_proto::preface::{ConnectionId, DialRequest, DialResponse};
use tunnel_proto::session::{InstanceId, ServerEvent, ServerSession, Timers, Welcome};
use tunnel_tests::lab::{self, address};

use crate::peer::{self, Credentials};
use crate::scene::{SOON, Scene, runtime};

/// Streams that an agent lets a server have open at once.
/// One for the notices about sessions is among them.
const MAX_STREAMS: usize = 8193;

/// After which an agent that has not granted a stream grants none.
const PAUSE: Duration = Duration::from_secs(1);

/// A laboratory in which something else answers at a second address, with a server's certificate.
struct Impostor {
    scene: Scene,
    runtime: Handle,
    connections: std::sync::mpsc::Receiver<Connection>,
}

fn place() -> SocketAddr {
    (address::server(1), 9000).into()
}

impl Impostor {
    /// Creates a server that lets the agent open `streams` streams.
    fn new(streams: u32) -> Result<Self> {
        let runtime = runtime()?;
        let (send, connections) = std::sync::mpsc::channel();
        let scene = Scene::new(|lab| {
            let folder = lab.folder().join("s2");
            let out = folder.to_str().context("the folder's name is not UTF-8")?;
            lab.pki().run("server", &["--id", "s2", "--out", out])?;
            let credentials = Credentials::read(&folder, "server")?;
            let netns = &lab.control_plane.netns;
            let socket = netns.enter(|| Ok(UdpSocket::bind(place())?))?;
            let endpoint = peer::server(&runtime, socket, &credentials, streams)?;
            runtime.spawn(async move {
                while let Some(incoming) = endpoint.accept().await {
                    if let Ok(connection) = incoming.await {
                        let _ = send.send(connection);
                    }
                }
            });
            lab.control_plane.servers[0]
                .daemon
                .configure(|config| config["server_count"] = json!(2))?;
            lab.workers[0].agent()?.configure(|config| {
                if let Some(servers) = config["servers"].as_array_mut() {
                    servers.push(json!(place()));
                }
            })
        })?;
        Ok(Self {
            scene,
            runtime,
            connections,
        })
    }

    /// The next connection of the agent.
    fn accept(&self) -> Result<Connection> {
        let next = self.connections.recv_timeout(2 * SOON);
        next.context("the agent does not dial the impostor")
    }

    /// The next connection of the agent, with its control stream.
    fn accept_control(&self) -> Result<(Connection, SendStream, RecvStream)> {
        let connection = self.accept()?;
        let (send, recv) = self.runtime.block_on(connection.accept_bi())?;
        Ok((connection, send, recv))
    }

    /// The next connection of the agent, welcomed by a server that calls itself `id`.
    fn welcome(&self, id: &str) -> Result<(Connection, SendStream, RecvStream)> {
        let (connection, mut send, mut recv) = self.accept_control()?;
        let mut session = ServerSession::new(Timers::default(), Instant::now());
        self.runtime.block_on(async {
            loop {
                let chunk = recv.read_chunk(1 << 16, true).await?.context("no hello")?;
                session.handle_bytes(&chunk.bytes, Instant::now())?;
                if let Some(ServerEvent::Hello(hello)) = session.poll_event() {
                    let welcome = Welcome {
                        version: VERSION,
                        server_id: id.into(),
                        server_count: 2,
                        instance_id: InstanceId([9; 16]),
                        accepted: hello.offer,
                        refused: Vec::new(),
                        heartbeat: Duration::from_secs(60),
                        incarnation: 0,
                    };
                    session.welcome(welcome, Instant::now())?;
                    break;
                }
            }
            while let Some(mut bytes) = session.poll_transmit() {
                send.write_chunk(std::mem::take(&mut bytes)).await?;
            }
            anyhow::Ok(())
        })?;
        Ok((connection, send, recv))
    }

    /// The agent says `why` of the impostor.
    fn said(&mut self, pieces: &[&str]) -> Result<()> {
        self.scene.agent()?.wait_log(2 * SOON, 0, pieces).map(drop)
    }
}

/// No stream, silence, and nonsense in place of a welcome: each time the agent gives up in
/// bounded time, says why, and tries again.
#[test]
fn an_agent_gives_up_a_server_that_does_not_welcome_it() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut impostor = Impostor::new(1)?;
    let unreached = "server not reached";
    let address = place().to_string();

    let (first, mut send, _recv) = impostor.accept_control()?;
    let nonsense = Bytes::from_static(&[0xbf, 0xff, 0xff, 0xff, 0, 0, 0]);
    impostor.runtime.block_on(send.write_all(&nonsense))?;
    impostor.said(&["WARN", unreached, &address, "over the limit"])?;
    drop(first);

    let (second, mut send, _recv) = impostor.accept_control()?;
    impostor
        .runtime
        .block_on(send.write_all(&[4, 0xff, 0xff, 0xff, 0xff]))?;
    impostor.said(&["WARN", unreached, &address, "could not be read"])?;
    drop(second);

    let (third, mut send, _recv) = impostor.accept_control()?;
    send.finish()?;
    impostor.said(&["WARN", unreached, &address, "closed the control stream"])?;
    drop(third);

    // Held on to: the agent must not wait for our patience to end.
    let _silent = impostor.accept_control()?;
    impostor.said(&["WARN", unreached, &address, "did not introduce itself"])?;
    impostor.scene.unharmed()
}

/// A server that gives the agent no stream for its Hello does not hold it up without end.
#[test]
fn an_agent_gives_up_a_server_that_takes_no_stream() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut impostor = Impostor::new(0)?;
    let _held = impostor.accept()?;
    let address = place().to_string();
    impostor.said(&["WARN", "server not reached", &address])?;
    let _again = impostor.accept()?;
    impostor.scene.unharmed()
}

/// A server is who its certificate says: it can't take the place of another by its Welcome.
#[test]
fn a_server_can_not_take_anothers_name() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut impostor = Impostor::new(1)?;
    let _held = impostor.welcome("s1")?;
    let address = place().to_string();
    impostor.said(&["WARN", "server not reached", &address, "s1", "server/s2"])?;
    let status = impostor.scene.agent()?.wait_status(SOON, |_| true)?;
    let servers = status["servers"].as_array().context("no servers")?;
    assert_eq!(servers.len(), 1, "{status}");
    assert_eq!(servers[0]["address"], json!(impostor.scene.tunnel()));
    impostor.scene.unharmed()
}

/// Dial requests that make no sense are answered as such on their own stream; the tunnel lives.
#[test]
fn senseless_dial_requests_end_alone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut impostor = Impostor::new(1)?;
    let (connection, _send, _recv) = impostor.welcome("s2")?;
    let dial = |bytes: Bytes| {
        let connection = connection.clone();
        impostor.runtime.block_on(async move {
            let (mut send, mut recv) = connection.open_bi().await?;
            // The agent may stop the stream before all of it is sent.
            let _ = send.write_all(&bytes).await;
            let answer = tokio::time::timeout(SOON, recv.read_to_end(4096)).await;
            anyhow::Ok(answer.context("no answer")??)
        })
    };
    let refused = |bytes: Bytes| -> Result<String> {
        match DialResponse::decode(&dial(bytes)?)? {
            Some((DialResponse::Refused { reason, .. }, _)) => Ok(reason.label().to_owned()),
            other => anyhow::bail!("answered {other:?}"),
        }
    };
    let request = |destination: &str| -> Result<Bytes> {
        let mut bytes = BytesMut::new();
        DialRequest {
            session: None,
            id: ConnectionId([1; 16]),
            destination: destination.parse()?,
            deadline: Duration::from_secs(5),
            attempt: 0,
        }
        .encode(&mut bytes);
        Ok(bytes.freeze())
    };
    // An unknown kind of stream, a body of 2^30 bytes, a body that is none, a megabyte of zeros.
    let unknown = Bytes::from_static(&[0x3f, 0]);
    let endless = Bytes::from_static(&[1, 0xc0, 0, 0, 0, 0x40, 0, 0, 0]);
    let empty = Bytes::from_static(&[1, 0]);
    let zeros = Bytes::from(vec![0; 1 << 20]);
    assert_eq!(refused(unknown)?, "unsupported_kind");
    assert_eq!(refused(endless)?, "malformed_dial");
    assert_eq!(refused(empty)?, "malformed_dial");
    assert_eq!(refused(zeros)?, "unsupported_kind");
    // What the agent may not dial, it does not dial for a genuine server either.
    for forbidden in [
        "127.0.0.1:8136",
        "169.254.169.254:80",
        "10.99.1.2:22",
        "localhost:8136",
    ] {
        assert_eq!(
            refused(request(forbidden)?)?,
            "policy_denied",
            "{forbidden}"
        );
    }
    impostor.said(&["WARN", "request refused", "s2"])?;
    ensure!(connection.close_reason().is_none(), "the tunnel was ended");
    impostor.scene.unharmed()
}

/// The server opens as many streams as the agent grants, none with a request. The agent gives each
/// up in time, and its memory and the honest server's dials are as before.
#[test]
fn streams_without_a_request_are_given_up() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut impostor = Impostor::new(1)?;
    let (connection, _send, _recv) = impostor.welcome("s2")?;
    let stopped = impostor.runtime.block_on(async {
        let mut held = Vec::new();
        // One more than is granted has to wait, for as long as these stay open.
        while let Ok(stream) = tokio::time::timeout(PAUSE, connection.open_bi()).await {
            let (mut send, recv) = stream?;
            send.write_all(&[1]).await?;
            held.push((send, recv));
        }
        ensure!(
            held.len() == MAX_STREAMS,
            "{} streams were granted",
            held.len()
        );
        let mut stopped = 0;
        for (send, _recv) in &held {
            let end = tokio::time::timeout(2 * SOON, send.stopped()).await;
            stopped += usize::from(end.context("a stream was kept")??.is_some());
        }
        anyhow::Ok(stopped)
    })?;
    assert_eq!(stopped, MAX_STREAMS);
    connection.close(0_u32.into(), b"");
    // What a stream costs while it is there; the allocator keeps it for the next ones.
    impostor.scene.spare(4 * MAX_STREAMS as u64);
    impostor.scene.unharmed()
}
