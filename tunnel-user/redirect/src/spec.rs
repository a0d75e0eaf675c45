//! Configuration of an attachment.

use std::{
    net::{SocketAddrV4, SocketAddrV6},
    ops::RangeInclusive,
    path::PathBuf,
};

use ipnet::IpNet;
use serde::Serialize;
use tunnel_ebpf_common::NAME_LENGTH;

use super::RedirectError;

/// Fate of captured connections while the connector is dead or stuck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// Captured connections are refused (ECONNREFUSED).
    #[default]
    Closed,
    /// Captured connections take the ordinary route.
    Open,
}

/// Ports of a network, to capture or to exclude.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The network; host bits are ignored.
    pub cidr: IpNet,
    /// The ports; empty means all of them.
    pub ports: Vec<RangeInclusive<u16>>,
}

/// One attachment as configured.
#[derive(Clone, Debug)]
pub struct AttachmentSpec {
    /// Name of the attachment: a file name, and the key of its number.
    pub name: String,
    /// Tenant whose routes decide: [`tenant_number`] of the trust domain.
    pub tenant: u32,
    /// The cgroup (version 2) whose sockets are redirected, those of its descendants included.
    ///
    /// A container's own cgroup goes away with each restart, so a stable ancestor is the safe
    /// choice; see [`super::Follower`] for the other one.
    pub cgroup: PathBuf,
    /// The network namespace whose sockets are redirected, as a file; default: this process's.
    pub netns: Option<PathBuf>,
    /// Listener of IPv4 connections, inside `netns`. Without it, captured ones are refused.
    pub listen4: Option<SocketAddrV4>,
    /// Listener of IPv6 connections, inside `netns`. Without it, captured ones are refused.
    pub listen6: Option<SocketAddrV6>,
    /// Rules of the captured destinations.
    pub capture: Vec<Rule>,
    /// Rules of exceptions. Loopback, the unspecified addresses, link-local ones and the addresses of
    /// both namespaces' own interfaces are always excepted.
    pub exclude: Vec<Rule>,
    /// Treatment of captured connections while the connector is away.
    pub fail: FailMode,
}

impl AttachmentSpec {
    /// Checks everything that does not need the kernel.
    pub(super) fn check(&self) -> Result<(), RedirectError> {
        padded(&self.name)?;
        if self.listen4.is_none() && self.listen6.is_none() {
            return Err(RedirectError::NoListener(self.name.clone()));
        }
        Ok(())
    }
}

impl AttachmentSpec {
    /// Returns a warning about a cgroup that is one unit's or one container's own, by its name: systemd
    /// and container runtimes make such a cgroup again at each start, with the program in it already. A
    /// slice stays.
    pub fn fleeting_cgroup(&self) -> Option<String> {
        let name = self.cgroup.file_name()?.to_str()?;
        let kind = [".service", ".scope"]
            .into_iter()
            .find(|kind| name.ends_with(kind))?;
        Some(format!(
            "{} is the cgroup of one {}: each start recreates it, and the first connects after that take the ordinary route. Name the slice that holds it (for systemd, `Slice=kube-apiserver.slice` \
             in the unit, and kube.slice/kube-apiserver.slice here)",
            self.cgroup.display(),
            kind.trim_start_matches('.')
        ))
    }
}

/// Checks the name of an attachment.
///
/// # Errors
/// [`RedirectError::Name`].
pub fn check_name(name: &str) -> Result<(), RedirectError> {
    padded(name).map(drop)
}

/// Returns a name as the map holds it.
pub(super) fn padded(name: &str) -> Result<[u8; NAME_LENGTH], RedirectError> {
    let usable = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if name.is_empty() || name.len() > NAME_LENGTH || !name.bytes().all(usable) {
        return Err(RedirectError::Name(name.to_owned()));
    }
    let mut padded = [0; NAME_LENGTH];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    Ok(padded)
}

/// Returns the name from the form of [`padded`].
pub(super) fn unpadded(name: &[u8; NAME_LENGTH]) -> String {
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(NAME_LENGTH);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

/// Returns the number by which the kernel distinguishes tenants: FNV-1a of the trust domain.
///
/// A hash stays the same over restarts without being stored anywhere. Should two trust domains collide,
/// a route of one makes the kernel redirect connections of the other, and the router, which goes by
/// names, has no route for them: they are reset instead of refused.
pub fn tenant_number(trust_domain: &str) -> u32 {
    trust_domain.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names_without_dots() {
        for good in ["a", "kube-apiserver", "API_2", &"x".repeat(NAME_LENGTH)] {
            assert_eq!(unpadded(&padded(good).unwrap()), good);
        }
        for bad in [
            "",
            ".",
            "a.b",
            "a/b",
            "ä",
            "a b",
            &"x".repeat(NAME_LENGTH + 1),
        ] {
            assert!(padded(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_cgroup_that_each_start_makes_again_is_warned_of() {
        let warned = |cgroup: &str| {
            let spec = AttachmentSpec {
                cgroup: cgroup.into(),
                ..example()
            };
            spec.fleeting_cgroup().is_some()
        };
        for fleeting in [
            "/sys/fs/cgroup/system.slice/kube-apiserver.service",
            "/sys/fs/cgroup/kubepods.slice/cri-containerd-0123.scope",
            "/sys/fs/cgroup/system.slice/kube-apiserver.service/",
        ] {
            assert!(warned(fleeting), "{fleeting}");
        }
        for stable in [
            "/sys/fs/cgroup/kube.slice/kube-apiserver.slice",
            "/sys/fs/cgroup/kubepods/burstable/pod0123",
            "/sys/fs/cgroup",
        ] {
            assert!(!warned(stable), "{stable}");
        }
    }

    fn example() -> AttachmentSpec {
        AttachmentSpec {
            name: "test".to_owned(),
            tenant: 0,
            cgroup: PathBuf::new(),
            netns: None,
            listen4: None,
            listen6: None,
            capture: Vec::new(),
            exclude: Vec::new(),
            fail: FailMode::Closed,
        }
    }

    #[test]
    fn tenant_numbers_are_fnv_1a() {
        // Vectors of the reference implementation.
        assert_eq!(tenant_number(""), 0x811c_9dc5);
        assert_eq!(tenant_number("foobar"), 0xbf9c_f968);
    }
}
