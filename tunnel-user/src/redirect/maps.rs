//! The maps as user space sees them, opened from their pins.

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SockHash},
};
use tunnel_ebpf_common::{Attachment, Flow, FlowKey, PortSet, Prefix};

use super::{RedirectError, pin::Pin, spec};

/// Every map of the object, to be pinned under its name.
pub(super) const NAMES: [&str; 8] = [
    "ATTACHMENTS",
    "AYA_LOGS",
    "CAPTURES",
    "COUNTERS",
    "FLOWS",
    "HEARTBEATS",
    "ORIGINS",
    "ROUTES",
];

/// Every map of the shortcut's object; the first two are the redirect's.
pub(super) const SHORTCUT_NAMES: [&str; 7] = [
    "ATTACHMENTS",
    "ORIGINS",
    "SHORTCUT_READ",
    "SHORTCUT_READERS",
    "SHORTCUT_TAKEN",
    "SHORTCUT_WRITERS",
    "SHORTCUT_WRITTEN",
];

/// Attachments by number.
pub(super) type Attachments = HashMap<MapData, u32, Attachment>;
/// Captured prefixes.
pub(super) type Captures = LpmTrie<MapData, Prefix, PortSet>;
/// Routes: numbers of verdicts.
pub(super) type RouteTrie = LpmTrie<MapData, Prefix, u32>;
/// Heartbeats by attachment.
pub(super) type Heartbeats = Array<MapData, u64>;
/// Connections to be accepted.
pub(super) type FlowMap = HashMap<MapData, FlowKey, Flow>;
/// Counters by attachment and kind.
pub(super) type CounterMap = PerCpuArray<MapData, u64>;

/// Our ends of shortcuts.
pub(super) type ShortcutReaders = SockHash<MapData, FlowKey>;
/// The clients' ends.
pub(super) type ShortcutWriters = SockHash<MapData, FlowKey>;
/// Bytes, by connection.
pub(super) type ShortcutCounts = HashMap<MapData, FlowKey, u64>;

pub(super) fn attachments(pin: &Pin) -> Result<Attachments, RedirectError> {
    open(pin, "ATTACHMENTS")
}

pub(super) fn captures(pin: &Pin) -> Result<Captures, RedirectError> {
    open(pin, "CAPTURES")
}

pub(super) fn routes(pin: &Pin) -> Result<RouteTrie, RedirectError> {
    open(pin, "ROUTES")
}

pub(super) fn heartbeats(pin: &Pin) -> Result<Heartbeats, RedirectError> {
    open(pin, "HEARTBEATS")
}

pub(super) fn flows(pin: &Pin) -> Result<FlowMap, RedirectError> {
    open(pin, "FLOWS")
}

pub(super) fn counters(pin: &Pin) -> Result<CounterMap, RedirectError> {
    open(pin, "COUNTERS")
}

pub(super) fn shortcut_readers(pin: &Pin) -> Result<ShortcutReaders, RedirectError> {
    open(pin, "SHORTCUT_READERS")
}

pub(super) fn shortcut_writers(pin: &Pin) -> Result<ShortcutWriters, RedirectError> {
    open(pin, "SHORTCUT_WRITERS")
}

pub(super) fn shortcut_read(pin: &Pin) -> Result<ShortcutCounts, RedirectError> {
    open(pin, "SHORTCUT_READ")
}

pub(super) fn shortcut_taken(pin: &Pin) -> Result<ShortcutCounts, RedirectError> {
    open(pin, "SHORTCUT_TAKEN")
}

/// Opens a pinned map. That its keys and values have our sizes is checked.
fn open<M: TryFrom<Map, Error = MapError>>(
    pin: &Pin,
    name: &'static str,
) -> Result<M, RedirectError> {
    MapData::from_pin(pin.map(name))
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(failed(name))
}

/// An error about a map.
pub(super) fn failed(name: &'static str) -> impl Fn(MapError) -> RedirectError {
    move |source| RedirectError::Map { name, source }
}

/// `None` for a key that is not there.
pub(super) fn optional<V: Pod>(found: Result<V, MapError>) -> Result<Option<V>, MapError> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Number and settings of an attachment.
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

/// As [`find`], from the pins; an error when there is none.
pub(super) fn attached(pin: &Pin, name: &str) -> Result<(u32, Attachment), RedirectError> {
    let missing = || RedirectError::NotAttached(name.to_owned());
    if !pin.exists() {
        return Err(missing());
    }
    find(&attachments(pin)?, name)?.ok_or_else(missing)
}
