//! A server that records every request, on a thread of the test's own process: a test compares the
//! record with the requests of its clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;

use crate::lab::netns::Netns;

/// The longest request, in bytes.
const LONGEST: u64 = 4096;

/// A server that answers each line with its own name and the line. It ends with the process.
#[derive(Clone, Debug)]
pub struct Ledger {
    name: String,
    requests: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
}

impl Ledger {
    /// Listens on `address` in `netns`, as `name`.
    ///
    /// # Errors
    ///
    /// The address can't be listened on.
    pub fn start(netns: &Netns, address: SocketAddr, name: &str) -> Result<Self> {
        let listener = netns.enter(|| Ok(TcpListener::bind(address)?))?;
        let ledger = Self {
            name: name.to_owned(),
            requests: Arc::default(),
            connections: Arc::default(),
        };
        let served = ledger.clone();
        thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let served = served.clone();
                served.connections.fetch_add(1, Ordering::Relaxed);
                // A client that goes away is what many tests are about.
                thread::spawn(move || drop(served.serve(&stream)));
            }
        });
        Ok(ledger)
    }

    /// Returns the number of accepted connections.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Returns every received request, in order.
    pub fn requests(&self) -> Vec<String> {
        self.requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn serve(&self, stream: &TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if (&mut reader).take(LONGEST).read_line(&mut line)? == 0 {
                return Ok(());
            }
            self.requests
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(line.trim_end().to_owned());
            let mut stream = stream;
            stream.write_all(format!("{} {line}", self.name).as_bytes())?;
        }
    }
}
