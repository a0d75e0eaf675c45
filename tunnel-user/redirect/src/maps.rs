//! The maps as user space sees them, opened from their pins.

use std::path::Path;

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SkStorage},
    sys::SyscallError,
};
use tunnel_ebpf_common::{Attachment, Flow, FlowKey, Heartbeat, PortSet, Prefix};

use super::{
    RedirectError,
    link::{Access, open_pin},
    pin::Pin,
    spec,
};

/// Every map of the object, to be pinned under its name.
pub(super) const NAMES: [&str; 9] = [
    "ATTACHMENTS",
    "AYA_LOGS",
    "CAPTURES",
    "COUNTERS",
    "FLOWS",
    "HEARTBEATS",
    "LISTENERS",
    "ORIGINS",
    "ROUTES",
];

/// Attachments by number.
pub(super) type Attachments = HashMap<MapData, u32, Attachment>;
/// Captured prefixes.
pub(super) type Captures = LpmTrie<MapData, Prefix, PortSet>;
/// Routes: numbers of verdicts.
pub(super) type RouteTrie = LpmTrie<MapData, Prefix, u32>;
/// Heartbeats by attachment.
pub(super) type Heartbeats = Array<MapData, Heartbeat>;
/// Numbers of attachments, in their listeners.
pub(super) type Listeners = SkStorage<MapData, u32>;
/// Connections to be accepted.
pub(super) type FlowMap = HashMap<MapData, FlowKey, Flow>;
/// Counters by attachment and kind.
pub(super) type CounterMap = PerCpuArray<MapData, u64>;

pub(super) fn attachments(pin: &Pin, access: Access) -> Result<Attachments, RedirectError> {
    open(pin, "ATTACHMENTS", access)
}

pub(super) fn captures(pin: &Pin, access: Access) -> Result<Captures, RedirectError> {
    open(pin, "CAPTURES", access)
}

pub(super) fn routes(pin: &Pin) -> Result<RouteTrie, RedirectError> {
    open(pin, "ROUTES", Access::Write)
}

pub(super) fn heartbeats(pin: &Pin, access: Access) -> Result<Heartbeats, RedirectError> {
    open(pin, "HEARTBEATS", access)
}

pub(super) fn listeners(pin: &Pin) -> Result<Listeners, RedirectError> {
    open(pin, "LISTENERS", Access::Write)
}

pub(super) fn flows(pin: &Pin) -> Result<FlowMap, RedirectError> {
    open(pin, "FLOWS", Access::Write)
}

pub(super) fn counters(pin: &Pin, access: Access) -> Result<CounterMap, RedirectError> {
    open(pin, "COUNTERS", access)
}

/// Opens a pinned map, and checks the sizes of its keys and values.
fn open<M: TryFrom<Map, Error = MapError>>(
    pin: &Pin,
    name: &'static str,
    access: Access,
) -> Result<M, RedirectError> {
    let refused = |io_error| {
        let call = "BPF_OBJ_GET";
        MapError::from(SyscallError { call, io_error })
    };
    open_pin(&pin.map(name), access)
        .map_err(refused)
        .and_then(MapData::from_fd)
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(failed(name))
}

/// Opens the attachments that another connector has pinned, of any schema with this layout.
pub(super) fn attachments_at(path: &Path) -> Option<Attachments> {
    let map = MapData::from_fd(open_pin(path, Access::Read).ok()?).ok()?;
    Map::from_map_data(map).ok()?.try_into().ok()
}

/// Opens the attachments by the number of their map (takes CAP_SYS_ADMIN).
pub(super) fn attachments_of(id: u32) -> Option<Attachments> {
    Map::from_map_data(MapData::from_id(id).ok()?)
        .ok()?
        .try_into()
        .ok()
}

/// Returns a conversion of errors about a map.
pub(super) fn failed(name: &'static str) -> impl Fn(MapError) -> RedirectError {
    move |source| match is_full(&source) {
        true => RedirectError::TableFull(name),
        false => RedirectError::Map { name, source },
    }
}

/// Whether a map had no room for another entry.
pub(super) fn is_full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error)
        if matches!(error.io_error.raw_os_error(), Some(libc::ENOSPC | libc::E2BIG)))
}

/// Converts the error for a missing key to `None`.
pub(super) fn optional<V: Pod>(found: Result<V, MapError>) -> Result<Option<V>, MapError> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns number and settings of an attachment.
pub(super) fn find(
    attachments: &Attachments,
    name: &str,
) -> Result<Option<(u32, Attachment)>, RedirectError> {
    let name = spec::padded(name)?;
    for entry in attachments.iter() {
        let (id, attachment) = entry.map_err(failed("ATTACHMENTS"))?;
        if attachment.name == name {
            return Ok(Some((id, attachment)));
        }
    }
    Ok(None)
}

/// Returns number and settings of an attachment as [`find`] does, from the pins; an error when there is
/// none.
pub(super) fn attached(pin: &Pin, name: &str) -> Result<(u32, Attachment), RedirectError> {
    let missing = || RedirectError::NotAttached(name.to_owned());
    if !pin.exists() {
        return Err(missing());
    }
    find(&attachments(pin, Access::Read)?, name)?.ok_or_else(missing)
}
