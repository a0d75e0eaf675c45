//! `datapath`: how bytes are moved between sockets.

use serde::Deserialize;

use crate::datapath::engine::Choice;

/// `datapath`: how bytes are moved between sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatapathConfig {
    /// The kernel's interface that tunnels and TCP connections are driven by.
    pub engine: Choice,
}
