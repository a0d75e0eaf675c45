//! An agent with a genuine certificate that does not keep to the protocol.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use serde_json::Value;
use tokio::runtime::Handle;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::{self, Envelope, Offer, Ping, envelope::Message};
use tunnel_proto::varint::VarInt;
use tunnel_tests::client::connect_through;
use tunnel_tests::lab::{self, address};

use crate::peer::{self, Credentials};
use crate::scene::{SOON, Scene, runtime};

/// A laboratory in which worker 2's certificate is in the wrong hands.
struct Stolen {
    scene: Scene,
    runtime: Handle,
    credentials: Credentials,
}

impl Stolen {
    fn new() -> Result<Self> {
        let scene = Scene::new(|lab| {
            lab.control_plane.servers[0]
                .daemon
                .configure(|config| config["limits"] = serde_json::json!({"dial_timeout": "2s"}))
        })?;
        let credentials = Credentials::read(&scene.folder("w2/agent"), "agent")?;
        Ok(Self {
            scene,
            runtime: runtime()?,
            credentials,
        })
    }

    /// A connection with its control stream; the agent lets the server open `dials` streams.
    fn connect(&self, dials: u32) -> Result<(Connection, SendStream, RecvStream)> {
        let netns = &self.scene.lab.workers[1].netns;
        let endpoint = peer::agent(
            &self.runtime,
            netns.enter(peer::any_port)?,
            Some(&self.credentials),
            dials,
        )?;
        self.runtime.block_on(async {
            let connection = peer::dial(&endpoint, self.scene.tunnel()).await?;
            let (send, recv) = connection.open_bi().await?;
            Ok((connection, send, recv))
        })
    }

    /// A connection that has been welcomed.
    fn welcomed(&self, dials: u32) -> Result<(Connection, SendStream, RecvStream)> {
        let (connection, mut send, mut recv) = self.connect(dials)?;
        let hello = peer::introduction("w2", &address::nodes(2))?;
        self.runtime.block_on(async {
            send.write_all(&hello).await?;
            recv.read_chunk(1, true).await?.context("no welcome")?;
            anyhow::Ok(())
        })?;
        Ok((connection, send, recv))
    }

    /// The server ends the connection with `reason`, tells the agent and the log why.
    fn ended(&mut self, connection: &Connection, reason: CloseReason, why: &str) -> Result<()> {
        let ended = peer::ended_by_peer(connection, SOON);
        let (code, text) = self.runtime.block_on(ended).context(why.to_owned())?;
        assert_eq!(code.into_inner(), reason.code(), "{text}");
        ensure!(text.contains(why), "told {text:?}, not {why:?}");
        let pieces = ["agent disconnected", "agent/w2", reason.label(), why];
        self.scene.server().wait_log(SOON, 0, &pieces).map(drop)
    }
}

fn frame(message: Message) -> Result<Bytes> {
    let envelope = Envelope {
        message: Some(message),
    };
    Ok(control::encode(&envelope)?)
}

/// A length of 2^30 and no more.
fn oversized() -> Bytes {
    let mut head = BytesMut::new();
    VarInt::from(1_u32 << 29).encode(&mut head);
    head.put_bytes(0, 100_000);
    head.freeze()
}

/// Anything but a message on the control stream ends that agent's connection, with a reason for it
/// and a line in the log, and nothing else.
#[test]
fn senseless_control_streams_end_alone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut stolen = Stolen::new()?;
    // These begin now and are looked at in the end: no control stream, and half a message on one.
    let netns = stolen.scene.lab.workers[1].netns.clone();
    let endpoint = peer::agent(
        &stolen.runtime,
        netns.enter(peer::any_port)?,
        Some(&stolen.credentials),
        10,
    )?;
    let without_stream = stolen
        .runtime
        .block_on(peer::dial(&endpoint, stolen.scene.tunnel()))?;
    let (half, mut half_send, _half_recv) = stolen.connect(10)?;
    stolen.runtime.block_on(half_send.write_all(&[0x40]))?;

    let second = peer::introduction("w2", &[])?;
    let crowd = Offer {
        addresses: (0..1025).map(|n| format!("10.99.2.{}", n % 256)).collect(),
        ..Offer::default()
    };
    let hello = control::Hello {
        version: Some(control::VERSION),
        agent_id: "w2".into(),
        instance_id: vec![7; 16],
        node: "w2".into(),
        software_version: "0".into(),
        offer: Some(crowd),
        ..control::Hello::default()
    };
    let malformed = Bytes::from_static(&[4, 0xff, 0xff, 0xff, 0xff]);
    let first = [
        (oversized(), "over the limit"),
        (malformed.clone(), "could not be read"),
        (frame(Message::Ping(Ping { seq: 1 }))?, "out of turn"),
        (frame(Message::Hello(hello))?, "1025 claims"),
    ];
    for (bytes, why) in first {
        let (connection, mut send, _recv) = stolen.connect(10)?;
        stolen.runtime.block_on(send.write_all(&bytes))?;
        stolen.ended(&connection, CloseReason::ProtocolError, why)?;
    }
    for (bytes, why) in [
        (oversized(), "over the limit"),
        (malformed, "could not be read"),
        (second, "out of turn"),
    ] {
        let (connection, mut send, _recv) = stolen.welcomed(10)?;
        stolen.runtime.block_on(send.write_all(&bytes))?;
        stolen.ended(&connection, CloseReason::ProtocolError, why)?;
    }
    let (connection, mut send, _recv) = stolen.welcomed(10)?;
    send.finish()?;
    stolen.ended(
        &connection,
        CloseReason::ProtocolError,
        "closed the control stream",
    )?;

    let mute = peer::ended_by_peer(&without_stream, SOON);
    // Dropped by the handshake's time limit: there is no session that could say why.
    ensure!(stolen.runtime.block_on(mute).is_ok(), "a mute agent stays");
    let pieces = ["WARN", "handshake not finished in time"];
    stolen.scene.server().wait_log(SOON, 0, &pieces)?;
    let why = "did not introduce itself";
    stolen.ended(&half, CloseReason::HandshakeTimeout, why)?;
    stolen.scene.unharmed()
}

