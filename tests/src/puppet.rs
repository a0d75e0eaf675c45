//! A target that does what the test says, in the test's own process: for what the plain
//! [targets](crate::target) can't do, such as to read late or to tell the test what arrived.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{Backlog, listen};
use socket2::{SockRef, Socket};

use crate::frontend::patient;
use crate::lab::config::Allow;
use crate::lab::worker::Worker;

/// The ports that [`Puppet::allow`] opens.
const PORTS: &str = "8000-8099";
/// Timeout of a connection.
const PATIENCE: Duration = Duration::from_secs(15);

/// A listener on a worker's node address.
#[derive(Debug)]
pub struct Puppet {
    /// Address of the listener.
    pub address: SocketAddr,
    listener: TcpListener,
}

impl Puppet {
    /// Returns the rule that lets a laboratory's agents dial puppets.
    ///
    /// # Errors
    ///
    /// None: the text is well-formed.
    pub fn allow() -> Result<Allow> {
        format!("10.99.0.0/16:{PORTS}").parse()
    }

    /// Listens on `port` (8000 to 8099) of `worker`.
    ///
    /// # Errors
    ///
    /// The port is in use.
    pub fn on(worker: &Worker, port: u16) -> Result<Self> {
        let address = SocketAddr::from((worker.node_addresses()[0], port));
        let listener = worker.netns.enter(|| Ok(TcpListener::bind(address)?))?;
        listen(&listener, Backlog::MAXALLOWABLE)?;
        // It bounds accept(2) as well, socket(7).
        SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
        Ok(Self { address, listener })
    }

    /// Takes the next connection.
    ///
    /// # Errors
    ///
    /// None came in time.
    pub fn accept(&self) -> Result<Socket> {
        let (stream, _) = self
            .listener
            .accept()
            .with_context(|| format!("nobody connects to {}", self.address))?;
        patient(stream.into())
    }

    /// Takes a connection if there is one by now.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn accept_now(&self) -> Result<Option<Socket>> {
        self.listener.set_nonblocking(true)?;
        let accepted = self.listener.accept();
        self.listener.set_nonblocking(false)?;
        match accepted {
            Ok((stream, _)) => Ok(Some(patient(stream.into())?)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
