//! Decisions about connect(2).
//!
//! The capture set alone decides which connections are redirected; routes only turn a captured
//! destination between *serve* and *refuse*. So no captured connection takes the ordinary route,
//! unless the connector is dead or stuck and the attachment fails open.
//!
//! The programs read the fields of a context whole and up front, with `read_volatile`: LLVM would
//! merge reads of different fields behind a branch into one through a computed pointer, which the
//! verifier refuses.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval},
    maps::lpm_trie::Key,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use tunnel_ebpf_common::{Address, Counter, Endpoint, Origin, PREFIX_BITS, Prefix, Verdict, flags};

use crate::{
    listener,
    maps::{CAPTURES, ROUTES, attachment, attachment_id, can_choose_errno, count},
    origin,
};

/// Result of a connect hook: go on.
const ALLOW: i32 = 1;
/// Result of a connect hook: fail, with EPERM unless the program has set an errno.
const REFUSE: i32 = 0;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;

const EACCES: i32 = 13;
const ENETUNREACH: i32 = 101;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;

/// Decision about one connect.
enum Decision {
    /// The connection takes the ordinary route.
    Pass(Option<Counter>),
    /// The connection goes to the listener.
    Redirect {
        attachment: u32,
        listener: Endpoint,
        refused: u32,
    },
    /// The connect fails at once.
    Refuse(Counter),
}

/// Handles hook `connect4`.
#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    // SAFETY: `sock` is the hook's context; these fields are readable in connect4.
    let (ip, port) = unsafe {
        (
            ptr::read_volatile(&raw const (*sock).user_ip4),
            read_port(sock),
        )
    };
    let destination = Endpoint {
        address: Address::mapped(ip),
        port,
    };
    match connect(ctx, destination) {
        Ok(None) => ALLOW,
        Ok(Some(listener)) => {
            // SAFETY: these fields are writable in connect4.
            unsafe {
                ptr::write_volatile(&raw mut (*sock).user_ip4, listener.address.0[3]);
                write_port(sock, listener.port);
            }
            ALLOW
        }
        Err(Refused) => REFUSE,
    }
}

/// Handles hook `connect6`. A v4-mapped destination is an IPv4 one, and goes to the v4-mapped
/// address of the IPv4 listener.
#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    // SAFETY: `sock` is the hook's context; these fields are readable in connect6.
    let (address, port) = unsafe {
        let ip = &raw const (*sock).user_ip6;
        let word = |index: usize| ptr::read_volatile(ip.cast::<u32>().add(index));
        (
            Address([word(0), word(1), word(2), word(3)]),
            read_port(sock),
        )
    };
    match connect(ctx, Endpoint { address, port }) {
        Ok(None) => ALLOW,
        Ok(Some(listener)) => {
            // SAFETY: these fields are writable in connect6.
            unsafe {
                let ip = (&raw mut (*sock).user_ip6).cast::<u32>();
                ptr::write_volatile(ip, listener.address.0[0]);
                ptr::write_volatile(ip.add(1), listener.address.0[1]);
                ptr::write_volatile(ip.add(2), listener.address.0[2]);
                ptr::write_volatile(ip.add(3), listener.address.0[3]);
                write_port(sock, listener.port);
            }
            ALLOW
        }
        Err(Refused) => REFUSE,
    }
}

/// The attempt fails, its errno is set where it can be.
struct Refused;

