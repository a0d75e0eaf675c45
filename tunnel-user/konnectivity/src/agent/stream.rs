//! The two halves of a connection on a proxy-server's stream, as the datapath sees them.
//!
//! There is no half-close: the target's end ends both directions, and so does the server's. Data
//! received by then still reaches the target. A half that is dropped before its end resets.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::text::go_error;
use tunnel_proto::preface::DialResponse;

use super::session::{Session, Stream};
use cpc_agent::extension::Answer;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// Maximum number of bytes taken from a queue at once: writing that much counts as progress.
const BATCH: usize = 64 << 10;

/// Maximum number of chunks taken from a queue at once: one vectored write.
const CHUNKS: usize = 32;

/// Maximum number of bytes that the kernel keeps beyond those that the target's has taken
/// (`TCP_NOTSENT_LOWAT`, tcp(7)). Without a bound it would report room only once megabytes have left,
/// and a slow target would look like one that takes nothing.
const UNSENT: u32 = 128 << 10;

/// Maximum time without progress of a target, for data received before its connection was closed.
const LINGER: Duration = Duration::from_secs(30);

/// Creates the halves of a requested connection.
pub(super) fn halves(
    session: &Rc<Session>,
    stream: Rc<Stream>,
) -> (KonnectivitySend, KonnectivityRecv) {
    (
        KonnectivitySend::new(session.clone(), stream.clone()),
        KonnectivityRecv::new(session.clone(), stream),
    )
}

/// The half towards the server.
#[derive(Debug)]
pub(super) struct KonnectivitySend {
    session: Rc<Session>,
    stream: Rc<Stream>,
    ended: bool,
}

impl KonnectivitySend {
    fn new(session: Rc<Session>, stream: Rc<Stream>) -> Self {
        Self {
            session,
            stream,
            ended: false,
        }
    }
}

impl SendHalf for KonnectivitySend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        if let Some(end) = self.stream.send_end() {
            return Err(end);
        }
        tokio::select! {
            biased;
            sent = self.session.outbox().send(self.stream.id, chunk) => {
                sent.map_err(|end| SendEnd::Link(end.reason()))
            }
            (_, end) = self.stream.ended() => Err(end),
        }
    }

    fn finish(&mut self) {
        self.ended = true;
        self.session.finish(self.stream.id);
    }

    fn reset(&mut self, reason: CloseReason) {
        self.ended = true;
        self.session.reset(self.stream.id, reason);
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        let stream = self.stream.clone();
        async move { stream.ended().await.1 }
    }
}

impl Answer for KonnectivitySend {
    /// False: a server that knows of the drain dials this agent only without an alternative.
    const ASKS_OTHERS: bool = false;

    async fn answer(&mut self, response: DialResponse) {
        match response {
            DialResponse::Connected => self.session.dialled(self.stream.id),
            DialResponse::Refused { reason, detail } => {
                self.ended = true;
                let error = go_error(&self.stream.destination, reason, &detail);
                self.session.dial_failed(self.stream.id, error);
            }
        }
    }

    fn fit(&self, target: &TcpStream) -> io::Result<()> {
        SockRef::from(target).set_tcp_notsent_lowat(UNSENT)
    }
}

impl Drop for KonnectivitySend {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(CloseReason::Aborted);
        }
    }
}

/// The half from the server.
#[derive(Debug)]
pub(super) struct KonnectivityRecv {
    session: Rc<Session>,
    stream: Rc<Stream>,
    /// Data returned last, which the target has taken when more is requested.
    given: Given,
    ended: bool,
}

#[derive(Debug, Default)]
struct Given {
    bytes: usize,
    packets: usize,
}

impl KonnectivityRecv {
    fn new(session: Rc<Session>, stream: Rc<Stream>) -> Self {
        Self {
            session,
            stream,
            given: Given::default(),
            ended: false,
        }
    }

    /// Moves a batch out of the queue.
    fn give(&mut self, into: &mut Vec<Bytes>) {
        let mut queue = self.stream.queue.borrow_mut();
        let mut chunks = 0;
        while chunks < CHUNKS && self.given.bytes < BATCH {
            let Some(chunk) = queue.front_mut() else {
                break;
            };
            let given = chunk.split_to(chunk.len().min(BATCH - self.given.bytes));
            if chunk.is_empty() {
                queue.pop_front();
                self.given.packets += 1;
            }
            self.given.bytes += given.len();
            into.push(given);
            chunks += 1;
        }
    }
}

impl RecvHalf for KonnectivityRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        let Given { bytes, packets } = std::mem::take(&mut self.given);
        if bytes > 0 {
            self.session.taken(self.stream.id, bytes, packets);
        }
        loop {
            if let Some(end @ RecvEnd::Reset(_)) = self.stream.recv_end() {
                self.ended = true;
                return Err(end);
            }
            self.give(into);
            if self.given.bytes > 0 {
                return Ok(());
            }
            if let Some(end) = self.stream.recv_end() {
                self.ended = true;
                return Err(end);
            }
            self.stream.arrival().await;
        }
    }

    async fn reset(&mut self) -> CloseReason {
        match self.stream.ended().await.0 {
            RecvEnd::Reset(reason) => reason,
            // Only this target still waits for the rest.
            RecvEnd::Finished => {
                sleep(LINGER).await;
                CloseReason::IdleTimeout
            }
            RecvEnd::Link(_) => std::future::pending().await,
        }
    }

    fn stop(&mut self, _reason: CloseReason) {
        self.ended = true;
        self.stream.queue.borrow_mut().clear();
        self.session.stop(self.stream.id);
    }
}

impl Drop for KonnectivityRecv {
    fn drop(&mut self) {
        if !self.ended {
            self.stop(CloseReason::Aborted);
        }
    }
}
