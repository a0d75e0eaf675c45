//! A replay of everything that a genuine session has sent.

use std::cell::RefCell;
use std::net::UdpSocket as StdSocket;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::net::UdpSocket;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use crate::peer;
use crate::{Aim, WHILE};

/// Number of replays.
const ROUNDS: usize = 50;
/// A session's packets at most.
const PACKETS: usize = 1000;

/// Records a session at a relay of its own, ends it without a word, and sends the same packets from
/// the same port and from others.
pub(crate) async fn replay(aim: &Aim) -> Result<()> {
    let (inside, outside) = (
        UdpSocket::bind("127.0.0.1:0").await?,
        UdpSocket::bind("0.0.0.0:0").await?,
    );
    outside.connect(aim.server).await?;
    let relay = inside.local_addr()?;
    let recorded = Rc::<RefCell<Vec<Vec<u8>>>>::default();
    let sockets = Rc::new((inside, outside));
    let pass = {
        let (sockets, recorded) = (sockets.clone(), recorded.clone());
        tokio::task::spawn_local(async move {
            let (mut to, mut from) = (vec![0; 2048], vec![0; 2048]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((length, address)) = sockets.0.recv_from(&mut to) => {
                        client = Some(address);
                        if recorded.borrow().len() < PACKETS {
                            recorded.borrow_mut().push(to[..length].to_vec());
                        }
                        let _ = sockets.1.send(&to[..length]).await;
                    }
                    Ok(length) = sockets.1.recv(&mut from) => {
                        if let Some(client) = client {
                            let _ = sockets.0.send_to(&from[..length], client).await;
                        }
                    }
                }
            }
        })
    };
    // One packet at a time, so that each is recorded whole.
    let socket = StdSocket::bind("127.0.0.1:0")?;
    let endpoint = peer::agent(&Handle::current(), socket, Some(&aim.credentials()?), 10)?;
    let connection = peer::dial(&endpoint, relay).await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    let own = ["10.99.2.2".parse()?];
    send.write_all(&peer::introduction("w2", &own)?).await?;
    let welcome = timeout(WHILE, recv.read_chunk(1 << 16, true)).await;
    welcome??.context("no welcome")?;
    aim.tally.one("sessions recorded");
    sleep(Duration::from_millis(200)).await;
    // As if its owner had left: the recorded end is part of it.
    connection.close(0_u32.into(), b"");
    sleep(Duration::from_millis(200)).await;
    pass.abort();

    let recorded = recorded.take();
    let fresh = UdpSocket::bind("0.0.0.0:0").await?;
    fresh.connect(aim.server).await?;
    let begun = Instant::now();
    for round in 0..ROUNDS {
        let socket = if round % 2 == 0 { &sockets.1 } else { &fresh };
        for packet in recorded.iter() {
            // A full buffer of ours is no matter.
            let _ = socket.send(packet).await;
            aim.tally.one("packets sent again");
        }
        sleep(Duration::from_millis(20)).await;
        if begun.elapsed() > WHILE {
            break;
        }
    }
    let mut buffer = vec![0; 2048];
    for socket in [&sockets.1, &fresh] {
        while let Ok(Ok(_)) = timeout(Duration::from_millis(50), socket.recv(&mut buffer)).await {
            aim.tally.one("packets in answer");
        }
    }
    Ok(())
}
