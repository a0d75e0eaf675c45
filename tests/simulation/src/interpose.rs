//! The C library's calls, of which this crate defines its own: those of a thread with a [`Kernel`] go
//! there, those of all others to the real kernel.
//!
//! The linker prefers a symbol of the program to one of a shared library, so that std, tokio, mio, socket2,
//! quinn-udp and nix arrive here without knowing. A program that is linked with this crate calls the
//! system directly where it has no simulation, and loses the vDSO's faster clock.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::mem::offset_of;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ptr;
use std::slice;
use std::task::Waker;

use crate::kernel::filter::Instruction;
use crate::kernel::{FIRST, Kernel, Outcome};
use crate::random::Random;

/// Simulated state of a thread. No value in here has a destructor, so that the calls work until the
/// thread has ended.
struct Simulated {
    kernel: Cell<*const RefCell<Kernel>>,
    /// Monotonic time in nanoseconds; a copy, for calls while the kernel is borrowed.
    now: Cell<u64>,
    /// Difference of the wall clock of the current host to the monotonic clock.
    wall: Cell<i64>,
    random: Cell<Random>,
    /// The current process has nothing left to do, until then at the latest.
    idle_until: Cell<Option<u64>>,
    is_stepping: Cell<bool>,
}

thread_local! {
    static SIMULATED: Simulated = const {
        Simulated {
            kernel: Cell::new(ptr::null()),
            now: Cell::new(0),
            wall: Cell::new(0),
            random: Cell::new(Random::new(0)),
            idle_until: Cell::new(None),
            is_stepping: Cell::new(false),
        }
    };
    static ROOT: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// The kernel of this thread, until dropped.
#[derive(Debug)]
pub struct Installed {
    _kernel: Box<RefCell<Kernel>>,
}

impl Installed {
    /// Makes `kernel` that of the current thread. Random numbers come from `seed`.
    pub fn new(kernel: Kernel, seed: u64) -> Self {
        let now = kernel.now();
        let kernel = Box::new(RefCell::new(kernel));
        SIMULATED.with(|it| {
            it.kernel.set(&raw const *kernel);
            it.now.set(now);
            it.random.set(Random::new(seed));
        });
        Self { _kernel: kernel }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        SIMULATED.with(|it| it.kernel.set(ptr::null()));
    }
}

/// Calls `call` with the kernel of this thread.
pub fn kernel<T>(call: impl FnOnce(&mut Kernel) -> T) -> T {
    SIMULATED.with(|it| {
        // SAFETY: `Installed` owns the kernel, and takes the pointer back before it ends.
        let kernel = unsafe { it.kernel.get().as_ref() };
        #[expect(
            clippy::expect_used,
            reason = "called by the simulation alone, which has one"
        )]
        let kernel = kernel.expect("this thread has a kernel");
        let mut kernel = kernel.borrow_mut();
        let done = call(&mut kernel);
        it.now.set(kernel.now());
        done
    })
}

/// Sets the difference of the wall clock to the monotonic one, in nanoseconds.
pub fn set_wall(offset: i64) {
    SIMULATED.with(|it| it.wall.set(offset));
}

/// Begins a step of a process.
pub(crate) fn begin_step() {
    SIMULATED.with(|it| {
        it.idle_until.set(None);
        it.is_stepping.set(true);
    });
}

/// Ends a step. Returns the time of the process' next timer.
pub(crate) fn end_step() -> Option<u64> {
    ROOT.take();
    SIMULATED.with(|it| {
        it.is_stepping.set(false);
        it.idle_until.take()
    })
}

/// Whether the process of this step has nothing left to do; else `waker` is woken then.
pub(crate) fn is_idle(waker: &Waker) -> bool {
    let is_idle = SIMULATED.with(|it| it.idle_until.get().is_some());
    if !is_idle {
        ROOT.replace(Some(waker.clone()));
    }
    is_idle
}

fn is_simulated() -> bool {
    SIMULATED.with(|it| !it.kernel.get().is_null())
}

/// Whether a call on `fd` is for the simulation.
fn is_ours(fd: c_int) -> bool {
    fd >= FIRST && is_simulated()
}

fn set_errno(error: c_int) {
    // SAFETY: the C library returns the address of this thread's errno.
    unsafe { *libc::__errno_location() = error };
}