/// QUIC itself gives an agent no stream beside its control stream.
#[test]
fn an_agent_opens_nothing_towards_the_control_plane() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let stolen = Stolen::new()?;
    let (connection, _send, _recv) = stolen.welcomed(10)?;
    let waited = stolen.runtime.block_on(async {
        let limit = Duration::from_secs(1);
        let bi = tokio::time::timeout(limit, connection.open_bi()).await;
        let uni = tokio::time::timeout(limit, connection.open_uni()).await;
        (bi.is_err(), uni.is_err())
    });
    assert_eq!(waited, (true, true), "a further stream was opened");
    ensure!(connection.close_reason().is_none());
    ensure!(
        connection.max_datagram_size().is_none(),
        "datagrams are taken"
    );
    stolen.scene.unharmed()
}

/// An agent that makes the server answer and never reads is ended before the answers pile up.
#[test]
fn an_agent_that_never_reads_is_ended() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut stolen = Stolen::new()?;
    let (connection, mut send, _recv) = stolen.welcomed(10)?;
    let ping = frame(Message::Ping(Ping { seq: u64::MAX }))?;
    let pings = Bytes::from(ping.repeat(1000));
    let flood = async {
        // Until the connection ends: what fits into the stream's window comes first.
        while send.write_all(&pings).await.is_ok() {}
    };
    let limited = async { tokio::time::timeout(2 * SOON, flood).await };
    let ended = stolen.runtime.block_on(limited);
    ended.context("the flood was taken for ever")?;
    // Among so many packets the one with the reason may be lost on its way.
    ensure!(connection.close_reason().is_some());
    let pieces = [
        "agent disconnected",
        "agent/w2",
        "protocol_error",
        "does not read",
    ];
    stolen.scene.server().wait_log(SOON, 0, &pieces)?;
    stolen.scene.unharmed()
}

/// Claims beyond the certificate and the grants are refused one by one and shown; another's node
/// address stays with its owner.
#[test]
fn an_agent_that_claims_everything_gets_its_own() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut stolen = Stolen::new()?;
    let (connection, mut send, mut recv) = stolen.connect(10)?;
    let own = address::node(2).to_string();
    let greed = Offer {
        addresses: vec![
            own.clone(),
            address::node(1).to_string(),
            "127.0.0.1".into(),
        ],
        cidrs: vec!["0.0.0.0/0".into(), "::/0".into(), "10.99.1.0/24".into()],
        names: vec!["*.svc.cluster.local".into()],
        default_route: true,
    };
    let hello = control::Hello {
        version: Some(control::VERSION),
        agent_id: "w1".into(),
        instance_id: vec![7; 16],
        node: "w1".into(),
        software_version: "0".into(),
        offer: Some(greed),
        ..control::Hello::default()
    };
    let hello = frame(Message::Hello(hello))?;
    stolen.runtime.block_on(async {
        send.write_all(&hello).await?;
        recv.read_chunk(1, true).await?.context("no welcome")?;
        anyhow::Ok(())
    })?;
    let server = stolen.scene.server();
    let status = server.wait_status(SOON, |status| row(status, "w2").is_some())?;
    let thief = row(&status, "w2").context("not connected")?;
    assert_eq!(thief["routes"], serde_json::json!([own]), "{status}");
    let refused = thief["refused"].as_array().context("no list")?;
    assert_eq!(refused.len(), 7, "{status}");
    ensure!(
        refused.iter().all(|it| it["why"]
            .as_str()
            .is_some_and(|why| why.contains("not granted"))),
        "{status}"
    );
    server.wait_log(
        SOON,
        0,
        &["WARN", "claims refused", "agent/w2", "0.0.0.0/0"],
    )?;
    assert_eq!(stolen.scene.metric("cpc_claims_refused_total")?, 7.0);
    drop(connection);
    stolen.scene.unharmed()
}

