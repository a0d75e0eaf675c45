//! An agent with a genuine certificate, of a stolen worker.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::{self, Drain, Envelope, Offer, Ping, Routes, envelope::Message};
use tunnel_proto::preface::DialResponse;
use tunnel_proto::session::{AgentEvent, AgentSession, Hello, InstanceId, Timers};

use crate::peer::{self, Credentials};
use crate::{Aim, WHILE};

/// Sessions that send garbage; each state gets its share.
const GARBAGE: u64 = 60;
/// Offers that follow each other.
const OFFERS: u64 = 200;
/// Streams that are tried in each direction.
const OPENED: usize = 100;
/// Timeout of an answer of the server.
const PATIENCE: Duration = Duration::from_secs(3);

/// Returns claims of its own node, and of everything else.
fn greed() -> Offer {
    Offer {
        addresses: vec![
            "10.99.2.2".into(),
            "10.99.1.2".into(),
            "127.0.0.1".into(),
            "192.0.2.1".into(),
            "169.254.169.254".into(),
        ],
        cidrs: vec!["0.0.0.0/0".into(), "::/0".into(), "10.244.1.0/24".into()],
        names: vec![
            "*.svc.cluster.local".into(),
            "kubernetes.default.svc".into(),
        ],
        default_route: true,
    }
}

fn hello(offer: Offer) -> Result<Bytes> {
    frame(Message::Hello(control::Hello {
        version: Some(control::VERSION),
        // Who it claims to be is another one.
        agent_id: "w1".into(),
        instance_id: vec![7; 16],
        node: "w1".into(),
        software_version: "0".into(),
        offer: Some(offer),
        ..control::Hello::default()
    }))
}

fn frame(message: Message) -> Result<Bytes> {
    Ok(control::encode(&Envelope {
        message: Some(message),
    })?)
}

/// Opens a connection with its control stream.
async fn connect(
    aim: &Aim,
    credentials: &Credentials,
    dials: u32,
) -> Result<(Connection, SendStream, RecvStream)> {
    let runtime = Handle::current();
    let endpoint = peer::agent(&runtime, peer::any_port()?, Some(credentials), dials)?;
    let connection = peer::dial(&endpoint, aim.server).await?;
    aim.tally.one("handshakes");
    let (send, recv) = connection.open_bi().await?;
    Ok((connection, send, recv))
}

/// Opens a connection, introduces itself with its own node alone, and waits for the welcome.
async fn welcomed(aim: &Aim, dials: u32) -> Result<(Connection, SendStream, RecvStream)> {
    let (connection, mut send, mut recv) = connect(aim, &aim.credentials()?, dials).await?;
    let own = ["10.99.2.2".parse()?, "fd00:99:2::2".parse()?];
    send.write_all(&peer::introduction("w2", &own)?).await?;
    let answer = timeout(PATIENCE, recv.read_chunk(1 << 16, true)).await;
    answer??.context("no welcome")?;
    aim.tally.one("welcomed");
    Ok((connection, send, recv))
}

/// Returns how the server ended the connection.
async fn end(aim: &Aim, connection: &Connection) {
    let ended = peer::ended_by_peer(connection, PATIENCE).await;
    aim.tally.one(match ended {
        Ok((code, _)) => match CloseReason::from_code(code.into_inner()) {
            Some(reason) => format!("ended: {}", reason.label()),
            None => format!("ended: {code}"),
        },
        // Among many packets the one with the reason may be lost.
        Err(_) if connection.close_reason().is_some() => "ended: unsaid".to_owned(),
        Err(_) => "kept".to_owned(),
    });
}

/// Claims everything there is, under another's name, again and again.
pub(crate) async fn claims(aim: &Aim) -> Result<()> {
    let (connection, mut send, mut recv) = connect(aim, &aim.credentials()?, 10).await?;
    let own = Hello {
        version: control::VERSION,
        agent_id: "w1".into(),
        instance_id: InstanceId([7; 16]),
        node: "w1".into(),
        software_version: "0".into(),
        features: Vec::new(),
        offer: Vec::new(),
        predecessor: None,
        incarnation: 0,
    };
    // Reads what the server answers; what it would say itself is not sent.
    let mut session = AgentSession::new(own, Timers::default(), Instant::now())?;
    send.write_all(&hello(greed())?).await?;
    let more = frame(Message::Routes(Routes {
        offer: Some(greed()),
    }))?;
    let begun = Instant::now();
    let mut offers = 0;
    while begun.elapsed() < WHILE && offers < OFFERS {
        let Ok(chunk) = timeout(PATIENCE, recv.read_chunk(1 << 16, true)).await else {
            break;
        };
        let Some(chunk) = chunk? else { break };
        session.handle_bytes(&chunk.bytes, Instant::now())?;
        while let Some(event) = session.poll_event() {
            let (accepted, refused) = match event {
                AgentEvent::Welcomed(welcome) => (welcome.accepted, welcome.refused),
                AgentEvent::Verdict { accepted, refused } => (accepted, refused),
                _ => continue,
            };
            offers += 1;
            aim.tally.one("offers");
            let own = |claim: &str| claim == "10.99.2.2";
            let (mine, foreign): (Vec<_>, Vec<_>) = accepted
                .iter()
                .map(ToString::to_string)
                .partition(|claim| own(claim));
            aim.tally.add("claims accepted, its own", mine.len() as u64);
            aim.tally
                .add("claims accepted, foreign", foreign.len() as u64);
            aim.tally.add("claims refused", refused.len() as u64);
            send.write_all(&more).await?;
        }
    }
    drop(connection);
    Ok(())
}