/// Returns a result as the C library does.
fn answer<T: TryInto<isize>>(outcome: Outcome<T>) -> isize {
    match outcome {
        Ok(value) => value.try_into().unwrap_or(isize::MAX),
        Err(error) => {
            set_errno(error);
            -1
        }
    }
}

fn answer_int<T: TryInto<isize>>(outcome: Outcome<T>) -> c_int {
    answer(outcome) as c_int
}

/// Makes a system call. Returns its value, or a negated errno.
///
/// # Safety
/// As the call requires.
#[cfg(target_arch = "x86_64")]
unsafe fn raw(number: c_long, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the registers are those of the system call interface; the caller vouches for the rest.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a system call. Returns its value, or a negated errno.
///
/// # Safety
/// As the call requires.
#[cfg(target_arch = "aarch64")]
unsafe fn raw(number: c_long, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the registers are those of the system call interface; the caller vouches for the rest.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") number, inlateout("x0") a[0] as isize => result,
            in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
            options(nostack),
        );
    }
    result
}

/// Makes a system call, and returns its result as the C library does.
///
/// # Safety
/// As the call requires.
unsafe fn real(number: c_long, arguments: [usize; 6]) -> isize {
    // SAFETY: the caller's.
    let result = unsafe { raw(number, arguments) };
    if (-4095..0).contains(&result) {
        set_errno(-result as c_int);
        return -1;
    }
    result
}

/// Passes a call on to the real kernel.
macro_rules! real {
    ($number:ident $(, $argument:expr)*) => {{
        let mut arguments = [0usize; 6];
        let mut at = 0;
        $(
            arguments[at] = $argument as usize;
            at += 1;
        )*
        let _ = at;
        // SAFETY: the caller of the C function vouches for the arguments, which are passed on.
        unsafe { real(libc::$number, arguments) }
    }};
}

/// Reads a `struct sockaddr_in`; other families are not there.
///
/// # Safety
/// `address` has `length` bytes.
unsafe fn address(
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> Outcome<SocketAddrV4> {
    if address.is_null() || (length as usize) < size_of::<libc::sockaddr_in>() {
        return Err(libc::EINVAL);
    }
    // SAFETY: the caller's.
    let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
    if c_int::from(v4.sin_family) != libc::AF_INET {
        return Err(libc::EAFNOSUPPORT);
    }
    let ip = Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr));
    Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)))
}

fn to_c(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: address.ip().to_bits().to_be(),
        },
        sin_zero: [0; 8],
    }
}

/// Writes an address as accept(2) and getsockname(2) do.
///
/// # Safety
/// `length` holds the size of `place`, if they are not null.
unsafe fn put_address(
    address: SocketAddrV4,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) {
    if place.is_null() || length.is_null() {
        return;
    }
    let v4 = to_c(address);
    // SAFETY: the caller's; no more than the place has is written.
    unsafe {
        let size = (*length as usize).min(size_of_val(&v4));
        ptr::copy_nonoverlapping((&raw const v4).cast::<u8>(), place.cast(), size);
        *length = size_of_val(&v4) as libc::socklen_t;
    }
}

// The clock and random numbers.

/// clock_gettime(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if !is_simulated() || time.is_null() {
        return real!(SYS_clock_gettime, clock, time) as c_int;
    }
    let (now, wall) = SIMULATED.with(|it| (it.now.get() as i64, it.wall.get()));
    let shown = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => now + wall,
        _ => now,
    };
    // SAFETY: the caller's.
    unsafe {
        (*time).tv_sec = shown / 1_000_000_000;
        (*time).tv_nsec = shown % 1_000_000_000;
    }
    0
}

fn fill(bytes: &mut [u8]) {
    SIMULATED.with(|it| {
        let mut random = it.random.get();
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&random.next().to_le_bytes()[..part.len()]);
        }
        it.random.set(random);
    });
}

/// getrandom(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(place: *mut c_void, length: usize, flags: c_uint) -> isize {
    if !is_simulated() {
        return real!(SYS_getrandom, place, length, flags);
    }
    if length > 0 {
        // SAFETY: the caller's.
        fill(unsafe { slice::from_raw_parts_mut(place.cast(), length) });
    }
    length as isize
}

/// syscall(2): random numbers that are fetched past getrandom(2).
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    if number == libc::SYS_getrandom && is_simulated() {
        // SAFETY: the caller's.
        return unsafe { getrandom(a as *mut c_void, b, c as c_uint) as c_long };
    }
    // SAFETY: the caller's.
    unsafe { real(number, [a, b, c, d, e, f]) as c_long }
}

