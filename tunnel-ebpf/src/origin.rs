//! The origin in its socket's storage (`bpf_sk_storage_get`).

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock, helpers::generated::bpf_sk_storage_get, programs::SockAddrContext,
};
use tunnel_ebpf_common::Origin;

use crate::maps::{ORIGINS, attachment_id};

/// Stores the requested destination of a socket. Returns false when the kernel has no memory for
/// it.
#[inline(always)]
pub(crate) fn store(ctx: &SockAddrContext, mut origin: Origin) -> bool {
    // SAFETY: `ctx` is the hook's context, whose socket is never null.
    let stored = unsafe { ORIGINS.get_or_insert_ptr_mut(ctx, Some(&mut origin)) };
    if stored.is_null() {
        return false;
    }
    // An earlier attempt on the same socket may have left another one.
    // SAFETY: not null, and the socket is locked by connect(2).
    unsafe { *stored = origin };
    true
}

/// Forgets an earlier attempt of this attachment's: this one takes the ordinary route.
#[inline(always)]
pub(crate) fn remove(ctx: &SockAddrContext) {
    if of_context(ctx).is_some() {
        // SAFETY: `ctx` is the hook's context, whose socket is never null.
        let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
        // It can't have gone in between: connect(2) holds the socket's lock.
        // SAFETY: as above.
        let _ = unsafe { ORIGINS.delete(sk) };
    }
}

/// Returns the origin of the hook's socket, if this attachment redirected it.
#[inline(always)]
pub(crate) fn of_context(ctx: &SockAddrContext) -> Option<&'static Origin> {
    // SAFETY: `ctx` is the hook's context, whose socket is never null.
    own(unsafe { ORIGINS.get_ptr_mut(ctx) })
}

/// Returns the origin of a socket, if this attachment redirected it.
///
/// # Safety
///
/// `sk` is a socket that the verifier knows not to be null.
#[inline(always)]
pub(crate) unsafe fn of_socket(sk: *mut bpf_sock) -> Option<&'static Origin> {
    let map = ptr::from_ref(&ORIGINS).cast_mut();
    // SAFETY: the caller's promise.
    own(unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), ptr::null_mut(), 0) }.cast())
}

/// Returns the origin if this attachment stored it: several attachments may share a cgroup, each in
/// its own namespace.
#[inline(always)]
fn own(origin: *mut Origin) -> Option<&'static Origin> {
    // SAFETY: null or what the helper returned for the socket that this program holds.
    unsafe { origin.as_ref() }.filter(|origin| origin.attachment == attachment_id())
}
