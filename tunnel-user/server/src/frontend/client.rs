//! A client during its dial, with its socket. It moves to the shard of its link, where its bytes are
//! then relayed without leaving that thread.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::http_connect::ESTABLISHED;

use super::connection::{Parked, ServeEnd, Served, ended, failed, serve};
use super::refusals::Refusals;
use crate::dial::error::DialError;
use crate::dial::{Dial, Dialled, Step};
use crate::handover::{Collected, CollectedClient};
use crate::permits::ConnectionPermit;
use crate::resumption::{Advance, Lost};
use crate::shard::Shard;
use cpc_datapath::LocalSocket;
use cpc_datapath::socket::Portable;
use cpc_host::report::report;
use cpc_observe::metrics::{Closer, FrontendKind, GaugeGuard};

/// Timeout for a client to take its answer.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Time since the last byte, before the loss of a tunnel, below which a connection does not wait for its turn.
const BUSY: Duration = Duration::from_millis(100);

/// Form of the answer to a client.
#[derive(Clone, Copy)]
pub(super) enum AnswerFormat {
    /// The client is connected already: a reset is the only possible answer.
    Redirected,
    /// The client waits for an HTTP answer.
    HttpConnect(&'static dyn Refusals),
}

/// A client with its dial.
pub(super) struct Client<L> {
    /// Socket of the client.
    pub local: L,
    /// Form of its answer.
    pub manner: AnswerFormat,
    /// The dial.
    pub dial: Dial,
    /// Permit of the connection.
    pub admitted: ConnectionPermit,
    /// Count of the observer.
    pub counted: Option<GaugeGuard>,
}

/// A client whose target is connected.
pub(super) struct Established<L> {
    local: L,
    served: Served,
    _admitted: ConnectionPermit,
    _counted: Option<GaugeGuard>,
}

impl<L: Portable> Client<L> {
    /// Serves the client to its end, here or on the shard of its link.
    pub(super) fn serve(self: Box<Self>, shard: Rc<Shard>) -> impl Future<Output = ()> {
        serve_once(shard.clone(), Box::pin(self.dial(shard)))
    }

    /// Dials. Returns `None` if nothing is left to do on this shard.
    ///
    /// The boxes have sizes for which malloc has bins, each its own: the next dial then uses freed
    /// memory, and long-lived values do not.
    pub(super) async fn dial(self: Box<Self>, shard: Rc<Shard>) -> Option<Box<Established<L>>> {
        let span = self.dial.record.span();
        self.dial_in(shard).instrument(span).await
    }

    async fn dial_in(mut self: Box<Self>, shard: Rc<Shard>) -> Option<Box<Established<L>>> {
        match self.dial.advance(&shard, &self.local).await {
            Ok(Step::Dialled(dialled)) => {
                self.dial.record.reached(&shard.metrics.dials);
                if let AnswerFormat::HttpConnect(_) = self.manner {
                    // A client that is gone by now shows in the relay as well.
                    let _ = write(&self.local, ESTABLISHED).await;
                }
                return Some(Box::new(self.established(&shard, *dialled)));
            }
            Ok(Step::Elsewhere(at)) => self.hand_over(&shard, at),
            Err(error) => self.refuse(&shard, &error).await,
        }
        None
    }

    fn established(self, shard: &Shard, dialled: Dialled) -> Established<L> {
        let (record, tenant) = self.dial.into_record();
        Established {
            local: self.local,
            served: Served::new(shard, *record, tenant, dialled),
            _admitted: self.admitted,
            _counted: self.counted,
        }
    }

    /// Moves the client to the shard of its link, with the bytes read from it.
    fn hand_over(self, shard: &Rc<Shard>, at: usize) {
        let Self {
            local,
            manner,
            dial,
            admitted,
            counted,
        } = self;
        let packed = match local.pack() {
            Ok(packed) => packed,
            Err(error) => return not_moved(shard, &dial, &error),
        };
        shard.run_on(at, move |shard| {
            let there = shard.clone();
            let dialled = async move {
                let local = match L::unpack(packed) {
                    Ok(local) => local,
                    Err(error) => {
                        not_moved(&there, &dial, &error);
                        return None;
                    }
                };
                let client = Self {
                    local,
                    manner,
                    dial,
                    admitted,
                    counted,
                };
                Box::new(client).dial(there).await
            };
            serve_once(shard, Box::pin(dialled))
        });
    }

