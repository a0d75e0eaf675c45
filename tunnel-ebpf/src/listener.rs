//! Whether the connector is there to take a connection.

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_sk_lookup_tcp, bpf_sk_release},
    },
    programs::SockAddrContext,
};
use tunnel_ebpf_common::{Counter, Endpoint, HEARTBEAT_STALE_NS};

use crate::maps::HEARTBEATS;

/// `BPF_F_CURRENT_NETNS`: the namespace of the hook's socket.
const CURRENT_NETNS: u64 = -1_i64 as u64;

/// Why the connector can't take a connection, or `None` when it can.
#[inline(always)]
pub(crate) fn fault(
    ctx: &SockAddrContext,
    attachment: u32,
    listener: &Endpoint,
) -> Option<Counter> {
    if !is_heard(ctx, listener) {
        return Some(Counter::Dead);
    }
    let heartbeat = HEARTBEATS.get(attachment).copied().unwrap_or(0);
    // SAFETY: has no preconditions.
    let age = unsafe { bpf_ktime_get_ns() }.saturating_sub(heartbeat);
    (age > HEARTBEAT_STALE_NS).then_some(Counter::Stuck)
}

/// Whether somebody listens on `listener`. Only a listener matches a tuple without a remote end.
#[inline(always)]
fn is_heard(ctx: &SockAddrContext, listener: &Endpoint) -> bool {
    if listener.port == 0 {
        return false;
    }
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
    // SAFETY: not null, and released once.
    unsafe { bpf_sk_release(sk.cast()) };
    true
}
