//! Clients that ask again and again while something happens to what is in between, and what became
//! of each request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::client::{connect_through, eventually};
use crate::lab::Lab;
use crate::lab::cgroup::Membership;
use crate::lab::server::ControlPlane;

/// A connect that takes longer has failed.
const CONNECT: Duration = Duration::from_secs(10);
/// Timeout of an answer ([`io::ErrorKind::WouldBlock`]): longer than a dial may take.
const ANSWER: Duration = Duration::from_secs(12);
/// Between two requests of one client: a loopback address has 28,000 ports, and each is out of use
/// for a minute.
const PAUSE: Duration = Duration::from_millis(5);

/// Reason for a missing answer.
#[derive(Debug)]
pub enum Failure {
    /// The connection was refused, in one of many ways.
    Connect(io::Error),
    /// The connection broke before the answer. An end of file is [`io::ErrorKind::UnexpectedEof`].
    Broken(io::Error),
    /// The proxy refused; its first line.
    Proxy(String),
}

impl Failure {
    /// Whether the connection was reset. That a dial has failed beyond the redirect can arrive
    /// before connect(2) has returned.
    pub fn is_reset(&self) -> bool {
        match self {
            Self::Connect(error) | Self::Broken(error) => {
                error.kind() == io::ErrorKind::ConnectionReset
            }
            Self::Proxy(_) => false,
        }
    }
}

/// One request.
#[derive(Debug)]
pub struct Attempt {
    /// Time of the request.
    pub start: Instant,
    /// Time of its end.
    pub end: Instant,
    /// Text of the request.
    pub request: String,
    /// The answer.
    pub result: Result<String, Failure>,
}

/// Connects to `address`, sends `request` and a line feed at once, and reads a line.
///
/// # Errors
///
/// [`Failure`].
pub fn ask(address: SocketAddr, request: &str) -> Result<String, Failure> {
    let stream = TcpStream::connect_timeout(&address, CONNECT).map_err(Failure::Connect)?;
    let asked = || {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        line(&stream, request)
    };
    asked().map_err(Failure::Broken)
}

/// Does the same through an HTTP CONNECT proxy on a Unix socket.
///
/// # Errors
///
/// [`Failure`].
pub fn ask_through(proxy: &Path, address: SocketAddr, request: &str) -> Result<String, Failure> {
    let stream = connect_through(proxy, &address.to_string())
        .map_err(|error| Failure::Proxy(format!("{error:#}")))?;
    let asked = || {
        stream.set_read_timeout(Some(ANSWER))?;
        line(&stream, request)
    };
    asked().map_err(Failure::Broken)
}

/// Sends `request` and a line feed on a connected stream, and reads a line.
///
/// # Errors
///
/// What the stream says; an end before the line's is [`io::ErrorKind::UnexpectedEof`].
pub fn line<S>(mut stream: &S, request: &str) -> io::Result<String>
where
    for<'a> &'a S: Read + Write,
{
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match answer.strip_suffix('\n') {
        Some(answer) => Ok(answer.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Clients at work, in the redirected group of the control plane. Dropping it ends them.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    clients: Vec<JoinHandle<()>>,
    _member: Membership,
}

impl Load {
    /// Starts `clients` of them. Each sends a request, waits for the answer or the error, and
    /// repeats; every request is another string.
    ///
    /// # Errors
    ///
    /// The namespace or the control group can't be entered.
    pub fn start(
        place: &ControlPlane,
        clients: usize,
        ask: impl Fn(&str) -> Result<String, Failure> + Send + Sync + 'static,
    ) -> Result<Self> {
        let member = place.apiserver.enter()?;
        let stop = Arc::<AtomicBool>::default();
        let attempts = Arc::<Mutex<Vec<Attempt>>>::default();
        let ask = Arc::new(ask);
        let client = |number: usize| {
            let (stop, attempts, ask) = (stop.clone(), attempts.clone(), ask.clone());
            let netns = place.netns.clone();
            thread::spawn(move || {
                let work = || {
                    run(number, &stop, &attempts, &*ask);
                    Ok(())
                };
                if let Err(error) = netns.enter(work) {
                    eprintln!("client {number}: {error:#}");
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Ok(Self {
            stop,
            attempts,
            clients,
            _member: member,
        })
    }

    /// Waits until `count` more requests have been answered.
    ///
    /// # Errors
    ///
    /// They have not within `limit`; the error has the last failure.
    pub fn wait_answered(&self, count: usize, limit: Duration) -> Result<()> {
        let answered = |attempts: &[Attempt]| attempts.iter().filter(|a| a.result.is_ok()).count();
        let wanted = self.look(answered) + count;
        eventually(limit, || {
            self.look(|attempts| {
                if answered(attempts) < wanted {
                    let last = attempts.iter().rev().find(|a| a.result.is_err());
                    bail!("no {count} more answers; the last failure is {last:?}");
                }
                Ok(())
            })
        })
    }

    /// Ends them, and returns the outcome of every request.
    pub fn stop(mut self) -> Vec<Attempt> {
        self.end();
        std::mem::take(&mut *self.attempts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends them, and returns the requests to an echo, all of which were answered.
    ///
    /// # Errors
    ///
    /// One was not, or with something else; the error has the logs of `lab`.
    pub fn stop_answered(self, lab: &Lab) -> Result<Vec<Attempt>> {
        let attempts = self.stop();
        let is_answered = |attempt: &Attempt| {
            let answer = attempt.result.as_ref();
            answer.is_ok_and(|answer| *answer == attempt.request)
        };
        let failed: Vec<_> = attempts.iter().filter(|it| !is_answered(it)).collect();
        if let Some(first) = failed.first() {
            bail!("{} failed: {first:?}\n{}", failed.len(), lab.logs());
        }
        Ok(attempts)
    }

    fn look<T>(&self, at: impl FnOnce(&[Attempt]) -> T) -> T {
        at(&self.attempts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            // A panic has been printed by the client itself.
            let _ = client.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

fn run(
    number: usize,
    stop: &AtomicBool,
    attempts: &Mutex<Vec<Attempt>>,
    ask: &dyn Fn(&str) -> Result<String, Failure>,
) {
    for round in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let request = format!("{number}/{round}");
        let start = Instant::now();
        let result = ask(&request);
        let attempt = Attempt {
            start,
            end: Instant::now(),
            request,
            result,
        };
        let mut attempts = attempts.lock().unwrap_or_else(PoisonError::into_inner);
        attempts.push(attempt);
        drop(attempts);
        thread::sleep(PAUSE);
    }
}
