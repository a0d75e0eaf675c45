//! Notes a redirected client, before it can have written anything.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB},
    helpers::bpf_sock_hash_update,
    programs::SockOpsContext,
};
use tunnel_ebpf_common::{FlowKey, Writer, flags};

use crate::{
    endpoints::endpoints,
    maps::{SHORTCUT_READ, SHORTCUT_WRITERS, attachment, note, origin},
};

/// What every callback here answers.
const DONE: u32 = 1;

/// Callback `BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB`; all others are left alone.
///
/// It runs when the SYN-ACK has arrived: connect(2) has not returned yet, and what is counted
/// from now on is everything.
#[inline(always)]
pub(crate) fn begin(ctx: &SockOpsContext) -> u32 {
    if ctx.op() != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        return DONE;
    }
    // SAFETY: `ctx` is the hook's context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return DONE;
    }
    let Some((id, attachment)) = attachment() else {
        return DONE;
    };
    // The kernel takes a while to let go of a link whose pin was removed.
    if attachment.flags & flags::SHORTCUT == 0 {
        return DONE;
    }
    // SAFETY: checked above.
    let Some(origin) = (unsafe { origin(sk) }) else {
        return DONE;
    };
    if origin.attachment != id {
        return DONE;
    }
    let (client, listener) = endpoints(ctx.ops);
    let mut key = FlowKey {
        netns: attachment.netns,
        client,
        listener,
    };
    // What an earlier connection with these ports has left is not this one's.
    let _ = SHORTCUT_READ.remove(key);
    let writer = Writer {
        key,
        written: 0,
        on_shortcut: 0,
    };
    // SAFETY: checked above.
    if unsafe { note(sk, writer) } {
        // Should it fail, the connection stays TCP's.
        // SAFETY: the map takes sockets under keys of this type, and copies the key.
        let _ = unsafe {
            bpf_sock_hash_update(
                ctx.ops,
                (&raw const SHORTCUT_WRITERS).cast_mut().cast(),
                (&raw mut key).cast(),
                BPF_ANY.into(),
            )
        };
    }
    DONE
}
