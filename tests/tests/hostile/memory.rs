//! Memory that a hostile agent can make the server hold: never above its bounds, with any withheld
//! byte.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream, WriteError};
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialResponse;
use tunnel_tests::client::{ask_proxy, eventually, round_trips};
use tunnel_tests::lab::cgroup::MemoryGroup;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

use crate::leaky;
use crate::peer::{self, Credentials};
use crate::scene::{SOON, echo, metric, runtime};

/// Memory of the server. A quarter of it is for data of its peers.
const MEMORY: u64 = 192 << 20;
/// Dials that the agent holds: with a window each, more than all of that.
const HELD: usize = 220;
/// Bytes that the agent sends on each stream, all but the first.
const WINDOW: usize = 1 << 20;
/// Rounds of one byte sent and one withheld, on each stream.
const FRAGMENTS: usize = 30;

/// An agent that is welcome, says yes to each dial, and never sends again what was lost.
struct Withholder {
    runtime: Handle,
    loses: Arc<AtomicBool>,
    connection: Connection,
    _control: (SendStream, RecvStream),
    dialled: mpsc::UnboundedReceiver<(SendStream, RecvStream)>,
}

impl Withholder {
    /// `window`: bytes that it sends without hearing what became of them.
    fn connect(runtime: &Handle, lab: &Lab, window: u64) -> Result<Self> {
        let credentials = Credentials::read(&lab.folder().join("w2/agent"), "agent")?;
        let socket = lab.workers[1].netns.enter(peer::any_port)?;
        let tunnel = lab.control_plane.servers[0].sockets.tunnel;
        let loses = Arc::new(AtomicBool::new(false));
        let hello = peer::introduction("w2", &address::nodes(2))?;
        let leaks = loses.clone();
        let (connection, control) = runtime.block_on(async {
            let endpoint = leaky::agent(socket, &credentials, window, leaks)?;
            let connection = peer::dial(&endpoint, tunnel).await?;
            let (mut send, mut recv) = connection.open_bi().await?;
            send.write_all(&hello).await?;
            recv.read_chunk(1, true).await?.context("no welcome")?;
            anyhow::Ok((connection, (send, recv)))
        })?;
        let (taken, dialled) = mpsc::unbounded_channel();
        let dials = connection.clone();
        runtime.spawn(async move {
            while let Ok((mut send, recv)) = dials.accept_bi().await {
                let mut answer = BytesMut::new();
                DialResponse::Connected.encode(&mut answer);
                if send.write_all(&answer).await.is_err() || taken.send((send, recv)).is_err() {
                    break;
                }
            }
        });
        Ok(Self {
            runtime: runtime.clone(),
            loses,
            connection,
            _control: control,
            dialled,
        })
    }

    /// `count` clients whose dials it holds, and its ends of them.
    fn hold(&mut self, lab: &Lab, count: usize) -> Result<(Vec<UnixStream>, Vec<SendStream>)> {
        let target = SocketAddr::new(address::nodes(2)[0], Behaviour::Echo.port());
        let (mut clients, mut sends) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let client = UnixStream::connect(&lab.control_plane.servers[0].sockets.connect_unix)?;
            client.set_read_timeout(Some(SOON))?;
            ask_proxy(&client, &target.to_string())?;
            clients.push(client);
            let (send, recv) = self.dialled.blocking_recv().context("no dial")?;
            // It is never told to stop.
            std::mem::forget(recv);
            sends.push(send);
        }
        Ok((clients, sends))
    }

    /// Sends `bytes` on each stream, if they are to arrive.
    async fn send(&self, sends: &mut [SendStream], bytes: &Bytes, arrives: bool) -> usize {
        self.loses.store(!arrives, Ordering::Relaxed);
        let mut ended = 0;
        for send in sends {
            let sent = timeout(SOON, send.write_chunk(bytes.clone())).await;
            if let Ok(Err(WriteError::Stopped(code))) = sent {
                assert_eq!(code.into_inner(), CloseReason::MemoryLimit.code());
                ended += 1;
            }
        }
        // What was written leaves by then.
        tokio::time::sleep(Duration::from_millis(if arrives { 3 } else { 30 })).await;
        ended
    }
}