// Waiting.

/// epoll_create1(2)
#[unsafe(no_mangle)]
pub extern "C" fn epoll_create1(flags: c_int) -> c_int {
    if !is_simulated() {
        return real!(SYS_epoll_create1, flags) as c_int;
    }
    kernel(Kernel::epoll_create)
}

/// eventfd(2)
#[unsafe(no_mangle)]
pub extern "C" fn eventfd(count: c_uint, flags: c_int) -> c_int {
    if !is_simulated() {
        return real!(SYS_eventfd2, count, flags) as c_int;
    }
    kernel(Kernel::eventfd)
}

/// epoll_ctl(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_ctl(
    epoll: c_int,
    operation: c_int,
    fd: c_int,
    event: *mut libc::epoll_event,
) -> c_int {
    if !is_ours(epoll) {
        return real!(SYS_epoll_ctl, epoll, operation, fd, event) as c_int;
    }
    let interest = match event.is_null() {
        true => (0, 0),
        // SAFETY: the caller's.
        false => unsafe { ((*event).events, (*event).u64) },
    };
    answer_int(kernel(|kernel| {
        kernel.epoll_ctl(epoll, operation, fd, interest)
    }))
}

/// epoll_wait(2). A process without work returns to the simulation, which moves the clock.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    epoll: c_int,
    events: *mut libc::epoll_event,
    most: c_int,
    timeout: c_int,
) -> c_int {
    if !is_ours(epoll) {
        return real!(SYS_epoll_pwait, epoll, events, most, timeout, 0, 8) as c_int;
    }
    let take = || kernel(|kernel| kernel.epoll_take(epoll, most as usize));
    let mut found = match take() {
        Ok(found) => found,
        Err(error) => return answer_int::<usize>(Err(error)),
    };
    if found.is_empty() && timeout != 0 {
        let until = u64::try_from(timeout).map_or(u64::MAX, |ms| {
            SIMULATED.with(|it| it.now.get()) + ms * 1_000_000
        });
        SIMULATED.with(|it| it.idle_until.set(Some(until)));
        if let Some(root) = ROOT.take() {
            root.wake();
        }
        // The waking itself is an event.
        found = take().unwrap_or_default();
    }
    for (at, (flags, data)) in found.iter().enumerate() {
        // SAFETY: the caller gives room for `most` events, and there are no more.
        unsafe {
            events.add(at).write_unaligned(libc::epoll_event {
                events: *flags,
                u64: *data,
            });
        }
    }
    found.len() as c_int
}

/// poll(2), which here never waits.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poll(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    timeout: c_int,
) -> c_int {
    let polled = match count {
        0 => &mut [],
        // SAFETY: the caller's.
        count => unsafe { slice::from_raw_parts_mut(fds, count as usize) },
    };
    if !polled.iter().any(|it| is_ours(it.fd)) {
        let wait = libc::timespec {
            tv_sec: libc::time_t::from(timeout / 1000),
            tv_nsec: c_long::from(timeout % 1000) * 1_000_000,
        };
        let wait = if timeout < 0 {
            ptr::null()
        } else {
            &raw const wait
        };
        return real!(SYS_ppoll, fds, count, wait, 0, 8) as c_int;
    }
    let mut ready = 0;
    for it in polled {
        let flags = kernel(|kernel| kernel.readiness(it.fd)) as i16;
        it.revents = flags & (it.events | libc::POLLERR | libc::POLLHUP);
        ready += c_int::from(it.revents != 0);
    }
    ready
}

/// madvise(2). A fork has the random state of its parent here, which costs milliseconds to make: seeds are
/// no secrets, and keys protect nothing.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    match advice {
        libc::MADV_WIPEONFORK => 0,
        _ => real!(SYS_madvise, address, length, advice) as c_int,
    }
}

// Descriptors.

/// close(2)
#[unsafe(no_mangle)]
pub extern "C" fn close(fd: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_close, fd) as c_int;
    }
    answer_int(kernel(|kernel| kernel.close(fd)))
}

/// fcntl(2). Every command that is used has at most one argument of the size of a register.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_fcntl, fd, command, argument) as c_int;
    }
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => answer_int(kernel(|kernel| kernel.dup(fd))),
        libc::F_GETFL => libc::O_RDWR | libc::O_NONBLOCK,
        libc::F_GETFD => libc::FD_CLOEXEC,
        libc::F_SETFL | libc::F_SETFD => 0,
        _ => unknown(format!("fcntl {command}")),
    }
}

