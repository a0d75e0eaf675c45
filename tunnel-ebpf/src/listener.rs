//! The search for the connector's listener.
//!
//! An open port proves nothing: after the end of the connector any local program can bind it. So
//! the connector's own sockets carry a mark in their storage. Only user space with access to
//! LISTENERS can set the mark, which ends with the socket.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_sk_lookup_tcp, bpf_sk_release, bpf_sk_storage_get},
    },
    programs::SockAddrContext,
};
use tunnel_ebpf_common::{Counter, Endpoint, HEARTBEAT_STALE_NS};

use crate::maps::{HEARTBEATS, LISTENERS};

/// `BPF_F_CURRENT_NETNS`: the namespace of the hook's socket.
const CURRENT_NETNS: u64 = -1_i64 as u64;

/// Returns the listener that takes connections of `configured`'s family now, or the reason why none
/// can.
#[inline(always)]
pub(crate) fn find(
    ctx: &SockAddrContext,
    attachment: u32,
    configured: &Endpoint,
) -> Result<Endpoint, Counter> {
    let Some(heartbeat) = HEARTBEATS.get(attachment) else {
        return Err(Counter::Dead);
    };
    let port = if configured.address.is_mapped() {
        heartbeat.port4
    } else {
        heartbeat.port6
    };
    if configured.port == 0 || port == 0 {
        return Err(Counter::Dead);
    }
    let listener = Endpoint {
        address: configured.address,
        port,
    };
    if !is_ours(ctx, attachment, &listener) {
        return Err(Counter::Dead);
    }
    // SAFETY: has no preconditions.
    let age = unsafe { bpf_ktime_get_ns() }.saturating_sub(heartbeat.at);
    if age > HEARTBEAT_STALE_NS {
        return Err(Counter::Stuck);
    }
    Ok(listener)
}

/// Whether the socket that listens on `listener` is the attachment's. Only a listener matches a tuple
/// without a remote end.
#[inline(always)]
fn is_ours(ctx: &SockAddrContext, attachment: u32, listener: &Endpoint) -> bool {
    // SAFETY: integers only.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let port = (listener.port as u16).to_be();
    let size = if listener.address.is_mapped() {
        tuple.__bindgen_anon_1.ipv4.daddr = listener.address.0[3];
        tuple.__bindgen_anon_1.ipv4.dport = port;
        // SAFETY: only the size of the variant is looked at.
        size_of_val(unsafe { &tuple.__bindgen_anon_1.ipv4 })
    } else {
        tuple.__bindgen_anon_1.ipv6.daddr = listener.address.0;
        tuple.__bindgen_anon_1.ipv6.dport = port;
        // SAFETY: only the size of the variant is looked at.
        size_of_val(unsafe { &tuple.__bindgen_anon_1.ipv6 })
    };
    // SAFETY: context and tuple live on this program's stack; the size is the variant's.
    let sk = unsafe {
        bpf_sk_lookup_tcp(
            ctx.sock_addr.cast(),
            &raw mut tuple,
            size as u32,
            CURRENT_NETNS,
            0,
        )
    };
    if sk.is_null() {
        return false;
    }
    let map = ptr::from_ref(&LISTENERS).cast_mut();
    // SAFETY: `sk` is not null; what is returned is null or the map's value.
    let mark = unsafe {
        bpf_sk_storage_get(map.cast(), sk.cast(), ptr::null_mut(), 0)
            .cast::<u32>()
            .as_ref()
            .copied()
    };
    // SAFETY: not null, and released once.
    unsafe { bpf_sk_release(sk.cast()) };
    mark == Some(attachment)
}
