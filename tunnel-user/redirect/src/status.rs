//! Status of the attachments in the kernel.

use std::{collections::BTreeMap, fmt, io, net::SocketAddr};

use serde::Serialize;
use tunnel_ebpf_common::{Attachment, Counter, Endpoint, flags};

use super::{
    FailMode, Hook, RedirectError, counters,
    heartbeat::monotonic_ns,
    link::Access,
    link::Link,
    maps::{self, failed},
    pin::{self, Pin},
    prefix, spec,
};

/// State of one program's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum LinkState {
    /// The program is in a cgroup.
    Attached {
        /// The cgroup's number: its directory's inode number.
        cgroup: u64,
        /// The program's number.
        program: u32,
    },
    /// The cgroup of the program was removed.
    Orphaned,
    /// No link is pinned.
    Missing,
    /// This process may not open the link, which is its owner's.
    Hidden,
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attached { cgroup, program } => {
                write!(f, "in another cgroup ({cgroup}, as program {program})")
            }
            Self::Orphaned => f.write_str("in a cgroup that was removed"),
            Self::Missing => f.write_str("missing"),
            Self::Hidden => f.write_str("hidden"),
        }
    }
}

/// Status of one attachment.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Name of the attachment.
    pub name: String,
    /// Number of the attachment.
    pub id: u32,
    /// Number of the tenant.
    pub tenant: u32,
    /// Cookie of the namespace.
    pub netns: u64,
    /// Listeners of connections: the ports on which the connector listens, or is configured to.
    pub listeners: Vec<SocketAddr>,
    /// Treatment of captured connections while the connector is away.
    pub fail: FailMode,
    /// Number of prefixes in the compiled capture set.
    pub prefixes: usize,
    /// Milliseconds since the connector's last heartbeat; `None` without one, or after an orderly end.
    pub heartbeat_age_ms: Option<u64>,
    /// Each program by name.
    pub links: BTreeMap<&'static str, LinkState>,
    /// Each counter by label.
    pub counters: BTreeMap<&'static str, u64>,
}

/// Reads all attachments, sorted by name.
pub(super) fn read(pin: &Pin) -> Result<Vec<Status>, RedirectError> {
    if !pin.exists() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for entry in maps::attachments(pin, Access::Read)?.iter() {
        let (id, attachment) = entry.map_err(failed("ATTACHMENTS"))?;
        all.push(one(pin, id, &attachment)?);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn one(pin: &Pin, id: u32, attachment: &Attachment) -> Result<Status, RedirectError> {
    let name = spec::unpadded(&attachment.name);
    let heartbeat = maps::heartbeats(pin, Access::Read)?
        .get(&id, 0)
        .map_err(failed("HEARTBEATS"))?;
    let captures = maps::captures(pin, Access::Read)?;
    let captures = prefix::read(&captures, Some(id)).map_err(failed("CAPTURES"))?;
    let port = |configured: Endpoint, port| match heartbeat.at {
        0 => configured,
        _ => Endpoint { port, ..configured },
    };
    let listeners = [
        port(attachment.listener4, heartbeat.port4),
        port(attachment.listener6, heartbeat.port6),
    ];
    let open = attachment.flags & flags::FAIL_OPEN != 0;
    let counted = counters::of(&maps::counters(pin, Access::Read)?, id)?;
    Ok(Status {
        id,
        tenant: attachment.tenant,
        netns: attachment.netns,
        listeners: listeners
            .into_iter()
            .filter(|l| l.port != 0)
            .map(Into::into)
            .collect(),
        fail: if open {
            FailMode::Open
        } else {
            FailMode::Closed
        },
        prefixes: captures.len(),
        heartbeat_age_ms: (heartbeat.at != 0)
            .then(|| monotonic_ns().saturating_sub(heartbeat.at) / 1_000_000),
        links: links(pin, &name)?,
        counters: counted
            .into_iter()
            .map(|(counter, n)| (Counter::label(counter), n))
            .collect(),
        name,
    })
}

/// See [`super::Redirect::verify`].
pub(super) fn verify(pin: &Pin, name: &str, cgroup: u64) -> Result<(), RedirectError> {
    maps::attached(pin, name)?;
    for (hook, state) in links(pin, name)? {
        let is_there = match state {
            LinkState::Attached { cgroup: there, .. } => there == cgroup,
            LinkState::Hidden => true,
            LinkState::Orphaned | LinkState::Missing => false,
        };
        if !is_there {
            let name = name.to_owned();
            return Err(RedirectError::Incomplete { name, hook, state });
        }
    }
    if pin.remembered_cgroup(name) != Some(cgroup) {
        return Err(RedirectError::OtherCgroup(name.to_owned()));
    }
    match pin.remembered_rivals(name) {
        Some(rivals) => Err(RedirectError::Rivals(rivals)),
        None => Ok(()),
    }
}

fn links(pin: &Pin, name: &str) -> Result<BTreeMap<&'static str, LinkState>, RedirectError> {
    let state = |hook: Hook| {
        let path = pin.link(name, hook);
        let info = Link::open(&path).and_then(|link| link.map(|link| link.info()).transpose());
        let state = match info {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => LinkState::Hidden,
            Err(error) => return Err(pin::failed(&path, error)),
            Ok(None) => LinkState::Missing,
            Ok(Some(info)) if info.cgroup == 0 => LinkState::Orphaned,
            Ok(Some(info)) => LinkState::Attached {
                cgroup: info.cgroup,
                program: info.program,
            },
        };
        Ok((hook.name(), state))
    };
    Hook::ALL.into_iter().map(state).collect()
}
