//! An endpoint: a UDP socket, its packets, and its connections.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use bytes::Bytes;
use quinn_proto::{
    ClientConfig, ConnectError, ConnectionError, ConnectionHandle, EndpointConfig, VarInt,
};
use tokio::sync::Notify;

use super::config::Acceptor;
use super::connection::{Connection, Inner};
use super::driver::Driver;
use super::ledger::{Ledger, MemoryBounds};
use super::steering;
use super::udp::Udp;

/// An endpoint. Without handles it ends with its last connection.
#[derive(Clone)]
pub struct Endpoint(Rc<Handle>);

struct Handle(Rc<Shared>);

/// State that the handles, the driver and the connections of an endpoint share.
pub(super) struct Shared {
    pub(super) proto: RefCell<quinn_proto::Endpoint>,
    pub(super) udp: Udp,
    /// Configuration for incoming connections.
    acceptor: Option<Acceptor>,
    /// Connections by handle, which quinn-proto assigns from 0.
    connections: RefCell<Vec<Option<Rc<Inner>>>>,
    count: Cell<usize>,
    /// Connections that may have something to send.
    pub(super) noted: RefCell<VecDeque<ConnectionHandle>>,
    /// Incoming connections; quinn-proto bounds them (`max_incoming`).
    strangers: RefCell<VecDeque<quinn_proto::Incoming>>,
    arrived: Notify,
    left: Notify,
    closed: RefCell<Option<(VarInt, Bytes)>>,
    is_abandoned: Cell<bool>,
    /// Whether the packets that arrive are another process's.
    pub(super) has_left: Cell<bool>,
    driver: RefCell<Option<Waker>>,
    /// Bounds on the memory held for the peers.
    memory: MemoryBounds,
}

impl Shared {
    /// Returns the connection called `handle`.
    pub(super) fn connection(&self, handle: ConnectionHandle) -> Option<Rc<Inner>> {
        self.connections.borrow().get(handle.0).cloned().flatten()
    }

    fn insert(
        self: &Rc<Self>,
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
    ) -> Rc<Inner> {
        let ledger = Ledger::new(self.memory.clone());
        let inner = Inner::new(handle, proto, Rc::downgrade(self), ledger);
        let mut connections = self.connections.borrow_mut();
        if connections.len() <= handle.0 {
            connections.resize(handle.0 + 1, None);
        }
        connections[handle.0] = Some(inner.clone());
        self.count.set(self.count.get() + 1);
        drop(connections);
        inner.note(&mut inner.state());
        if let Some((code, reason)) = &*self.closed.borrow() {
            inner.close(*code, reason.clone());
        }
        inner
    }

    /// Removes a connection that has sent its last packet.
    pub(super) fn remove(&self, handle: ConnectionHandle) {
        let removed = self
            .connections
            .borrow_mut()
            .get_mut(handle.0)
            .map(Option::take);
        if let Some(Some(_)) = removed {
            self.count.set(self.count.get() - 1);
            if self.count.get() == 0 {
                self.left.notify_waiters();
            }
        }
    }

    /// Notes that a connection may have something to send.
    pub(super) fn note(&self, handle: ConnectionHandle) {
        self.noted.borrow_mut().push_back(handle);
        self.wake();
    }

    fn wake(&self) {
        if let Some(driver) = self.driver.borrow_mut().take() {
            driver.wake();
        }
    }

    /// Sets the task of the driver.
    pub(super) fn set_driver(&self, waker: &Waker) {
        self.driver.replace(Some(waker.clone()));
    }

    /// Queues an incoming connection.
    pub(super) fn arrive(&self, incoming: quinn_proto::Incoming) {
        self.strangers.borrow_mut().push_back(incoming);
        self.arrived.notify_one();
    }

    /// Whether the driver may end.
    pub(super) fn is_over(&self) -> bool {
        let is_done = self.has_left.get() && self.noted.borrow().is_empty();
        self.is_abandoned.get() && (self.count.get() == 0 || is_done)
    }

    /// Ends all connections, because their driver has gone.
    pub(super) fn abandon(&self) {
        let connections = std::mem::take(&mut *self.connections.borrow_mut());
        connections.iter().flatten().for_each(|c| c.abandon());
        self.count.set(0);
        self.left.notify_waiters();
    }

    fn respond(&self, transmit: &quinn_proto::Transmit, contents: &[u8]) {
        // Lost as on any network when the socket takes no more.
        let _ = self.udp.try_send(transmit, contents);
    }
}

impl Endpoint {
    /// Drives an endpoint over `udp` on the current runtime.
    pub(super) fn new(
        udp: Udp,
        config: EndpointConfig,
        acceptor: Option<Acceptor>,
        memory: MemoryBounds,
    ) -> Self {
        let may_probe = !udp.may_fragment();
        let server = acceptor.as_ref().map(Acceptor::common);
        let proto = quinn_proto::Endpoint::new(Arc::new(config), server, may_probe, None);
        let shared = Rc::new(Shared {
            proto: proto.into(),
            udp,
            acceptor,
            connections: RefCell::default(),
            count: Cell::default(),
            noted: RefCell::default(),
            strangers: RefCell::default(),
            arrived: Notify::new(),
            left: Notify::new(),
            closed: RefCell::default(),
            is_abandoned: Cell::default(),
            has_left: Cell::default(),
            driver: RefCell::default(),
            memory,
        });
        tokio::task::spawn_local(Driver::new(shared.clone()));
        Self(Rc::new(Handle(shared)))
    }

