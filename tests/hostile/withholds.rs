//! An agent that withholds the first byte of each dialled stream, and sends all later ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use tokio::time::timeout;
use tunnel_proto::preface::DialResponse;

use crate::peer;
use crate::{Aim, WHILE, leaky};

/// Bytes sent on each stream: all of the server's window but the withheld byte.
const BEHIND: usize = (1 << 20) - 1024;
/// Bytes sent without an acknowledgement.
const UNHEARD: u64 = 64 << 20;
/// Time after which written bytes have left.
const LEAVES: Duration = Duration::from_millis(20);

/// Accepts each dial, withholds a byte, and sends a window behind it.
pub(crate) async fn withholds(aim: &Aim) -> Result<()> {
    let loses = Arc::new(AtomicBool::new(false));
    let endpoint = leaky::agent(
        peer::any_port()?,
        &aim.credentials()?,
        UNHEARD,
        loses.clone(),
    )?;
    let connection = peer::dial(&endpoint, aim.server).await?;
    aim.tally.one("handshakes");
    let (mut control, mut answers) = connection.open_bi().await?;
    let own = ["10.99.2.2".parse()?, "fd00:99:2::2".parse()?];
    control.write_all(&peer::introduction("w2", &own)?).await?;
    answers.read_chunk(1, true).await?.context("no welcome")?;
    let mut held = Vec::new();
    let serve = async {
        while let Ok((mut send, recv)) = connection.accept_bi().await {
            aim.tally.one("dials");
            let mut answer = BytesMut::new();
            DialResponse::Connected.encode(&mut answer);
            send.write_all(&answer).await?;
            tokio::time::sleep(LEAVES).await;
            loses.store(true, Ordering::Relaxed);
            send.write_all(b"x").await?;
            tokio::time::sleep(LEAVES).await;
            loses.store(false, Ordering::Relaxed);
            let behind = Bytes::from(vec![b'x'; BEHIND]);
            send.write_chunk(behind).await?;
            aim.tally.add("bytes behind a gap", BEHIND as u64);
            held.push((send, recv));
        }
        anyhow::Ok(())
    };
    // Bounded by time: what is held is held until then.
    let _ = timeout(WHILE, serve).await;
    Ok(())
}
