//! The load balancer that stands before several servers: one address, and each connection goes to
//! the next of them that answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::place::Place;

/// A running one. It ends with its place.
#[derive(Debug)]
pub(crate) struct Balancer {
    accepted: Arc<AtomicUsize>,
    _place: Place,
}

impl Balancer {
    pub(crate) fn start(place: Place, listen: SocketAddr, to: Vec<SocketAddr>) -> Result<Self> {
        let listener = place.run(async move { Ok(TcpListener::bind(listen).await?) })?;
        let accepted = Arc::<AtomicUsize>::default();
        let count = accepted.clone();
        place.spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let first = count.fetch_add(1, Ordering::Relaxed) % to.len();
                let order = [&to[first..], &to[..first]].concat();
                tokio::spawn(async move {
                    for server in order {
                        if let Ok(mut server) = TcpStream::connect(server).await {
                            // Whoever ends first ends it for both.
                            let _ = copy_bidirectional(&mut client, &mut server).await;
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self {
            accepted,
            _place: place,
        })
    }

    /// Returns the number of accepted connections.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}
