//! Handshakes that are begun and never finished.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use tunnel_tests::client::eventually;
use tunnel_tests::lab;
use tunnel_tests::lab::netns::Netns;

use crate::peer::{self, Credentials};
use crate::scene::{SOON, Scene, runtime};

/// Number of handshakes; well above the number that the server accepts from unproven addresses.
const HALF_OPEN: usize = 200;

/// Passes on what a client says to `server` and nothing that comes back but a Retry: the client
/// then proves its address, and gets no further.
fn one_way(netns: &Netns, server: SocketAddr, stop: Arc<AtomicBool>) -> Result<SocketAddr> {
    let (inside, outside) = netns.enter(|| {
        let outside = UdpSocket::bind("0.0.0.0:0")?;
        outside.connect(server)?;
        Ok((UdpSocket::bind("127.0.0.1:0")?, outside))
    })?;
    let address = inside.local_addr()?;
    let turn = Duration::from_millis(2);
    inside.set_read_timeout(Some(turn))?;
    outside.set_nonblocking(true)?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        let mut client = None;
        while !stop.load(Ordering::Relaxed) {
            if let Ok((length, from)) = inside.recv_from(&mut buffer) {
                client = Some(from);
                let _ = outside.send(&buffer[..length]);
            }
            while let Ok(length) = outside.recv(&mut buffer) {
                // A long header of type 3 (RFC 9000 section 17.2.5).
                let is_retry = buffer[0] & 0xf0 == 0xf0;
                if let Some(client) = client.filter(|_| is_retry) {
                    let _ = inside.send_to(&buffer[..length], client);
                }
            }
        }
    });
    Ok(address)
}

/// An honest agent gets in beside them, and each of them is ended by the server's own time limit.
#[test]
fn half_open_handshakes_keep_nobody_out_and_end() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let runtime = runtime()?;
    let netns = scene.lab.workers[1].netns.clone();
    let credentials = Credentials::read(&scene.folder("w2/agent"), "agent")?;
    let stop = Arc::new(AtomicBool::new(false));
    let relay = one_way(&netns, scene.tunnel(), stop.clone())?;
    let endpoint = peer::agent(
        &runtime,
        netns.enter(peer::any_port)?,
        Some(&credentials),
        1,
    )?;
    for _ in 0..HALF_OPEN {
        let endpoint = endpoint.clone();
        runtime.spawn(async move { peer::dial(&endpoint, relay).await.map(drop) });
    }
    // While they go on, a second honest agent comes.
    std::thread::sleep(Duration::from_secs(1));
    scene.lab.workers[1].agent()?.start()?;
    scene.lab.workers[1].agent()?.wait_ready(SOON)?;
    let unfinished = "cpc_handshakes_failed_total{why=\"timeout\"}";
    eventually(SOON, || {
        let ended = scene.metric(unfinished)?;
        ensure!(
            ended >= HALF_OPEN as f64,
            "{ended} of {HALF_OPEN} have ended"
        );
        Ok(())
    })?;
    stop.store(true, Ordering::Relaxed);
    scene
        .server()
        .wait_log(SOON, 0, &["WARN", "handshake not finished in time"])?;
    scene.unharmed()
}
