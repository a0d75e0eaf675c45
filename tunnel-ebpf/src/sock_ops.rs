//! Passes the origin of a redirected socket to the accepting side.
//!
//! The callback runs when the SYN-ACK has arrived and before the ACK is sent, so that the flow
//! is always there when the listener accepts.

use aya_ebpf::{
    bindings::BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, helpers::bpf_ktime_get_ns,
    programs::SockOpsContext,
};
use tunnel_ebpf_common::{Counter, Flow, FlowKey};

use crate::{
    endpoints::endpoints,
    maps::{FLOWS, attachment, count},
    origin,
};

/// Result of every callback here.
const DONE: u32 = 1;

/// Handles callback `BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB`, and ignores all others.
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
