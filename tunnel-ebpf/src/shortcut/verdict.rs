//! Which way the bytes of one write take.
//!
//! The reader takes what came by the shortcut before what came by TCP, so bytes that follow by TCP
//! stay behind, but bytes that follow on the shortcut would overtake. Hence the one rule: **a
//! client is put on the shortcut only while nothing of it is on the way**, which is to say that
//! the connector has read as many bytes as the client has written. This also covers what was
//! written before the connection was accepted.
//!
//! Nothing in the kernel bounds what waits at the shortcut's end. So no more than
//! [`SHORTCUT_BYTES`] are let on the way there; what is above takes TCP's way, and TCP's windows
//! stop the writer.

use core::ptr;

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::bpf_msg_redirect_hash,
    programs::SkMsgContext,
};
use tunnel_ebpf_common::{FlowKey, SHORTCUT_BYTES};

use crate::maps::{SHORTCUT_READ, SHORTCUT_READERS, SHORTCUT_TAKEN, writer};

/// Program of the map of clients. Runs with the client's socket locked.
#[inline(always)]
pub(crate) fn verdict(ctx: &SkMsgContext) -> u32 {
    // SAFETY: `ctx` is the program's context, whose socket is never null.
    let sk = unsafe { (*ctx.msg).__bindgen_anon_3.sk };
    // SAFETY: as above; the socket's lock makes us the only one.
    let Some(writer) = (unsafe { writer(sk) }) else {
        return SK_PASS;
    };
    let size = u64::from(ctx.size());
    let before = writer.written;
    // More than was sent, where a full buffer takes a part only. Then the reader never seems to
    // have caught up, and the connection stays TCP's: slower, but right.
    writer.written = before + size;
    let short = take(ctx, writer.on_shortcut != 0, before, size, &mut writer.key);
    writer.on_shortcut = short.into();
    SK_PASS
}

/// Sends the write over the shortcut, if that is right.
#[inline(always)]
fn take(ctx: &SkMsgContext, on_shortcut: bool, before: u64, size: u64, key: &mut FlowKey) -> bool {
    // SAFETY: the reader writes whole numbers, and what is read is the old one or the new one.
    let Some(read) = (unsafe { SHORTCUT_READ.get(*key) }) else {
        return false;
    };
    let waiting = before.wrapping_sub(*read);
    if waiting != 0 && !on_shortcut || waiting.wrapping_add(size) > SHORTCUT_BYTES {
        return false;
    }
    let Some(taken) = SHORTCUT_TAKEN.get_ptr_mut(*key) else {
        return false;
    };
    let readers = (&raw const SHORTCUT_READERS).cast_mut().cast();
    // SAFETY: the map has keys of this type.
    let found = unsafe {
        bpf_msg_redirect_hash(
            ctx.msg,
            readers,
            ptr::from_mut(key).cast(),
            BPF_F_INGRESS.into(),
        )
    };
    if found as u32 == SK_DROP {
        return false;
    }
    // SAFETY: aligned, and this connection has one writer, whose lock is held.
    unsafe { *taken += size };
    true
}
