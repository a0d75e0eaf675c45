//! The maps and the constants that the loader sets.
//!
//! User space pins every map under its name here; sizes and layouts are the common crate's.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray},
};
use tunnel_ebpf_common as common;
use tunnel_ebpf_common::{Attachment, Counter, Flow, FlowKey, Heartbeat, Origin, PortSet, Prefix};

/// Number of the attachment that these programs were loaded for.
#[unsafe(no_mangle)]
static ATTACHMENT: Global<u32> = Global::new(0);

/// 1 where the kernel lets a connect hook choose the errno (`bpf_set_retval`, Linux 6.1). The
/// loader freezes it, so that the verifier drops the calls an older kernel does not know.
#[unsafe(no_mangle)]
static CHOOSE_ERRNO: Global<u8> = Global::new(0);

/// The attachments by number.
#[map]
static ATTACHMENTS: HashMap<u32, Attachment> =
    HashMap::with_max_entries(common::MAX_ATTACHMENTS, BPF_F_NO_PREALLOC);

/// Captured prefixes of each attachment. The longest prefix alone decides.
#[map]
pub(crate) static CAPTURES: LpmTrie<Prefix, PortSet> =
    LpmTrie::with_max_entries(common::MAX_CAPTURES, 0);

/// Prefixes that the agents of each tenant serve: numbers of [`common::Verdict`].
#[map]
pub(crate) static ROUTES: LpmTrie<Prefix, u32> = LpmTrie::with_max_entries(common::MAX_ROUTES, 0);

/// Last beat of each attachment's connector, with the ports of its listeners.
#[map]
pub(crate) static HEARTBEATS: Array<Heartbeat> =
    Array::with_max_entries(common::MAX_ATTACHMENTS, 0);

/// Listeners of connectors: the number of the attachment, in the storage of the socket. Another
/// program's socket on the same port has no such mark.
#[btf_map]
pub(crate) static LISTENERS: SkStorage<u32> = SkStorage::new();

/// Redirected connections for the accepting side to take.
#[map]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow> =
    LruHashMap::with_max_entries(common::MAX_FLOWS, 0);

/// Destination of each redirected socket, in the storage of the socket: the kernel can't evict it,
/// and it ends with the socket.
#[btf_map]
pub(crate) static ORIGINS: SkStorage<Origin> = SkStorage::new();

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ENTRIES, 0);

/// Returns number and settings of the attachment that these programs run for.
#[inline(always)]
pub(crate) fn attachment() -> Option<(u32, &'static Attachment)> {
    let id = ATTACHMENT.load();
    // SAFETY: entries change only when an attachment is configured again; what a connect that
    // races with it reads is the old entry or the new one.
    unsafe { ATTACHMENTS.get(id) }.map(|attachment| (id, attachment))
}

/// Returns the number of the attachment that these programs run for.
#[inline(always)]
pub(crate) fn attachment_id() -> u32 {
    ATTACHMENT.load()
}

/// Whether a refusal can name its errno.
#[inline(always)]
pub(crate) fn can_choose_errno() -> bool {
    CHOOSE_ERRNO.load() != 0
}

/// Adds one to a counter of this attachment.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    let index = common::counter_index(attachment_id(), counter);
    if let Some(slot) = COUNTERS.get_ptr_mut(index) {
        // This CPU's own. On a preemptible kernel another connect(2) may come in between, and one
        // of the two goes uncounted: Rust has no atomic addition for this target.
        // SAFETY: aligned, and alive for as long as the program runs.
        unsafe { *slot += 1 };
    }
}
