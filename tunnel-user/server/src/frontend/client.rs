//! A client that is being dialled for, with its socket: it goes to the shard of its link, where its
//! bytes are then moved without leaving that thread.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use tracing::Instrument;
use tunnel_proto::http_connect::ESTABLISHED;

use super::{Served, answers, failed, serve};
use crate::dial::{Dial, DialError, Dialled, Step};
use crate::shard::{Admitted, Shard};
use cpc_config::frontend::Answers;
use cpc_datapath::LocalSocket;
use cpc_datapath::socket::Portable;
use cpc_host::report::report;
use cpc_observe::konnectivity::Counted;

/// A client that takes no answer by then is dropped.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How a client learns what became of its dial.
#[derive(Clone, Copy, Debug)]
pub(super) enum Manner {
    /// It is connected already: a reset is all that it can be told.
    Redirected,
    /// It waits for an answer of HTTP.
    HttpConnect(Answers),
}

/// A client, and all that goes with it.
pub(super) struct Client<L> {
    /// Its socket.
    pub local: L,
    /// How it is answered.
    pub manner: Manner,
    /// What it asked for.
    pub dial: Dial,
    /// Its place.
    pub admitted: Admitted,
    /// Counts it as Konnectivity does.
    pub counted: Option<Counted>,
}

/// A client whose target is connected.
pub(super) struct Established<L> {
    local: L,
    served: Served,
    _admitted: Admitted,
    _counted: Option<Counted>,
}

impl<L: Portable> Client<L> {
    /// Serves it to its end, here or where its link lives.
    pub(super) fn serve(self: Box<Self>, shard: Rc<Shard>) -> impl Future<Output = ()> {
        serve_once(shard.clone(), Box::pin(self.dial(shard)))
    }

    /// `None`: nothing is left to be done here.
    ///
    /// In boxes that malloc has bins for, each of its own size: what is freed is then used by the next
    /// dial, and not by what stays.
    pub(super) async fn dial(self: Box<Self>, shard: Rc<Shard>) -> Option<Box<Established<L>>> {
        let span = self.dial.record.span();
        self.dial_in(shard).instrument(span).await
    }

    async fn dial_in(mut self: Box<Self>, shard: Rc<Shard>) -> Option<Box<Established<L>>> {
        match self.dial.advance(&shard, &self.local).await {
            Ok(Step::Dialled(dialled)) => {
                self.dial.record.reached(&shard.metrics.dials);
                if let Manner::HttpConnect(_) = self.manner {
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
        Established {
            local: self.local,
            served: Served::new(shard, *self.dial.into_record(), dialled),
            _admitted: self.admitted,
            _counted: self.counted,
        }
    }

    /// Gives it to the shard where its link lives. What was read of it goes along.
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
            // It is reset, as it was set to be.
            Err(error) => return tracing::warn!(error = report(&error), "client not handed over"),
        };
        shard.run_on(at, move |shard| {
            let there = shard.clone();
            let dialled = async move {
                let unpacked = L::unpack(packed);
                let refused =
                    |error| tracing::warn!(error = report(&error), "client not taken over");
                let client = Self {
                    local: unpacked.map_err(refused).ok()?,
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
        if let Manner::HttpConnect(answers) = self.manner {
            answer_and_close(&self.local, answers::failure(answers, error)).await;
        }
    }
}

/// Serves a client once it is `dialled`; what that took is given back before bytes are moved, for
/// days perhaps.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice"
)]
pub(super) fn serve_once<L: LocalSocket>(
    shard: Rc<Shard>,
    dialled: Pin<Box<impl Future<Output = Option<Box<Established<L>>>>>>,
) -> impl Future<Output = ()> {
    async move {
        let Some(mut client) = dialled.await else {
            return;
        };
        serve(&shard, &client.local, &mut client.served).await;
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

/// Answers a client whom nothing is waited for, as far as its socket takes it.
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
        assert!(sizes.iter().all(|size| *size <= 424), "{sizes:?}");
        // A session of TLS has kilobytes beside it.
        let tls = served::<TlsSocket>();
        assert!(tls <= 448, "{tls}");
    }
}