/// Carries a decision out, but for the rewriting: that differs by family.
#[inline(always)]
fn connect(ctx: &SockAddrContext, destination: Endpoint) -> Result<Option<Endpoint>, Refused> {
    match decide(ctx, destination) {
        Decision::Pass(reason) => {
            if let Some(reason) = reason {
                count(reason);
            }
            origin::remove(ctx);
            Ok(None)
        }
        Decision::Redirect {
            attachment,
            listener,
            refused,
        } => {
            let origin = Origin {
                destination,
                attachment,
                refused,
            };
            if !origin::store(ctx, origin) {
                return Err(refuse(ctx, destination, Counter::NoMemory));
            }
            if refused == 0 {
                count(Counter::Redirected);
            }
            Ok(Some(listener))
        }
        Decision::Refuse(reason) => Err(refuse(ctx, destination, reason)),
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: Endpoint) -> Decision {
    // Connected datagram sockets reach this hook too.
    if !is_tcp(ctx) {
        return Decision::Pass(None);
    }
    let Some((id, attachment)) = attachment() else {
        return Decision::Pass(None);
    };
    // SAFETY: `ctx` is the hook's context.
    if unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) } != attachment.netns {
        return Decision::Pass(None);
    }
    let key = Key::new(PREFIX_BITS, Prefix::of(id, destination.address));
    if !CAPTURES
        .get(key)
        .is_some_and(|ports| ports.contains(destination.port))
    {
        return Decision::Pass(Some(Counter::NotCaptured));
    }
    let configured = if destination.address.is_mapped() {
        &attachment.listener4
    } else {
        &attachment.listener6
    };
    let listener = match listener::find(ctx, id, configured) {
        Ok(listener) => listener,
        Err(_) if attachment.flags & flags::FAIL_OPEN != 0 => {
            return Decision::Pass(Some(Counter::FailOpen));
        }
        Err(fault) => return Decision::Refuse(fault),
    };
    let key = Key::new(
        PREFIX_BITS,
        Prefix::of(attachment.tenant, destination.address),
    );
    let verdict = ROUTES.get(key).copied();
    let refusal = match verdict.and_then(Verdict::from_number) {
        Some(Verdict::Serve) => {
            return Decision::Redirect {
                attachment: id,
                listener,
                refused: 0,
            };
        }
        Some(Verdict::NoAgent) => Counter::NoAgent,
        Some(Verdict::Denied) => Counter::Denied,
        None => Counter::NoRoute,
    };
    if can_choose_errno() {
        return Decision::Refuse(refusal);
    }
    // A reset tells the caller more than the EPERM it would get: the accepting side does that.
    count(refusal);
    Decision::Redirect {
        attachment: id,
        listener,
        refused: refusal as u32,
    }
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, destination: Endpoint, reason: Counter) -> Refused {
    count(reason);
    let errno = match reason {
        Counter::NoRoute => ENETUNREACH,
        Counter::NoAgent => EHOSTUNREACH,
        Counter::Denied => EACCES,
        _ => ECONNREFUSED,
    };
    if can_choose_errno() {
        // SAFETY: has no preconditions in a connect hook.
        unsafe { bpf_set_retval(-errno) };
    }
    debug!(
        ctx,
        "attachment {}: refused {:i} port {} with errno {}",
        attachment_id(),
        destination.address.octets(),
        destination.port,
        errno
    );
    Refused
}

#[inline(always)]
fn is_tcp(ctx: &SockAddrContext) -> bool {
    let sock = ctx.sock_addr;
    // SAFETY: `sock` is the hook's context; both fields are readable in every sock_addr hook.
    let (kind, protocol) = unsafe {
        (
            ptr::read_volatile(&raw const (*sock).type_),
            ptr::read_volatile(&raw const (*sock).protocol),
        )
    };
    kind == SOCK_STREAM && protocol == IPPROTO_TCP
}

/// # Safety
///
/// `sock` is the hook's context.
#[inline(always)]
unsafe fn read_port(sock: *const bpf_sock_addr) -> u32 {
    // SAFETY: the caller's promise. Network order, in the lower half.
    let port = unsafe { ptr::read_volatile(&raw const (*sock).user_port) };
    u32::from(u16::from_be(port as u16))
}

/// # Safety
///
/// `sock` is the context of a hook that may write it.
#[inline(always)]
pub(crate) unsafe fn write_port(sock: *mut bpf_sock_addr, port: u32) {
    // SAFETY: the caller's promise.
    unsafe { ptr::write_volatile(&raw mut (*sock).user_port, u32::from((port as u16).to_be())) };
}
