//! Capabilities of a server, at its start and later.

use cpc_config::ServerConfig;
use cpc_host::kernel;
use cpc_host::privileges::{ANY_START, CapabilitySet};

/// Returns the capabilities that the start of a server with this configuration may use.
pub fn for_start(config: &ServerConfig) -> CapabilitySet {
    if config.redirect.attachments.is_empty() {
        return ANY_START;
    }
    // To load, to give the pins to `redirect.group`, and to enter `netns` for a listener.
    ANY_START
        | CapabilitySet::BPF
        | CapabilitySet::CHOWN
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::PERFMON
        | CapabilitySet::SYS_ADMIN
}

/// Returns the capabilities that the server keeps, and the reason. `attached` tells whether it attached
/// by itself.
pub fn kept(config: &ServerConfig, attached: bool) -> (CapabilitySet, &'static str) {
    let attachments = &config.redirect.attachments;
    if attached && attachments.iter().any(|it| it.netns.is_some()) {
        let why = "changed capture sets are compiled in the namespace of the attachment (netns)";
        (CapabilitySet::SYS_ADMIN, why)
    } else if !attachments.is_empty() && !kernel::is_since((5, 19)) {
        // `kernel.unprivileged_bpf_disabled` was about all of bpf(2) then, not about loading programs
        // and making maps alone.
        (CapabilitySet::BPF, "before Linux 5.19 maps take it")
    } else {
        (CapabilitySet::empty(), "")
    }
}