    async fn refuse(&self, shard: &Shard, error: &DialError) {
        failed(shard, &self.dial.record, error);
        if let AnswerFormat::HttpConnect(refusals) = self.manner {
            answer_and_close(&self.local, refusals.failure(error)).await;
        }
    }
}

/// Writes the record of a client whose socket can't change its shard: the client gets a reset, as its
/// socket was set to.
fn not_moved(shard: &Shard, dial: &Dial, error: &io::Error) {
    let text = format!("the socket can't move to another shard: {}", report(error));
    let error = DialError::new(CloseReason::Internal, Closer::Server, text);
    if let Some(observer) = &shard.observer {
        observer.dial_failed(&error);
    }
    failed(shard, &dial.record, &error);
}

/// A client whose tunnel was lost.
struct Waiting<L> {
    local: L,
    parked: Parked,
    admitted: ConnectionPermit,
    counted: Option<GaugeGuard>,
}

impl<L: Portable> Established<L> {
    fn park(self) -> Waiting<L> {
        Waiting {
            local: self.local,
            parked: self.served.park(),
            admitted: self._admitted,
            counted: self._counted,
        }
    }
}

impl<L: Portable> Waiting<L> {
    /// Waits for another tunnel, and goes on over it, here or on its shard. Returns `None` if nothing is left
    /// to do here.
    async fn go_on(self, shard: &Rc<Shard>, lost: Box<Lost>) -> Option<Box<Established<L>>> {
        let idle = self.local.idle_time();
        let was_busy = idle.is_some_and(|idle| idle < lost.waited() + BUSY);
        let poll_urgent = |cx: &mut Context<'_>| match was_busy {
            true => Poll::Ready(()),
            false => self.local.poll_readable(cx),
        };
        let advance = tokio::select! {
            advance = lost.advance(shard, poll_urgent) => advance,
            () = self.local.cut() => Advance::Ended(CloseReason::IdentityRefused),
        };
        match advance {
            Advance::Here(resumed) => {
                return Some(Box::new(Established {
                    local: self.local,
                    served: self.parked.resume(*resumed),
                    _admitted: self.admitted,
                    _counted: self.counted,
                }));
            }
            Advance::Elsewhere(at, lost) => self.move_to(shard, at, lost),
            Advance::HandedOver(lost) => self.hand_over(shard, lost),
            Advance::Ended(reason) => {
                if reason == CloseReason::Finished {
                    self.local.reset_on_close(false);
                }
                ended(shard, &self.parked.record, Closer::Tunnel, reason);
            }
        }
        None
    }

    /// Gives the client to the process that takes the place of this one. A client that can't leave the process
    /// ends.
    fn hand_over(self, shard: &Rc<Shard>, lost: Box<Lost>) {
        let parked = self.parked;
        let Some(socket) = self.local.pack().ok().and_then(L::into_parts) else {
            lost.abandon(shard, CloseReason::HandedOver);
            return ended(
                shard,
                &parked.record,
                Closer::Server,
                CloseReason::HandedOver,
            );
        };
        let client = CollectedClient {
            socket,
            parked,
            _permit: self.admitted,
        };
        shard.handover.give(Collected {
            client: Some(client),
            lost,
        });
    }

    /// Moves to another shard, and goes on waiting there.
    fn move_to(self, shard: &Rc<Shard>, at: usize, lost: Box<Lost>) {
        let Self {
            local,
            parked,
            admitted,
            counted,
        } = self;
        let not_moved = |shard: &Shard, parked: &Parked| {
            ended(shard, &parked.record, Closer::Server, CloseReason::Internal);
        };
        let Ok(packed) = local.pack() else {
            lost.abandon(shard, CloseReason::Internal);
            return not_moved(shard, &parked);
        };
        shard.run_on(at, move |shard| {
            let there = shard.clone();
            let moved = async move {
                let Ok(local) = L::unpack(packed) else {
                    lost.abandon(&there, CloseReason::Internal);
                    not_moved(&there, &parked);
                    return None;
                };
                let client = Self {
                    local,
                    parked,
                    admitted,
                    counted,
                };
                client.go_on(&there, lost).await
            };
            serve_once(shard, Box::pin(moved))
        });
    }
}

