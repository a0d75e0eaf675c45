//! A client that makes one request after the other while something is done to the connector: it
//! shows whether others are disturbed by it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::client::{connect_through, round_trips};

/// Between two requests.
const PAUSE: Duration = Duration::from_millis(20);
/// A request that has no answer by then has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running client. Each request is a connection of its own, through HTTP CONNECT to an
/// [echo](crate::target::Behaviour::Echo).
#[derive(Debug)]
pub struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

impl Steady {
    /// Starts it: `proxy` is the frontend's Unix socket, `destination` an echo's `host:port`.
    pub fn start(proxy: PathBuf, destination: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut done = 0;
            while !stopped.load(Ordering::Relaxed) {
                let stream = connect_through(&proxy, &destination)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                round_trips(stream, 3)?;
                done += 1;
                thread::sleep(PAUSE);
            }
            Ok(done)
        });
        Self { stop, thread }
    }

    /// Ends it, and gives the number of requests.
    ///
    /// # Errors
    ///
    /// The first request that failed, or there was none at all.
    pub fn finish(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(Ok(0)) => bail!("not a single request was made"),
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
