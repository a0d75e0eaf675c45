//! All kinds of tunnels, behind one enum. A kind is a module that implements [`Tunnel`], and a line in the
//! list at the end of this file.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use tunnel_proto::close::CloseReason;

use super::{Probe, Tunnel, TunnelError, TunnelRecv, TunnelSend};
use crate::quic;
use cpc_config::TunnelKind;
use cpc_datapath::Budget;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident($tunnel:ty),)+) => {
        /// A tunnel of any kind.
        #[derive(Clone, Debug)]
        pub enum Connection {
            $($(#[$doc])* $kind($tunnel),)+
        }

        /// The sending half of a stream, on a tunnel of any kind.
        #[derive(Debug)]
        pub enum Send {
            $($(#[$doc])* $kind(<$tunnel as Tunnel>::Send),)+
        }

        /// The receiving half of a stream, on a tunnel of any kind.
        #[derive(Debug)]
        pub enum Recv {
            $($(#[$doc])* $kind(<$tunnel as Tunnel>::Recv),)+
        }

        /// A future that waits for the end of a sending half.
        pub enum Ended {
            $($(#[$doc])* $kind(<<$tunnel as Tunnel>::Send as TunnelSend>::Ended),)+
        }

        $(impl From<$tunnel> for Connection {
            fn from(tunnel: $tunnel) -> Self {
                Self::$kind(tunnel)
            }
        })+

        impl Tunnel for Connection {
            type Send = Send;
            type Recv = Recv;

            fn kind(&self) -> TunnelKind {
                match self {
                    $(Self::$kind(tunnel) => tunnel.kind(),)+
                }
            }

            async fn open(&self) -> Result<(Send, Recv), TunnelError> {
                match self {
                    $(Self::$kind(tunnel) => {
                        let (send, recv) = tunnel.open().await?;
                        Ok((Send::$kind(send), Recv::$kind(recv)))
                    })+
                }
            }

            async fn accept(&self) -> Result<(Send, Recv), TunnelError> {
                match self {
                    $(Self::$kind(tunnel) => {
                        let (send, recv) = tunnel.accept().await?;
                        Ok((Send::$kind(send), Recv::$kind(recv)))
                    })+
                }
            }

            fn close(&self, reason: CloseReason, text: &str) {
                match self {
                    $(Self::$kind(tunnel) => Tunnel::close(tunnel, reason, text),)+
                }
            }

            fn remote(&self) -> SocketAddr {
                match self {
                    $(Self::$kind(tunnel) => tunnel.remote(),)+
                }
            }

            fn probe(&self) -> Probe {
                match self {
                    $(Self::$kind(tunnel) => tunnel.probe(),)+
                }
            }

            fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
                match self {
                    $(Self::$kind(tunnel) => tunnel.peer_certificate(),)+
                }
            }

            fn charge_to(&self, budget: &Budget) {
                match self {
                    $(Self::$kind(tunnel) => tunnel.charge_to(budget),)+
                }
            }

            fn has_unacknowledged(&self) -> bool {
                match self {
                    $(Self::$kind(tunnel) => tunnel.has_unacknowledged(),)+
                }
            }
        }

        impl SendHalf for Send {
            fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
                poll_fn(|cx| self.poll_send(cx, chunk))
            }

            fn finish(&mut self) {
                match self {
                    $(Self::$kind(half) => half.finish(),)+
                }
            }

            fn lingers(&self) -> bool {
                match self {
                    $(Self::$kind(half) => half.lingers(),)+
                }
            }

            fn finish_half(&mut self) {
                match self {
                    $(Self::$kind(half) => half.finish_half(),)+
                }
            }

            fn reset(&mut self, reason: CloseReason) {
                match self {
                    $(Self::$kind(half) => half.reset(reason),)+
                }
            }

            fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
                self.ended()
            }
        }

        impl TunnelSend for Send {
            type Ended = Ended;

            fn poll_send(
                &mut self,
                cx: &mut Context<'_>,
                chunk: &mut Bytes,
            ) -> Poll<Result<(), SendEnd>> {
                match self {
                    $(Self::$kind(half) => half.poll_send(cx, chunk),)+
                }
            }

            fn ended(&self) -> Ended {
                match self {
                    $(Self::$kind(half) => Ended::$kind(half.ended()),)+
                }
            }

            fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<SendEnd> {
                match self {
                    $(Self::$kind(half) => half.poll_stopped(cx),)+
                }
            }

            fn go_first(&mut self) {
                match self {
                    $(Self::$kind(half) => half.go_first(),)+
                }
            }

            fn tunnel_error(&self) -> Option<TunnelError> {
                match self {
                    $(Self::$kind(half) => half.tunnel_error(),)+
                }
            }
        }

        impl Future for Ended {
            type Output = SendEnd;

            fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<SendEnd> {
                match self.get_mut() {
                    $(Self::$kind(ended) => Pin::new(ended).poll(cx),)+
                }
            }
        }

        impl RecvHalf for Recv {
            fn recv(
                &mut self,
                into: &mut Vec<Bytes>,
            ) -> impl Future<Output = Result<(), RecvEnd>> {
                poll_fn(|cx| self.poll_recv(cx, into))
            }

            fn reset(&mut self) -> impl Future<Output = CloseReason> {
                poll_fn(|cx| self.poll_reset(cx))
            }

            fn stop(&mut self, reason: CloseReason) {
                match self {
                    $(Self::$kind(half) => half.stop(reason),)+
                }
            }

            fn is_charged(&self) -> bool {
                match self {
                    $(Self::$kind(half) => half.is_charged(),)+
                }
            }
        }

        impl TunnelRecv for Recv {
            fn poll_recv(
                &mut self,
                cx: &mut Context<'_>,
                into: &mut Vec<Bytes>,
            ) -> Poll<Result<(), RecvEnd>> {
                match self {
                    $(Self::$kind(half) => half.poll_recv(cx, into),)+
                }
            }

            fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
                match self {
                    $(Self::$kind(half) => half.poll_reset(cx),)+
                }
            }

            fn put_back(&mut self, bytes: Bytes) {
                match self {
                    $(Self::$kind(half) => half.put_back(bytes),)+
                }
            }

            fn tunnel_error(&self) -> Option<TunnelError> {
                match self {
                    $(Self::$kind(half) => half.tunnel_error(),)+
                }
            }
        }
    };
}

kinds! {
    /// QUIC.
    Quic(quic::Connection),
}

#[cfg(test)]
mod tests;