/// ioctl(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: libc::c_ulong, argument: usize) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_ioctl, fd, request, argument) as c_int;
    }
    match request {
        libc::FIONBIO => 0,
        libc::TIOCOUTQ => {
            let unsent = kernel(|kernel| kernel.unsent(fd));
            // SAFETY: the caller gives the address of an int.
            unsafe { *(argument as *mut c_int) = unsent as c_int };
            0
        }
        _ => unknown(format!("ioctl {request}")),
    }
}

/// Notes a call that the kernel does not know, which a test finds.
fn unknown(call: String) -> c_int {
    kernel(|kernel| kernel.unknown.push(call));
    answer_int::<usize>(Err(libc::ENOSYS))
}

// Sockets.

/// socket(2)
#[unsafe(no_mangle)]
pub extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if !is_simulated() || domain == libc::AF_UNIX || domain == libc::AF_NETLINK {
        return real!(SYS_socket, domain, kind, protocol) as c_int;
    }
    if domain != libc::AF_INET {
        return answer_int::<usize>(Err(libc::EAFNOSUPPORT));
    }
    match kind & !(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) {
        libc::SOCK_STREAM => kernel(Kernel::tcp_socket),
        libc::SOCK_DGRAM => kernel(Kernel::udp_socket),
        _ => answer_int::<usize>(Err(libc::EPROTONOSUPPORT)),
    }
}

/// bind(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bind(
    fd: c_int,
    at: *const libc::sockaddr,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_bind, fd, at, length) as c_int;
    }
    // SAFETY: the caller's.
    let at = unsafe { address(at, length) };
    answer_int(at.and_then(|at| kernel(|kernel| kernel.bind(fd, at))))
}

/// listen(2)
#[unsafe(no_mangle)]
pub extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_listen, fd, backlog) as c_int;
    }
    answer_int(kernel(|kernel| kernel.listen(fd)))
}

/// connect(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn connect(
    fd: c_int,
    to: *const libc::sockaddr,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_connect, fd, to, length) as c_int;
    }
    // SAFETY: the caller's.
    let to = unsafe { address(to, length) };
    answer_int(to.and_then(|to| kernel(|kernel| kernel.connect(fd, to))))
}

/// accept4(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept4(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    flags: c_int,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_accept4, fd, place, length, flags) as c_int;
    }
    answer_int(
        kernel(|kernel| kernel.accept(fd)).map(|(accepted, remote)| {
            // SAFETY: the caller's.
            unsafe { put_address(remote, place, length) };
            accepted as isize
        }),
    )
}

/// getsockname(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockname(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getsockname, fd, place, length) as c_int;
    }
    answer_int(kernel(|kernel| kernel.local(fd)).map(|local| {
        // SAFETY: the caller's.
        unsafe { put_address(local, place, length) };
        0
    }))
}

/// getpeername(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getpeername(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getpeername, fd, place, length) as c_int;
    }
    answer_int(kernel(|kernel| kernel.remote(fd)).map(|remote| {
        // SAFETY: the caller's.
        unsafe { put_address(remote, place, length) };
        0
    }))
}

/// setsockopt(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_setsockopt, fd, level, name, value, length) as c_int;
    }
    let done = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_LINGER) => {
            // SAFETY: the caller gives a struct linger.
            let linger = unsafe { value.cast::<libc::linger>().read_unaligned() };
            let reset = linger.l_onoff != 0 && linger.l_linger == 0;
            kernel(|kernel| kernel.set_reset_on_close(fd, reset))
        }
        (libc::SOL_SOCKET, libc::SO_REUSEPORT) => kernel(|kernel| kernel.share_port(fd)),
        (libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF) => {
            // SAFETY: the caller gives a struct sock_fprog with its instructions.
            let program = unsafe {
                let program = value.cast::<libc::sock_fprog>().read_unaligned();
                slice::from_raw_parts(program.filter, program.len.into())
            };
            let program = program.iter().map(|it| Instruction {
                code: it.code,
                jt: it.jt,
                jf: it.jf,
                k: it.k,
            });
            kernel(|kernel| kernel.steer(fd, program.collect()))
        }
        _ => Ok(0),
    };
    answer_int(done)
}