/// A generator of bytes (xorshift64), the same in every run.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next() as u8)
            .take(length)
            .collect()
    }
}

/// Sends garbage in place of the Hello, after it, within it, the Hello twice, and an end in the
/// middle.
pub(crate) async fn garbage(aim: &Aim) -> Result<()> {
    let begun = Instant::now();
    let mut noise = Noise(0x2545_f491_4f6c_dd1d);
    for n in 0..GARBAGE {
        if begun.elapsed() > WHILE {
            break;
        }
        let (connection, mut send, _recv) = match n % 5 {
            0 | 1 => connect(aim, &aim.credentials()?, 10).await?,
            _ => welcomed(aim, 10).await?,
        };
        let length = 1 + noise.next() as usize % 2000;
        let bytes = match n % 5 {
            // Lengths that no message has: one that may would be waited for.
            0 => [&[0xff][..], &noise.bytes(length)].concat(),
            1 => hello(greed())?.slice(..20).to_vec(),
            2 => [&[0x80, 0x10, 0, 0][..], &noise.bytes(length)].concat(),
            3 => hello(greed())?.to_vec(),
            _ => [&[4, 0xff, 0xff, 0xff, 0xff][..], &noise.bytes(length)].concat(),
        };
        aim.tally.add("bytes", bytes.len() as u64);
        // It may be ended before all of it is sent.
        let _ = send.write_all(&bytes).await;
        if n % 5 == 1 {
            let _ = send.finish();
        }
        end(aim, &connection).await;
    }
    Ok(())
}

/// Makes the server answer, and reads nothing.
pub(crate) async fn deaf(aim: &Aim) -> Result<()> {
    let (connection, mut send, _recv) = welcomed(aim, 10).await?;
    let pings = frame(Message::Ping(Ping { seq: u64::MAX }))?.repeat(1000);
    let flood = async {
        while send.write_all(&pings).await.is_ok() {
            aim.tally.add("pings", 1000);
        }
    };
    // Bounded by time; by then the server has ended it.
    let _ = timeout(WHILE, flood).await;
    end(aim, &connection).await;
    Ok(())
}

/// Drains without an end: the same message, as often as it can.
pub(crate) async fn drains(aim: &Aim) -> Result<()> {
    let (connection, mut send, _recv) = welcomed(aim, 10).await?;
    let drain = Drain {
        deadline_ms: 30_000,
        reason: CloseReason::Shutdown.code(),
    };
    let drains = frame(Message::Drain(drain))?.repeat(1000);
    let flood = async {
        while send.write_all(&drains).await.is_ok() {
            aim.tally.add("drains", 1000);
        }
    };
    let _ = timeout(WHILE, flood).await;
    drop(connection);
    Ok(())
}

/// Opens streams of both kinds towards the server, and sends a datagram.
pub(crate) async fn opens(aim: &Aim) -> Result<()> {
    let (connection, _send, _recv) = welcomed(aim, 10).await?;
    let limit = WHILE / 2 / OPENED as u32;
    for _ in 0..OPENED {
        aim.tally.add("streams tried", 2);
        let bi = timeout(limit, connection.open_bi()).await;
        let uni = timeout(limit, connection.open_uni()).await;
        aim.tally.add(
            "streams opened",
            u64::from(bi.is_ok()) + u64::from(uni.is_ok()),
        );
    }
    let sent = connection.send_datagram(Bytes::from_static(b"hello"));
    aim.tally.add("datagrams sent", u64::from(sent.is_ok()));
    Ok(())
}

/// Accepts each dial, sends without end, and reads nothing.
pub(crate) async fn pours(aim: &Aim) -> Result<()> {
    let (connection, _send, _recv) = welcomed(aim, 1000).await?;
    let serve = async {
        while let Ok((mut send, recv)) = connection.accept_bi().await {
            aim.tally.one("dials");
            let mut answer = BytesMut::new();
            DialResponse::Connected.encode(&mut answer);
            answer.resize(64 << 10, 0);
            let answer = answer.freeze();
            let connection = connection.clone();
            tokio::task::spawn_local(async move {
                let zeros = Bytes::from_static(&[0; 64 << 10]);
                let mut poured = send.write_chunk(answer).await;
                while poured.is_ok() {
                    poured = send.write_chunk(zeros.clone()).await;
                }
                drop((recv, connection));
            });
        }
    };
    let _ = timeout(WHILE, serve).await;
    aim.tally.add("bytes", connection.stats().udp_tx.bytes);
    Ok(())
}
