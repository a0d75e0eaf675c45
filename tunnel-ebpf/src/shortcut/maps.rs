//! The shortcut's maps. User space pins every map under its name here.

use core::ptr;

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{HashMap, SockHash},
};
use tunnel_ebpf_common::{Attachment, FlowKey, MAX_ATTACHMENTS, MAX_SHORTCUTS, Origin, Writer};

/// Number of the attachment that `shortcut_begin` was loaded for.
#[unsafe(no_mangle)]
static ATTACHMENT: Global<u32> = Global::new(0);

/// The redirect's own: attachments by number.
#[map]
static ATTACHMENTS: HashMap<u32, Attachment> =
    HashMap::with_max_entries(MAX_ATTACHMENTS, BPF_F_NO_PREALLOC);

/// The redirect's own: where a redirected socket wanted to go.
#[btf_map]
static ORIGINS: SkStorage<Origin> = SkStorage::new();

/// The clients. `shortcut_verdict` is attached to this map, and so runs for its members' writes.
#[map]
pub(crate) static SHORTCUT_WRITERS: SockHash<FlowKey> =
    SockHash::with_max_entries(MAX_SHORTCUTS, 0);

/// What each of them has written, stored in its socket.
#[btf_map]
static SHORTCUT_WRITTEN: SkStorage<Writer> = SkStorage::new();

/// The connector's sockets, put here by itself. No program is attached, so that its own writes
/// are TCP's as ever.
#[map]
pub(crate) static SHORTCUT_READERS: SockHash<FlowKey> =
    SockHash::with_max_entries(MAX_SHORTCUTS, 0);

/// How many bytes the connector has read from each, whichever way they came.
#[map]
pub(crate) static SHORTCUT_READ: HashMap<FlowKey, u64> =
    HashMap::with_max_entries(MAX_SHORTCUTS, BPF_F_NO_PREALLOC);

/// How many bytes took the shortcut to each.
#[map]
pub(crate) static SHORTCUT_TAKEN: HashMap<FlowKey, u64> =
    HashMap::with_max_entries(MAX_SHORTCUTS, BPF_F_NO_PREALLOC);

/// The attachment that `shortcut_begin` runs for: number and settings.
#[inline(always)]
pub(crate) fn attachment() -> Option<(u32, &'static Attachment)> {
    let id = ATTACHMENT.load();
    // SAFETY: entries change only when an attachment is configured anew; what a handshake that
    // races with it reads is the old entry or the new one.
    unsafe { ATTACHMENTS.get(id) }.map(|attachment| (id, attachment))
}

/// Where a socket wanted to go, if it was redirected.
///
/// # Safety
///
/// `sk` is a socket that the verifier knows not to be null.
#[inline(always)]
pub(crate) unsafe fn origin(sk: *mut bpf_sock) -> Option<&'static Origin> {
    let map = ptr::from_ref(&ORIGINS).cast_mut();
    // SAFETY: the caller's promise; null or a value that lives as long as the program runs.
    unsafe {
        bpf_sk_storage_get(map.cast(), sk.cast(), ptr::null_mut(), 0)
            .cast::<Origin>()
            .as_ref()
    }
}

/// What is known of a client.
///
/// # Safety
///
/// As [`origin`]; and nobody else has a reference to the same value.
#[inline(always)]
pub(crate) unsafe fn writer(sk: *mut bpf_sock) -> Option<&'static mut Writer> {
    let map = ptr::from_ref(&SHORTCUT_WRITTEN).cast_mut();
    // SAFETY: the caller's promise; null or a value that lives as long as the program runs.
    unsafe {
        bpf_sk_storage_get(map.cast(), sk.cast(), ptr::null_mut(), 0)
            .cast::<Writer>()
            .as_mut()
    }
}

/// Notes a client. False when the kernel has no memory for it.
///
/// # Safety
///
/// As [`origin`].
#[inline(always)]
pub(crate) unsafe fn note(sk: *mut bpf_sock, mut writer: Writer) -> bool {
    let map = ptr::from_ref(&SHORTCUT_WRITTEN).cast_mut();
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: the caller's promise; the value is copied.
    !unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), (&raw mut writer).cast(), create) }
        .is_null()
}