fn used(lab: &Lab) -> Result<f64> {
    let server = &lab.control_plane.servers[0].daemon;
    metric(server, "cpc_limit_used{limit=\"stalled_bytes\"}")
}

/// An agent holds hundreds of dials and sends all but a byte of a window on each, to a server that has less
/// memory than that. Streams end by the bound's name, the server lives and serves the other agent, and its
/// memory returns. The same with fragments.
#[test]
fn what_is_withheld_ends_at_a_bound_and_is_given_back() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let name = format!("cpc-memory-{}", std::process::id());
    let Some(group) = MemoryGroup::new(&name, MEMORY)? else {
        return Ok(());
    };
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec { workers: 2, ..spec })?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["limits"] = json!({"dial_timeout": "10s"}))?;
    let mut placed = Ok(());
    server.start_with(|command| placed = group.place(command))?;
    placed?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    let honest = UnixStream::connect(&lab.control_plane.servers[0].sockets.connect_unix)?;
    honest.set_read_timeout(Some(SOON))?;
    ask_proxy(&honest, &echo().to_string())?;
    round_trips(&honest, 10)?;
    let base = lab.control_plane.servers[0].daemon.memory()?;

    let runtime = runtime()?;
    let mut agent = Withholder::connect(&runtime, &lab, 16 << 10)?;
    let (clients, mut sends) = agent.hold(&lab, HELD)?;
    let byte = Bytes::from_static(b"x");
    let rest = Bytes::from(vec![b'x'; WINDOW - 64]);
    let ended = agent.runtime.block_on(async {
        agent.send(&mut sends, &byte, false).await;
        agent.send(&mut sends, &rest, true).await
    });
    lab.control_plane.servers[0].daemon.check()?;
    let bound = (MEMORY / 4) as f64;
    let refused = "cpc_limit_refused_total{limit=\"stalled_bytes_per_tunnel\"}";
    eventually(SOON, || {
        let (used, refused) = (
            used(&lab)?,
            metric(&lab.control_plane.servers[0].daemon, refused)?,
        );
        ensure!(used > bound / 8.0 && used <= bound, "{used} of {bound}");
        ensure!(
            refused > HELD as f64 / 2.0,
            "{refused} of {HELD} streams ended"
        );
        Ok(())
    })?;
    println!("{ended} streams were told at once");
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_log(SOON, 0, &["memory_limit"])?;
    round_trips(&honest, 10).context("beside it")?;
    drop((clients, sends));
    agent.connection.close(0_u32.into(), b"");
    eventually(SOON, || {
        ensure!(used(&lab)? == 0.0, "{} are still charged", used(&lab)?);
        let memory = lab.control_plane.servers[0].daemon.memory()?;
        ensure!(memory < base + 24 * 1024, "{base} KiB have become {memory}");
        Ok(())
    })?;

    // One byte arrives, the next one does not.
    let mut agent = Withholder::connect(&runtime, &lab, 16 << 20)?;
    let (clients, mut sends) = agent.hold(&lab, HELD)?;
    agent.runtime.block_on(async {
        for _ in 0..FRAGMENTS {
            agent.send(&mut sends, &byte, false).await;
            agent.send(&mut sends, &byte, true).await;
        }
    });
    let fragments = (HELD * FRAGMENTS) as f64;
    eventually(SOON, || {
        let used = used(&lab)?;
        ensure!(used > fragments * 100.0, "{used} for {fragments} fragments");
        Ok(())
    })?;
    round_trips(&honest, 10).context("beside fragments")?;
    drop((clients, sends));
    agent.connection.close(0_u32.into(), b"");
    eventually(SOON, || {
        ensure!(used(&lab)? == 0.0, "{} are still charged", used(&lab)?);
        Ok(())
    })?;
    lab.control_plane.servers[0].daemon.check()
}
