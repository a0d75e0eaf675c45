//! Hands the origin of a redirected socket to the accepting side.
//!
//! The callback runs when the SYN-ACK has arrived and before the ACK is sent, so that the flow
//! is always there when the listener accepts.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, bpf_sock_ops},
    helpers::bpf_ktime_get_ns,
    programs::SockOpsContext,
};
use tunnel_ebpf_common::{Address, Counter, Endpoint, Flow, FlowKey};

use crate::{
    maps::{FLOWS, attachment, count},
    origin,
};

/// What every callback here answers.
const DONE: u32 = 1;

const AF_INET: u32 = 2;

/// Callback `BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB`; all others are left alone.
#[inline(always)]
pub(crate) fn established(ctx: &SockOpsContext) -> u32 {
    if ctx.op() != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        return DONE;
    }
    // SAFETY: `ctx` is the hook's context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return DONE;
    }
    // SAFETY: just checked.
    let Some(origin) = (unsafe { origin::of_socket(sk) }) else {
        return DONE;
    };
    let Some((_, attachment)) = attachment() else {
        return DONE;
    };
    let (client, listener) = endpoints(ctx.ops);
    let key = FlowKey {
        netns: attachment.netns,
        client,
        listener,
    };
    let flow = Flow {
        // SAFETY: has no preconditions.
        established: unsafe { bpf_ktime_get_ns() },
        destination: origin.destination,
        refused: origin.refused,
    };
    // The map evicts its oldest entries when it is full, so this can fail only for want of
    // memory; the accepting side then finds nothing and resets.
    if FLOWS.insert(key, flow, 0).is_ok() {
        count(Counter::Established);
    }
    DONE
}

/// Local and remote end. A v4-mapped socket connects over IPv4: the same key either way.
#[inline(always)]
fn endpoints(ops: *const bpf_sock_ops) -> (Endpoint, Endpoint) {
    // SAFETY: `ops` is the hook's context, which has the fields of both families whatever the
    // socket's is.
    let word = |field: *const u32| unsafe { ptr::read_volatile(field) };
    let words = |field: *const u32| {
        Address([
            word(field),
            word(field.wrapping_add(1)),
            word(field.wrapping_add(2)),
            word(field.wrapping_add(3)),
        ])
    };
    // SAFETY: only addresses within the context are formed.
    let (family, local4, remote4, local6, remote6, local_port, remote_port) = unsafe {
        (
            word(&raw const (*ops).family),
            word(&raw const (*ops).local_ip4),
            word(&raw const (*ops).remote_ip4),
            words((&raw const (*ops).local_ip6).cast()),
            words((&raw const (*ops).remote_ip6).cast()),
            // Host order, unlike the remote port: that is in network order in the upper half.
            word(&raw const (*ops).local_port),
            u32::from_be(word(&raw const (*ops).remote_port)),
        )
    };
    let (local, remote) = if family == AF_INET {
        (Address::mapped(local4), Address::mapped(remote4))
    } else {
        (local6, remote6)
    };
    (
        Endpoint {
            address: local,
            port: local_port,
        },
        Endpoint {
            address: remote,
            port: remote_port,
        },
    )
}
