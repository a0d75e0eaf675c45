//! The C library's calls, of which this crate defines its own: those of a thread with a [`Kernel`] go
//! there, those of all others to the real kernel.
//!
//! The linker prefers a symbol of the program to one of a shared library, so that std, tokio, mio, socket2,
//! quinn-udp and nix arrive here without knowing. A program that is linked with this crate calls the
//! system directly where it has no simulation, and loses the vDSO's faster clock.

pub mod bytes;
pub mod clock;
pub mod descriptors;
pub mod sockets;
pub mod wait;

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_long};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::ptr;
use std::task::Waker;

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
unsafe fn real_call(number: c_long, arguments: [usize; 6]) -> isize {
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
        unsafe { $crate::interpose::real_call(libc::$number, arguments) }
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

use real;
