//! A connector as the redirect sees it: it listens, beats, and takes origins.

use std::{
    io::{self, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use cpc_redirect::{Flows, Heartbeat, Redirect, listen};

use crate::lab::{Netns, settle};

/// An IPv4 and an IPv6 listener without a server yet.
pub(crate) struct Listeners(pub(crate) TcpListener, pub(crate) TcpListener);

impl Listeners {
    pub(crate) fn open(netns: &Netns) -> Self {
        let open = |address: &str| {
            listen(Some(&netns.path()), address.parse().unwrap()).expect("listener")
        };
        Self(open("127.0.0.1:0"), open("[::1]:0"))
    }

    /// Opens listeners at the addresses of earlier ones.
    pub(crate) fn reopen(netns: &Netns, [v4, v6]: [SocketAddr; 2]) -> Self {
        let open = |address| listen(Some(&netns.path()), address).expect("listener");
        Self(open(v4), open(v6))
    }

    /// Makes them the listeners of the attachment.
    pub(crate) fn announce(&self, heartbeat: &mut Heartbeat) {
        for listener in [&self.0, &self.1] {
            heartbeat.listen(listener).unwrap();
        }
    }

    pub(crate) fn addresses(&self) -> [SocketAddr; 2] {
        [self.0.local_addr().unwrap(), self.1.local_addr().unwrap()]
    }
}

/// A server that answers each connection with its requested destination, until dropped.
pub(crate) struct Connector {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Connector {
    pub(crate) fn start(redirect: &Redirect, name: &str, listeners: Listeners) -> Self {
        let mut flows = redirect.flows(name).unwrap();
        let mut heartbeat = redirect.heartbeat(name).unwrap();
        listeners.announce(&mut heartbeat);
        // The first connection may come before the thread runs.
        heartbeat.beat().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                turn(&listeners, &mut flows, &mut heartbeat);
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

fn turn(listeners: &Listeners, flows: &mut Flows, heartbeat: &mut Heartbeat) {
    heartbeat.beat().unwrap();
    let mut idle = true;
    for listener in [&listeners.0, &listeners.1] {
        while let Ok((stream, client)) = listener.accept() {
            idle = false;
            // A client that is gone already is none of our business.
            let _ = answer(stream, client, flows);
        }
    }
    if idle {
        thread::sleep(Duration::from_micros(200));
    }
}

fn answer(mut stream: TcpStream, client: SocketAddr, flows: &mut Flows) -> io::Result<()> {
    let origin = flows.take_origin(client, stream.local_addr()?).unwrap();
    match origin {
        // SO_LINGER 0 is inherited from the listener: dropping it resets.
        None => Ok(()),
        Some(origin) if origin.refused.is_some() => Ok(()),
        Some(origin) => {
            stream.write_all(origin.destination.to_string().as_bytes())?;
            socket2::SockRef::from(&stream).set_linger(None)?;
            stream.shutdown(Shutdown::Write)?;
            // Closing a socket before the client's bytes are read would reset the connection.
            thread::spawn(move || io::copy(&mut stream, &mut io::sink()));
            Ok(())
        }
    }
}

impl Drop for Connector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            assert!(
                thread.join().is_ok() || thread::panicking(),
                "the connector panicked"
            );
            settle();
        }
    }
}
