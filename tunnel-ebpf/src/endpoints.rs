//! Both ends of the connection of a `sock_ops` callback.

use core::ptr;

use aya_ebpf::bindings::bpf_sock_ops;
use tunnel_ebpf_common::{Address, Endpoint};

const AF_INET: u32 = 2;

/// Returns the local and the remote end. A v4-mapped socket connects over IPv4: the key is the same
/// either way.
#[inline(always)]
pub(crate) fn endpoints(ops: *const bpf_sock_ops) -> (Endpoint, Endpoint) {
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
