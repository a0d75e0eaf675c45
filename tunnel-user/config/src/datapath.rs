//! `datapath`: the engine that moves bytes between sockets.

use serde::{Deserialize, Serialize};

/// `datapath`: the engine that moves bytes between sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatapathConfig {
    /// The kernel's interface that tunnels and TCP connections are driven by.
    pub engine: EngineChoice,
}

/// Configured engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum EngineChoice {
    /// The faster engine by measurement, today epoll.
    #[default]
    Auto,
    /// Readiness by epoll(7), available everywhere.
    Epoll,
    /// Completions by io_uring(7); epoll where the kernel refuses it.
    IoUring,
}