    fn shared(&self) -> &Rc<Shared> {
        &self.0.0
    }

    /// Returns the faults of the socket, each with its remedy.
    pub(super) fn complaints(&self) -> Vec<String> {
        self.shared().udp.complaints()
    }

    /// Dials `address`, and waits until the server is authenticated. Dropping the future closes the
    /// connection.
    ///
    /// # Errors
    /// The reason why the dial was not tried, or why it failed.
    pub fn connect(
        &self,
        config: ClientConfig,
        address: SocketAddr,
        name: &str,
    ) -> Result<impl Future<Output = Result<Connection, ConnectionError>> + use<>, ConnectError>
    {
        let shared = self.shared();
        let connecting = shared
            .proto
            .borrow_mut()
            .connect(Instant::now(), config, address, name);
        let (handle, proto) = connecting?;
        Ok(Connection::established(shared.insert(handle, proto)))
    }

    /// Waits for an incoming connection; `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        let shared = self.shared();
        loop {
            if shared.closed.borrow().is_some() {
                return None;
            }
            let next = shared.strangers.borrow_mut().pop_front();
            if let Some(incoming) = next {
                return Some(Incoming {
                    proto: Some(incoming),
                    endpoint: shared.clone(),
                });
            }
            shared.arrived.notified().await;
        }
    }

    /// Returns the local address.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared().udp.local_addr()
    }

    /// Closes all connections, including future ones.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        let shared = self.shared();
        let reason = Bytes::copy_from_slice(reason);
        shared.closed.replace(Some((code, reason.clone())));
        shared.arrived.notify_one();
        let connections = shared.connections.borrow().clone();
        for connection in connections.iter().flatten() {
            connection.close(code, reason.clone());
        }
    }

    /// Closes all connections, and leaves the socket, which stays open, to another process: no packet is
    /// received any more.
    pub fn leave(&self, code: VarInt, reason: &[u8]) {
        self.close(code, reason);
        self.shared().has_left.set(true);
    }

    /// Waits until all connections have sent their last packets.
    pub async fn wait_idle(&self) {
        let shared = self.shared();
        loop {
            let left = shared.left.notified();
            if shared.count.get() == 0 {
                break;
            }
            left.await;
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.is_abandoned.set(true);
        self.0.wake();
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("connections", &self.shared().count.get())
            .finish_non_exhaustive()
    }
}

/// An incoming connection. Dropped, it gets no answer.
pub struct Incoming {
    proto: Option<quinn_proto::Incoming>,
    endpoint: Rc<Shared>,
}

impl Incoming {
    /// Returns the peer's address, proven or not.
    pub fn remote_address(&self) -> SocketAddr {
        self.get().remote_address()
    }

    /// Whether the peer may be asked to prove its address.
    pub fn may_retry(&self) -> bool {
        self.get().may_retry()
    }

    /// Continues with the handshake, and waits until the peer is authenticated. Dropping the future
    /// closes the connection.
    ///
    /// # Errors
    /// The error of the handshake.
    pub async fn accept(mut self) -> Result<Connection, ConnectionError> {
        let mut answer = Vec::new();
        let incoming = self.take();
        let acceptor = self.endpoint.acceptor.as_ref();
        let config = acceptor.map(|acceptor| acceptor.config(incoming.remote_address()));
        let accepted = {
            let mut proto = self.endpoint.proto.borrow_mut();
            proto.accept(incoming, Instant::now(), &mut answer, config)
        };
        match accepted {
            Ok((handle, proto)) => {
                let inner = self.endpoint.insert(handle, proto);
                drop(self);
                Connection::established(inner).await
            }
            Err(error) => {
                if let Some(transmit) = error.response {
                    self.endpoint.respond(&transmit, &answer);
                }
                Err(error.cause)
            }
        }
    }

    /// Refuses the connection.
    pub fn refuse(mut self) {
        let mut answer = Vec::new();
        let incoming = self.take();
        let transmit = self
            .endpoint
            .proto
            .borrow_mut()
            .refuse(incoming, &mut answer);
        self.endpoint.respond(&transmit, &answer);
    }

    /// Whether the agent has chosen the shard on purpose, for one of several tunnels.
    pub fn is_placed(&self) -> bool {
        steering::is_placed(self.get().orig_dst_cid())
    }

    /// Requires a proof of the address (RFC 9000 section 8.1.2); the peer then connects again, to shard
    /// `at`. A peer that [may not](Self::may_retry) be asked gets no answer.
    pub fn retry(mut self, at: u8) {
        let mut answer = Vec::new();
        let incoming = self.take();
        let mut proto = self.endpoint.proto.borrow_mut();
        let retry = || proto.retry(incoming, &mut answer);
        let retried = match &self.endpoint.acceptor {
            Some(acceptor) => acceptor.ids().divert(at, retry),
            None => retry(),
        };
        match retried {
            Ok(transmit) => self.endpoint.respond(&transmit, &answer),
            Err(error) => proto.ignore(error.into_incoming()),
        }
    }

    #[expect(clippy::expect_used, reason = "taken only by what takes `self`")]
    fn get(&self) -> &quinn_proto::Incoming {
        self.proto.as_ref().expect("nobody has taken it")
    }

    #[expect(clippy::expect_used, reason = "taken only by what takes `self`")]
    fn take(&mut self) -> quinn_proto::Incoming {
        self.proto.take().expect("nobody has taken it")
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(incoming) = self.proto.take() {
            self.endpoint.proto.borrow_mut().ignore(incoming);
        }
    }
}
