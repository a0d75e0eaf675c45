//! A server without a server's certificate of this domain.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::Result;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::peer::{self, Credentials};
use crate::{Aim, WHILE};

/// Starts a server for each folder, at consecutive ports: `server.crt` in it, or `agent.crt`.
/// Counts the agents that accept it.
pub(crate) async fn impostor(aim: &Aim) -> Result<()> {
    let mut tasks = Vec::new();
    for (n, folder) in aim.rest.iter().enumerate() {
        let agents = folder.join("agent.crt").exists();
        let role = if agents { "agent" } else { "server" };
        let credentials = Credentials::read(folder, role)?;
        let mut address = aim.server;
        address.set_port(address.port() + n as u16);
        let socket = UdpSocket::bind(address)?;
        let endpoint = peer::server(&Handle::current(), socket, &credentials, 1)?;
        tasks.push(async move {
            while let Some(incoming) = endpoint.accept().await {
                aim.tally.one("agents that came");
                let Ok(connection) = incoming.await else {
                    aim.tally.one("agents that left");
                    continue;
                };
                aim.tally.one("agents that believed it");
                let said = timeout(Duration::from_secs(1), connection.accept_bi()).await;
                aim.tally
                    .add("agents that introduced themselves", u64::from(said.is_ok()));
            }
        });
    }
    // An agent that was turned away comes again within 10 s.
    let all = futures_of(tasks);
    let _ = timeout(3 * WHILE, all).await;
    Ok(())
}

async fn futures_of<F: Future>(futures: Vec<F>) {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        for future in &mut futures {
            let _ = future.as_mut().poll(context);
        }
        std::task::Poll::<()>::Pending
    })
    .await;
}