/// An agent that says again and again that it drains, and offers without end what it may not serve, costs
/// a few lines and the lines' count; its neighbours notice nothing.
#[test]
fn what_an_agent_repeats_fills_no_log() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut stolen = Stolen::new()?;
    let (_connection, mut send, mut recv) = stolen.welcomed(10)?;
    let offer = |n: u32| {
        let offer = Offer {
            cidrs: vec![format!("10.88.{n}.0/24")],
            ..Offer::default()
        };
        frame(Message::Routes(control::Routes { offer: Some(offer) }))
    };
    let drain = frame(Message::Drain(control::Drain {
        deadline_ms: 60_000,
        reason: CloseReason::Shutdown.code(),
    }))?;
    stolen
        .runtime
        .spawn(async move { while let Ok(Some(_)) = recv.read_chunk(1 << 16, true).await {} });
    stolen.runtime.block_on(async {
        for n in 0..200 {
            send.write_all(&drain.repeat(100)).await?;
            // The same twice, and then another.
            send.write_all(&offer(n)?).await?;
            send.write_all(&offer(n)?).await?;
        }
        anyhow::Ok(())
    })?;
    let last = "10.88.199.0/24";
    let server = stolen.scene.server();
    server.wait_status(SOON, |status| {
        row(status, "w2").is_some_and(|it| it["refused"][0]["claim"] == last)
    })?;
    let log = server.log();
    let count = |piece: &str| log.lines().filter(|line| line.contains(piece)).count();
    assert_eq!(count("agent is draining"), 1, "{log}");
    let refusals = count("claims refused");
    ensure!((1..150).contains(&refusals), "{refusals} lines in {log}");
    assert_eq!(stolen.scene.metric("cpc_claims_refused_total")?, 200.0);
    let suppressed = stolen.scene.metric("cpc_log_lines_suppressed_total")?;
    assert_eq!(suppressed, 200.0 - refusals as f64, "{log}");
    stolen.scene.unharmed()
}

fn row<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    let identity = format!("spiffe://cluster.local/agent/{name}");
    let agents = status["agents"].as_array()?;
    agents
        .iter()
        .find(|agent| agent["identity"] == identity.as_str())
}

/// Dials that an agent leaves unanswered, answers with nonsense, or gives no stream for: the
/// client is told within the dial's time.
#[test]
fn dials_to_an_agent_that_plays_dead_end() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let stolen = Stolen::new()?;
    let proxy = stolen.scene.lab.control_plane.servers[0]
        .sockets
        .connect_unix
        .clone();
    let destination = format!("{}:7001", IpAddr::from(address::node(2)));
    let refusal = || match connect_through(&proxy, &destination) {
        Ok(_) => anyhow::bail!("the dial succeeded"),
        Err(error) => Ok(format!("{error:#}")),
    };
    for (dials, answer, expected) in [
        (0, &b""[..], "504"),
        (10, b"", "504"),
        (10, &[0xff; 16], "502"),
        (10, b"\0\xff\xff\xff\xff\xff\xff\xff\xff", "502"),
    ] {
        let (connection, _send, _recv) = stolen.welcomed(dials)?;
        let accepting = connection.clone();
        stolen.runtime.spawn(async move {
            let mut held = Vec::new();
            while let Ok((mut send, recv)) = accepting.accept_bi().await {
                let _ = send.write_all(answer).await;
                held.push((send, recv));
            }
        });
        let text = refusal()?;
        ensure!(text.contains(expected), "{dials} {answer:?}: {text}");
        connection.close(0_u32.into(), b"");
    }
    stolen.scene.unharmed()
}

/// The text of an agent at its end is one line of the log, with any content.
#[test]
fn an_agent_can_not_write_lines_of_the_log() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut stolen = Stolen::new()?;
    let (connection, _send, _recv) = stolen.welcomed(10)?;
    let forged = "bye\n2030-01-01T00:00:00.000000Z  INFO forged: \x1b[2Jline";
    connection.close(0_u32.into(), forged.as_bytes());
    let server = stolen.scene.server();
    let pieces = ["agent disconnected", "agent/w2", "forged"];
    let line = server.wait_log(SOON, 0, &pieces)?;
    ensure!(!line.contains('\x1b'), "{line:?}");
    stolen.scene.unharmed()
}
