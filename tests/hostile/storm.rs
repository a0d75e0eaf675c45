//! Connections without end: complete ones, those of unauthenticated peers, and half handshakes.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::peer::{self, Credentials};
use crate::{Aim, WHILE};

/// Handshakes that are begun.
const HANDSHAKES: usize = 6000;
/// Number of concurrent connections.
const AT_ONCE: usize = 64;
/// Handshakes that stop after the first packet.
const HALVES: usize = 1000;
/// Time after which a handshake without progress is dropped.
const PATIENCE: Duration = Duration::from_secs(1);

/// Connects as often as it can, and closes at once. Without a certificate the server ends it.
pub(crate) async fn storm(aim: &Aim, credentials: Option<&Credentials>) -> Result<()> {
    let endpoint = peer::agent(&Handle::current(), peer::any_port()?, credentials, 1)?;
    let begun = Instant::now();
    let mut running = JoinSet::new();
    let mut started = 0;
    loop {
        while started < HANDSHAKES && running.len() < AT_ONCE && begun.elapsed() < WHILE {
            started += 1;
            let (endpoint, server) = (endpoint.clone(), aim.server);
            running.spawn_local(async move {
                let dialled = timeout(PATIENCE, peer::dial(&endpoint, server)).await;
                let Ok(Ok(connection)) = dialled else {
                    return "not answered or refused";
                };
                // A client has finished before the server has judged it.
                let opened = async {
                    let (mut send, mut recv) = connection.open_bi().await?;
                    send.write_all(&[0]).await?;
                    anyhow::Ok(recv.read_chunk(1, true).await?)
                };
                let judged = timeout(Duration::from_millis(20), opened).await;
                match judged {
                    Ok(_) => "ended by the server",
                    Err(_) => "ended by itself",
                }
            });
        }
        let Some(end) = running.join_next().await else {
            break;
        };
        aim.tally.one(end?);
    }
    let seconds = begun.elapsed().as_secs_f64();
    aim.tally.add("handshakes", started as u64);
    aim.tally
        .add("handshakes a second", (started as f64 / seconds) as u64);
    Ok(())
}

/// Sends first packets, each from another port, and nothing more.
pub(crate) async fn half(aim: &Aim) -> Result<()> {
    let credentials = aim.credentials()?;
    let begun = Instant::now();
    let mut endpoints = Vec::new();
    while endpoints.len() < HALVES && begun.elapsed() < WHILE {
        let socket = peer::any_port()?;
        let endpoint = peer::agent(&Handle::current(), socket, Some(&credentials), 1)?;
        let connecting = endpoint.connect(aim.server, "cpc.invalid")?;
        // Nobody takes what is received before this ends: it is sent, and that is all.
        tokio::task::yield_now().await;
        aim.tally.one("first packets");
        drop(connecting);
        endpoints.push(endpoint);
        if endpoints.len().is_multiple_of(100) {
            sleep(Duration::from_millis(10)).await;
        }
    }
    Ok(())
}
