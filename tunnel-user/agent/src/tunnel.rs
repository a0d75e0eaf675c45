//! Tunnels to servers, of any kind.
//!
//! A [`TunnelDialer`] knows how a kind reaches a server. This crate has one for each native kind, where
//! our protocol runs; an [`Extension`](super::extension::Extension) brings those of foreign kinds. A
//! tunnel lives on one shard: its futures need not be `Send`.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tunnel_proto::close::CloseReason;

use super::dial_target::DialTarget;
use super::plan::ServerInfo;
use super::tunnel_info::{TunnelEnd, TunnelInfo};
use super::worker::Worker;
use cpc_config::TunnelKind;
use cpc_transport::tunnel::Probe;

/// Polling interval of an ending tunnel for the end of its streams.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Time for the last packets of a tunnel to arrive.
pub const GOODBYE: Duration = Duration::from_millis(500);

/// Error of any crate, which is logged.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Dials servers over one kind of tunnel.
pub trait TunnelDialer: Send + Sync {
    /// Returns the kind.
    fn kind(&self) -> TunnelKind;

    /// Dials `target` and introduces the agent. Returns `None` if the server turns out to be one that the
    /// agent does not want ([`DialTarget::is_wanted`]).
    ///
    /// # Errors
    /// Any error is logged, and the dial repeated later.
    fn dial<'a>(
        &'a self,
        worker: &'a Rc<Worker>,
        target: &'a mut DialTarget,
    ) -> LocalBoxFuture<'a, Result<Option<Box<dyn EstablishedTunnel>>, BoxError>>;
}

/// An established tunnel that is not served yet.
pub trait EstablishedTunnel {
    /// Returns the tunnel, for those who end it.
    fn tunnel(&self) -> Rc<dyn ServerTunnel>;

    /// Returns the server of the tunnel.
    fn server(&self) -> ServerInfo;

    /// Ends an unwanted tunnel, and tells the server.
    fn decline(self: Box<Self>, reason: CloseReason) -> LocalBoxFuture<'static, ()>;

    /// Serves the tunnel until it ends. Calls `changed` when the server falls silent, is heard again, or
    /// drains.
    fn serve(self: Box<Self>, changed: Box<dyn Fn()>) -> LocalBoxFuture<'static, TunnelEnd>;
}

/// An established tunnel, while another task serves it.
pub trait ServerTunnel {
    /// Returns the description of the tunnel.
    fn info(&self) -> &TunnelInfo;

    /// Returns a probe of the path, where the protocol measures it.
    fn probe(&self) -> Option<Probe> {
        None
    }

    /// Ends the tunnel and everything on it, with a reason that is true for what the server has received.
    fn close(&self, reason: CloseReason) -> LocalBoxFuture<'_, ()>;

    /// Ends the tunnel when its last stream has ended: another one replaced it.
    fn retire(self: Rc<Self>) -> LocalBoxFuture<'static, ()>;
}
