//! Origins of redirected connections, for the accepting side.

use std::{net::SocketAddr, time::Duration};

use tunnel_ebpf_common::{Counter, FlowKey};

use super::{
    RedirectError,
    heartbeat::monotonic_ns,
    maps::{self, failed},
    pin::Pin,
};

/// Maximum wait of a connection in the listener's backlog. An older flow belongs to a connection that
/// was never accepted; the next one with the same ports must not inherit it.
pub const MAX_WAIT: Duration = Duration::from_secs(30);

/// Requested destination of an accepted connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Address that connect(2) was called with; v4-mapped addresses as IPv4 ones.
    pub destination: SocketAddr,
    /// Reason to reset the connection, where the kernel can refuse only by way of the listener.
    pub refused: Option<Counter>,
}

/// Flows of one attachment. To be reopened after its namespace has changed.
#[derive(Debug)]
pub struct Flows {
    map: maps::FlowMap,
    netns: u64,
}

impl Flows {
    pub(super) fn open(pin: &Pin, name: &str) -> Result<Self, RedirectError> {
        let (_, attachment) = maps::attached(pin, name)?;
        Ok(Self {
            map: maps::flows(pin)?,
            netns: attachment.netns,
        })
    }

    /// Takes the origin of an accepted connection: each can be taken once.
    ///
    /// `client` is the address from accept(2), `listener` the accepted socket's own address. `None`
    /// means that the connection was not redirected here and must be reset; a guess would send it
    /// anywhere.
    pub fn take_origin(
        &mut self,
        client: SocketAddr,
        listener: SocketAddr,
    ) -> Result<Option<Origin>, RedirectError> {
        let key = FlowKey {
            netns: self.netns,
            client: client.into(),
            listener: listener.into(),
        };
        let found = maps::optional(self.map.get(&key, 0)).map_err(failed("FLOWS"))?;
        let Some(flow) = found else {
            return Ok(None);
        };
        self.map.remove(&key).map_err(failed("FLOWS"))?;
        let waited = Duration::from_nanos(monotonic_ns().saturating_sub(flow.established));
        Ok((waited <= MAX_WAIT).then(|| Origin {
            destination: flow.destination.into(),
            refused: Some(flow.refused)
                .filter(|n| *n != 0)
                .and_then(Counter::from_number),
        }))
    }
}