/// Size of a socket's buffers as the kernel reports it: twice of what `quic::udp` wants.
const BUFFER: c_int = 16 << 20;

/// getsockopt(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    place: *mut c_void,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getsockopt, fd, level, name, place, length) as c_int;
    }
    let value = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_ERROR) => match kernel(|kernel| kernel.take_error(fd)) {
            Ok(error) => error,
            Err(error) => return answer_int::<usize>(Err(error)),
        },
        (libc::SOL_SOCKET, libc::SO_RCVBUF | libc::SO_SNDBUF) => BUFFER,
        (libc::SOL_SOCKET, libc::SO_TYPE) => match kernel(|kernel| kernel.is_udp(fd)) {
            true => libc::SOCK_DGRAM,
            false => libc::SOCK_STREAM,
        },
        _ => 0,
    };
    // SAFETY: the caller gives room for `length` bytes.
    unsafe {
        let size = (*length as usize).min(size_of::<c_int>());
        ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), place.cast(), size);
        *length = size as libc::socklen_t;
    }
    0
}

/// shutdown(2)
#[unsafe(no_mangle)]
pub extern "C" fn shutdown(fd: c_int, how: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_shutdown, fd, how) as c_int;
    }
    answer_int(kernel(|kernel| kernel.shutdown(fd, how)))
}

// Bytes.

/// Reads from a simulated descriptor.
///
/// # Safety
/// `place` has `length` bytes.
unsafe fn read_ours(fd: c_int, place: *mut u8, length: usize) -> isize {
    let bytes = kernel(|kernel| match kernel.is_event(fd) {
        true => kernel
            .event_take(fd)
            .map(|count| count.to_ne_bytes().to_vec()),
        false => kernel.recv(fd, length),
    });
    answer(bytes.map(|bytes| {
        // SAFETY: the caller's; there are no more than `length`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len().min(length)) };
        bytes.len()
    }))
}

/// Writes to a simulated descriptor.
fn write_ours(fd: c_int, bytes: &[u8]) -> isize {
    answer(kernel(|kernel| match kernel.is_event(fd) {
        true => {
            let count = bytes.first_chunk().copied().map(u64::from_ne_bytes);
            kernel.event_add(fd, count.unwrap_or(0))
        }
        false => kernel.send(fd, bytes),
    }))
}

/// Returns the bytes of a caller.
///
/// # Safety
/// `from` has `length` bytes.
unsafe fn bytes<'a>(from: *const c_void, length: usize) -> &'a [u8] {
    match length {
        0 => &[],
        // SAFETY: the caller's.
        length => unsafe { slice::from_raw_parts(from.cast(), length) },
    }
}

/// read(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, place: *mut c_void, length: usize) -> isize {
    if !is_ours(fd) {
        return real!(SYS_read, fd, place, length);
    }
    // SAFETY: the caller's.
    unsafe { read_ours(fd, place.cast(), length) }
}

/// write(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, from: *const c_void, length: usize) -> isize {
    if !is_ours(fd) {
        return real!(SYS_write, fd, from, length);
    }
    // SAFETY: the caller's.
    write_ours(fd, unsafe { bytes(from, length) })
}

/// recv(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(fd: c_int, place: *mut c_void, length: usize, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_recvfrom, fd, place, length, flags, 0, 0);
    }
    // SAFETY: the caller's.
    unsafe { read_ours(fd, place.cast(), length) }
}

/// send(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn send(
    fd: c_int,
    from: *const c_void,
    length: usize,
    flags: c_int,
) -> isize {
    if !is_ours(fd) {
        return real!(SYS_sendto, fd, from, length, flags, 0, 0);
    }
    // SAFETY: the caller's.
    write_ours(fd, unsafe { bytes(from, length) })
}

/// writev(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_writev, fd, parts, count);
    }
    // SAFETY: the caller's.
    write_ours(fd, &unsafe { gather(parts, count as usize) })
}

/// readv(2): into the first part alone, as a short read may.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readv(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_readv, fd, parts, count);
    }
    // SAFETY: the caller's; no part is read where there is none.
    unsafe {
        match parts.as_ref().filter(|_| count > 0) {
            Some(part) => read_ours(fd, part.iov_base.cast(), part.iov_len),
            None => 0,
        }
    }
}