/// A client of another process that waits for a tunnel here.
pub(crate) struct Restored<P> {
    /// The socket.
    pub socket: P,
    /// The connection.
    pub parked: Parked,
    /// Counts the connection.
    pub permit: ConnectionPermit,
    /// The session.
    pub lost: Box<Lost>,
}

impl<P: Send + 'static> Restored<P> {
    /// Waits for a tunnel, and serves the client to its end, on this shard or others.
    pub(crate) fn spawn<L: Portable<Packed = P>>(self, shard: &Rc<Shard>) {
        let counted = match self.parked.record.frontend {
            FrontendKind::HttpConnect => shard.observer.as_ref().map(|it| it.http_connection()),
            _ => None,
        };
        let there = shard.clone();
        let waiting = async move {
            let local = match L::unpack(self.socket) {
                Ok(local) => local,
                Err(error) => {
                    tracing::warn!(error = report(&error), "a connection is not taken over");
                    self.lost.abandon(&there, CloseReason::Internal);
                    let record = &self.parked.record;
                    ended(&there, record, Closer::Server, CloseReason::Internal);
                    return None;
                }
            };
            let client = Waiting {
                local,
                parked: self.parked,
                admitted: self.permit,
                counted,
            };
            client.go_on(&there, self.lost).await
        };
        tokio::task::spawn_local(serve_once(shard.clone(), Box::pin(waiting)));
    }
}

/// Serves a client once it is `dialled`. Memory of the dial is freed before the relay, which may take
/// days.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice"
)]
pub(super) fn serve_once<L: Portable>(
    shard: Rc<Shard>,
    dialled: Pin<Box<impl Future<Output = Option<Box<Established<L>>>>>>,
) -> impl Future<Output = ()> {
    async move {
        let Some(mut client) = dialled.await else {
            return;
        };
        loop {
            match serve(&shard, &client.local, &mut client.served).await {
                ServeEnd::Ended(_) => return,
                ServeEnd::Lost(lost) => match Box::pin(client.park().go_on(&shard, lost)).await {
                    Some(resumed) => client = resumed,
                    None => return,
                },
            }
        }
    }
}

/// Answers and closes in order, so that the answer arrives.
pub(super) async fn answer_and_close(local: &impl LocalSocket, answer: Bytes) {
    let told = async {
        write(local, &answer).await?;
        local.finish().await
    };
    if timeout(REQUEST_TIMEOUT, told)
        .await
        .is_ok_and(|done| done.is_ok())
    {
        local.reset_on_close(false);
    }
}

/// Answers a client without waiting, as far as its socket takes it.
pub(super) fn answer_at_once(local: &impl LocalSocket, answer: &[u8]) {
    if matches!(local.try_write(&[IoSlice::new(answer)]), Ok(Some(n)) if n == answer.len()) {
        local.reset_on_close(false);
    }
}

async fn write(local: &impl LocalSocket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match local.try_write(&[IoSlice::new(bytes)])? {
            Some(n) => bytes = &bytes[n..],
            None => local.writable().await?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpStream, UnixStream};

    use super::*;
    use cpc_datapath::socket::TlsSocket;

    fn size_of_output<A, F>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// Most of what an idle connection costs a server besides its sockets and streams.
    #[test]
    fn a_client_that_waits_is_small() {
        fn served<L: Portable>() -> usize {
            size_of_output(|(client, shard): (Box<Client<L>>, _)| client.serve(shard))
        }
        let sizes = [served::<TcpStream>(), served::<UnixStream>()];
        assert!(sizes.iter().all(|size| *size <= 504), "{sizes:?}");
        // A session of TLS has kilobytes beside it.
        let tls = served::<TlsSocket>();
        assert!(tls <= 536, "{tls}");
    }
}
