//! Which capabilities a server's start may take, and which it keeps.

use crate::config::ServerConfig;
use crate::process::privileges::{ANY_START, CapabilitySet};

/// What the start of a server with this configuration may take.
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

/// What it keeps for later, and why. `attached`: it did that by itself.
pub(super) fn kept(config: &ServerConfig, attached: bool) -> (CapabilitySet, &'static str) {
    let attachments = &config.redirect.attachments;
    if attached && attachments.iter().any(|it| it.netns.is_some()) {
        let why = "changed capture sets are compiled in the namespace of the attachment (netns)";
        (CapabilitySet::SYS_ADMIN, why)
    } else if !attachments.is_empty() && maps_take_a_capability() {
        (CapabilitySet::BPF, "before Linux 5.19 maps take it")
    } else {
        (CapabilitySet::empty(), "")
    }
}

/// Before Linux 5.19 `kernel.unprivileged_bpf_disabled` was about all of bpf(2), not about loading
/// programs and making maps alone.
fn maps_take_a_capability() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    version(&release).is_none_or(|version| version < (5, 19))
}

/// Of `6.18.44-generic`, say, the first two numbers.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(version("5.9-rc1"), Some((5, 9)));
        assert!(version("5.9-rc1") < Some((5, 19)));
        assert_eq!(version("next"), None);
    }
}