/// Returns the bytes of all parts.
///
/// # Safety
/// `parts` are `count` valid parts.
unsafe fn gather(parts: *const libc::iovec, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for at in 0..count {
        // SAFETY: the caller's.
        unsafe {
            let part = &*parts.add(at);
            all.extend_from_slice(bytes(part.iov_base, part.iov_len));
        }
    }
    all
}

/// sendmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmsg(fd: c_int, message: *const libc::msghdr, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_sendmsg, fd, message, flags);
    }
    // SAFETY: the caller's.
    unsafe {
        let message = &*message;
        let all = gather(message.msg_iov, message.msg_iovlen);
        if !kernel(|kernel| kernel.is_udp(fd)) {
            return write_ours(fd, &all);
        }
        let to = match address(message.msg_name.cast(), message.msg_namelen) {
            Ok(to) => to,
            Err(error) => return answer::<usize>(Err(error)),
        };
        let (mut segment, mut ecn) = (all.len(), 0);
        let mut control = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = control.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (header.cmsg_level, header.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_SEGMENT) => {
                    segment = data.cast::<u16>().read_unaligned().into();
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => ecn = data.read() & 0b11,
                _ => {}
            }
            control = libc::CMSG_NXTHDR(message, control);
        }
        answer(kernel(|kernel| {
            kernel.send_datagrams(fd, to, &all, segment, ecn)
        }))
    }
}

/// recvmmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmmsg(
    fd: c_int,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: *mut libc::timespec,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_recvmmsg, fd, messages, count, flags, timeout) as c_int;
    }
    for at in 0..count as usize {
        let packet = match kernel(|kernel| kernel.receive_datagram(fd)) {
            Ok(packet) => packet,
            Err(error) if at == 0 => return answer_int::<usize>(Err(error)),
            Err(_) => return at as c_int,
        };
        // SAFETY: the caller gives `count` messages.
        unsafe {
            let message = &mut *messages.add(at);
            message.msg_len = put_datagram(&mut message.msg_hdr, packet);
        }
    }
    count as c_int
}

/// recvmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmsg(fd: c_int, message: *mut libc::msghdr, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_recvmsg, fd, message, flags);
    }
    answer(kernel(|kernel| kernel.receive_datagram(fd)).map(|packet| {
        // SAFETY: the caller's.
        unsafe { put_datagram(&mut *message, packet) as usize }
    }))
}

/// Writes a datagram, its source, its destination and its ECN mark. Returns its length.
///
/// # Safety
/// `message` describes valid memory.
unsafe fn put_datagram(
    message: &mut libc::msghdr,
    (from, to, ecn, bytes): (SocketAddrV4, Ipv4Addr, u8, Vec<u8>),
) -> c_uint {
    // SAFETY: the caller's; no more is written than each part has room for.
    unsafe {
        let mut length = message.msg_namelen;
        put_address(from, message.msg_name.cast(), &raw mut length);
        message.msg_namelen = length;
        let mut done = 0;
        if let Some(part) = message.msg_iov.as_ref() {
            done = bytes.len().min(part.iov_len);
            ptr::copy_nonoverlapping(bytes.as_ptr(), part.iov_base.cast(), done);
        }
        let mut info: [u8; size_of::<libc::in_pktinfo>()] = [0; _];
        let at = offset_of!(libc::in_pktinfo, ipi_addr);
        info[at..at + 4].copy_from_slice(&to.octets());
        let mut used = 0;
        for (kind, data) in [(libc::IP_TOS, &[ecn][..]), (libc::IP_PKTINFO, &info[..])] {
            let space = libc::CMSG_SPACE(data.len() as c_uint) as usize;
            if message.msg_control.is_null() || used + space > message.msg_controllen {
                break;
            }
            let header = message
                .msg_control
                .cast::<u8>()
                .add(used)
                .cast::<libc::cmsghdr>();
            (*header).cmsg_level = libc::IPPROTO_IP;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = libc::CMSG_LEN(data.len() as c_uint) as _;
            ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(header), data.len());
            used += space;
        }
        message.msg_controllen = used as _;
        message.msg_flags = 0;
        done as c_uint
    }
}

/// gethostname(2), so that no trace depends on the host.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gethostname(place: *mut c_char, length: usize) -> c_int {
    // SAFETY: the caller gives room for `length` bytes.
    unsafe {
        let name = b"simulation\0";
        let length = length.min(name.len());
        ptr::copy_nonoverlapping(name.as_ptr().cast(), place, length);
    }
    0
}
