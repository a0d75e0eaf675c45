//! The settings that the programs read: an attachment's entry and its captures.

use std::{io, net::IpAddr, path::Path};

use aya::maps::PerCpuValues;
use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::InterfaceFlags,
};
use tunnel_ebpf_common::{Attachment, Counter, Endpoint, Heartbeat, MAX_ATTACHMENTS, flags};

use super::{
    AttachmentSpec, FailMode, RedirectError, capture,
    link::Access,
    maps::{self, failed},
    netns,
    pin::Pin,
    prefix, retired, spec,
};

/// Name of the capture set in the result of [`Redirect::compare`](super::Redirect::compare).
pub const CAPTURE_SET: &str = "capture set";

/// Returns the number of an attachment of this name: the existing one, or the lowest free one.
///
/// A number stays with its name for as long as the attachment is pinned.
pub(super) fn number(pin: &Pin, name: &str) -> Result<u32, RedirectError> {
    if !pin.map("ATTACHMENTS").exists() {
        return Ok(0);
    }
    let attachments = maps::attachments(pin, Access::Read)?;
    if let Some((id, _)) = maps::find(&attachments, name)? {
        return Ok(id);
    }
    for id in 0..MAX_ATTACHMENTS {
        let entry = maps::optional(attachments.get(&id, 0)).map_err(failed("ATTACHMENTS"))?;
        if entry.is_none() {
            return Ok(id);
        }
    }
    Err(RedirectError::Full)
}

/// Writes a spec under its number. Running programs see it at once. Returns whether the captures
/// changed.
pub(super) fn write(pin: &Pin, id: u32, spec: &AttachmentSpec) -> Result<bool, RedirectError> {
    let (netns, own) = namespace(spec.netns.as_deref())?;
    let table = capture::compile(id, &spec.capture, &spec.exclude, &own)?;
    let entry = entry(spec, netns)?;

    let mut attachments = maps::attachments(pin, Access::Write)?;
    if maps::find(&attachments, &spec.name)?.is_none() {
        reset(pin, id)?;
    }
    let mut captures = maps::captures(pin, Access::Write)?;
    let old = prefix::read(&captures, Some(id)).map_err(failed("CAPTURES"))?;
    let steps = prefix::plan(&old, &table);
    prefix::apply(&mut captures, &steps).map_err(failed("CAPTURES"))?;
    attachments
        .insert(id, entry, 0)
        .map_err(failed("ATTACHMENTS"))?;
    Ok(!steps.is_empty())
}

/// Compares the settings in force with a spec, for a process that may not write them. Returns the
/// harmless differences, for people.
///
/// Needs no capability: a namespace that can't be entered is not compared.
pub(super) fn compare(
    pin: &Pin,
    spec: &AttachmentSpec,
) -> Result<Vec<&'static str>, RedirectError> {
    let (id, there) = maps::attached(pin, &spec.name)?;
    let now = namespace(spec.netns.as_deref()).ok();
    let netns = now.as_ref().map_or(there.netns, |(netns, _)| *netns);
    let wanted = entry(spec, netns)?;
    let endpoints = |entry: &Attachment| (entry.listener4, entry.listener6);
    let fails = |entry: &Attachment| entry.flags & flags::FAIL_OPEN;
    for (what, differs) in [
        ("network namespace", there.netns != wanted.netns),
        ("tenant", there.tenant != wanted.tenant),
        ("listen", endpoints(&there) != endpoints(&wanted)),
    ] {
        if differs {
            let name = spec.name.clone();
            return Err(RedirectError::Outdated { name, what });
        }
    }
    let mut differs = Vec::new();
    if fails(&there) != fails(&wanted) {
        differs.push("fail");
    }
    if retired::is_attached(pin, &spec.name) {
        differs.push("shortcut (removed)");
    }
    if let Some((_, own)) = now {
        let table = capture::compile(id, &spec.capture, &spec.exclude, &own)?;
        let captures = maps::captures(pin, Access::Read)?;
        if prefix::read(&captures, Some(id)).map_err(failed("CAPTURES"))? != table {
            differs.push(CAPTURE_SET);
        }
    }
    Ok(differs)
}

fn entry(spec: &AttachmentSpec, netns: u64) -> Result<Attachment, RedirectError> {
    Ok(Attachment {
        netns,
        tenant: spec.tenant,
        flags: match spec.fail {
            FailMode::Open => flags::FAIL_OPEN,
            FailMode::Closed => 0,
        },
        listener4: spec.listen4.map_or(Endpoint::NONE, |listen| {
            Endpoint::from(std::net::SocketAddr::V4(listen))
        }),
        listener6: spec.listen6.map_or(Endpoint::NONE, |listen| {
            Endpoint::from(std::net::SocketAddr::V6(listen))
        }),
        name: spec::padded(&spec.name)?,
    })
}

/// Removes the settings. The programs must be detached already.
pub(super) fn remove(pin: &Pin, id: u32) -> Result<(), RedirectError> {
    let mut captures = maps::captures(pin, Access::Write)?;
    let old = prefix::read(&captures, Some(id)).map_err(failed("CAPTURES"))?;
    let none = prefix::Table::new();
    prefix::apply(&mut captures, &prefix::plan(&old, &none)).map_err(failed("CAPTURES"))?;
    maps::attachments(pin, Access::Write)?
        .remove(&id)
        .map_err(failed("ATTACHMENTS"))
}

/// Removes the state of an earlier attachment with this number.
fn reset(pin: &Pin, id: u32) -> Result<(), RedirectError> {
    maps::heartbeats(pin, Access::Write)?
        .set(id, Heartbeat::NONE, 0)
        .map_err(failed("HEARTBEATS"))?;
    let mut counters = maps::counters(pin, Access::Write)?;
    for slot in 0..Counter::SLOTS {
        let index = id * Counter::SLOTS + slot;
        let cpus = counters.get(&index, 0).map_err(failed("COUNTERS"))?.len();
        let zeroes = PerCpuValues::try_from(vec![0; cpus])
            .map_err(|error| failed("COUNTERS")(error.into()))?;
        counters.set(index, zeroes, 0).map_err(failed("COUNTERS"))?;
    }
    Ok(())
}

/// Returns the namespace's cookie, and the addresses of it and of our own one.
///
/// Both are excluded: connections to them need no tunnel, and must not depend on one.
fn namespace(path: Option<&Path>) -> Result<(u64, Vec<IpAddr>), RedirectError> {
    let there = netns::within(path, || Ok((netns::cookie()?, addresses()?)));
    let here = addresses();
    let failed = |source: io::Error| RedirectError::Netns {
        path: path.unwrap_or(Path::new("/proc/self/ns/net")).to_owned(),
        source,
    };
    let (cookie, mut own) = there.map_err(failed)?;
    own.extend(here.map_err(failed)?);
    Ok((cookie, own))
}

/// Returns the addresses of this thread's namespace. An interface that is down counts as having none:
/// kube-proxy in IPVS mode keeps the addresses of all services on such a one.
fn addresses() -> io::Result<Vec<IpAddr>> {
    let address = |interface: InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    Ok(getifaddrs()?
        .filter(|interface| interface.flags.contains(InterfaceFlags::IFF_UP))
        .filter_map(address)
        .collect())
}
