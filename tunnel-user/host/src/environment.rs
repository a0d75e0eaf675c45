//! The environment of a server or an agent: a process of its own, or a program that runs several of them
//! on one thread, as the simulation does.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// The environment in which a server or an agent runs.
#[derive(Debug, Default)]
pub struct Environment(Option<Requests>);

#[derive(Debug)]
struct Requests {
    stops: mpsc::UnboundedReceiver<()>,
    reloads: mpsc::UnboundedReceiver<()>,
}

/// Sends the requests that a process gets as signals.
#[derive(Clone, Debug)]
pub struct Controller {
    stops: mpsc::UnboundedSender<()>,
    reloads: mpsc::UnboundedSender<()>,
}

impl Controller {
    /// Requests what SIGTERM requests.
    pub fn stop(&self) {
        // Without effect on one that has ended.
        let _ = self.stops.send(());
    }

    /// Requests what SIGHUP requests.
    pub fn reload(&self) {
        // Without effect on one that has ended.
        let _ = self.reloads.send(());
    }
}

impl Environment {
    /// Returns the environment of a process: threads, signals, capabilities.
    pub fn process() -> Self {
        Self(None)
    }

    /// Creates the environment of one of several on this thread, which shares its capabilities.
    pub fn embedded() -> (Self, Controller) {
        let (stops, stop_receiver) = mpsc::unbounded_channel();
        let (reloads, reload_receiver) = mpsc::unbounded_channel();
        let requests = Requests {
            stops: stop_receiver,
            reloads: reload_receiver,
        };
        (Self(Some(requests)), Controller { stops, reloads })
    }

    /// Whether everything runs on the current thread.
    pub fn is_embedded(&self) -> bool {
        self.0.is_some()
    }

    /// Returns the requests to stop, to reload, and to leave everything to the next process.
    ///
    /// # Errors
    /// A signal handler can't be installed.
    pub fn into_requests(self) -> io::Result<(Stops, Reloads, Restarts)> {
        Ok(match self.0 {
            None => (
                Stops(None),
                Reloads::hangups()?,
                Restarts(Some(signal(SignalKind::user_defined2())?)),
            ),
            Some(requests) => (
                Stops(Some(requests.stops)),
                Reloads(ReloadSource::Channel(requests.reloads)),
                Restarts(None),
            ),
        })
    }
}

/// Requests to stop.
#[derive(Debug)]
pub struct Stops(Option<mpsc::UnboundedReceiver<()>>);

impl Stops {
    /// Returns those of a process of its own.
    pub(crate) fn process() -> Self {
        Self(None)
    }

    /// Starts to listen, which catches SIGTERM and SIGINT.
    ///
    /// # Errors
    /// The signal handlers can't be installed.
    pub(crate) fn listen(self) -> io::Result<StopListener> {
        Ok(match self.0 {
            Some(requests) => StopListener::Channel(requests),
            None => StopListener::Signals(
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
            ),
        })
    }
}

/// Receives requests to stop.
pub(crate) enum StopListener {
    Signals(Signal, Signal),
    Channel(mpsc::UnboundedReceiver<()>),
}

impl StopListener {
    /// Waits for the next request.
    pub(crate) async fn next(&mut self) {
        match self {
            Self::Signals(term, interrupt) => tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            },
            Self::Channel(requests) => wait(requests).await,
        }
    }
}

/// Requests to leave everything to the next process, SIGUSR2. There are none where several servers or agents
/// share a process.
#[derive(Debug)]
pub struct Restarts(Option<Signal>);

impl Restarts {
    /// Whether this process can have a successor.
    pub fn is_process(&self) -> bool {
        self.0.is_some()
    }

    /// Waits for the next request.
    pub async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

/// Requests to reload.
#[derive(Debug)]
pub struct Reloads(ReloadSource);

#[derive(Debug)]
enum ReloadSource {
    Signal(Signal),
    Channel(mpsc::UnboundedReceiver<()>),
}

impl Reloads {
    /// Starts to catch SIGHUP, which would end the process.
    ///
    /// # Errors
    /// The signal handler can't be installed.
    pub fn hangups() -> io::Result<Self> {
        signal(SignalKind::hangup()).map(|signal| Self(ReloadSource::Signal(signal)))
    }

    /// Waits for the next request.
    pub(crate) async fn next(&mut self) {
        match &mut self.0 {
            ReloadSource::Signal(signal) => drop(signal.recv().await),
            ReloadSource::Channel(requests) => wait(requests).await,
        }
    }
}

/// Waits for a request; without end when no more can come.
async fn wait(requests: &mut mpsc::UnboundedReceiver<()>) {
    if requests.recv().await.is_none() {
        std::future::pending().await
    }
}
