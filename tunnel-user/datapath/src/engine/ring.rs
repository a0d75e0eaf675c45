//! A ring: what is asked of the kernel, and who is told the answer.
//!
//! Each operation in flight has a slot that holds its [`Sink`] until the kernel's last word about it,
//! however early whoever asked has gone. A number that is used again has another generation, so that
//! a late completion reaches nobody else.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use bytes::BytesMut;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::CancelBuilder;
use io_uring::{IoUring, cqueue, opcode};

use super::buffers::{Provided, Shape};

use cpc_host::report::report;

/// Requests that wait to be submitted, at most.
const REQUESTS: u32 = 256;

/// Completions that wait to be fetched; the kernel keeps what is more (`IORING_FEAT_NODROP`).
const COMPLETIONS: u32 = 2048;

/// Calls of one turn: what is told may ask for more.
const CALLS: usize = 16;

/// What TCP is received into. As much as the kernel may receive before anybody is asked.
const TCP: Shape = Shape {
    group: 0,
    entries: 4,
    size: 64 << 10,
    most: 128,
    incremental: true,
};

/// What UDP is received into: a full GRO batch each, and what recvmsg(2) says of it before.
const UDP: Shape = Shape {
    group: 1,
    entries: 8,
    size: (64 << 10) + 512,
    most: 136,
    incremental: false,
};

/// `IORING_ENTER_GETEVENTS` of linux/io_uring.h: also fetch completions that found no room.
const GETEVENTS: u32 = 1;

/// Nobody waits for these.
const UNHEEDED: u64 = u64::MAX;

/// Who is told how an operation went: once, or until [`Completion::is_last`].
pub trait Sink {
    /// It went like that.
    fn complete(&self, ring: &Ring, completion: Completion);
}

/// What the kernel says.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    result: i32,
    flags: u32,
}

impl Completion {
    /// Bytes, or an error.
    pub fn result(self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }

    /// Nothing follows.
    pub fn is_last(self) -> bool {
        !cqueue::more(self.flags)
    }
}

/// An operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation(u64);

/// Which buffers.
#[derive(Clone, Copy, Debug)]
pub enum Group {
    /// TCP's.
    Tcp,
    /// UDP's.
    Udp,
}

impl Group {
    /// As the kernel calls it.
    pub fn number(self) -> u16 {
        match self {
            Self::Tcp => TCP.group,
            Self::Udp => UDP.group,
        }
    }
}

/// A ring, made on any thread and enabled on the one that it then belongs to.
pub struct Ring {
    uring: ManuallyDrop<RefCell<IoUring>>,
    slots: RefCell<Slots>,
    /// What was fetched and has yet to be told.
    fetched: Cell<Vec<(u64, Completion)>>,
    tcp: ManuallyDrop<RefCell<Provided>>,
    udp: ManuallyDrop<RefCell<Provided>>,
}

// SAFETY: a `Sink` is not `Send`, but there is none before the ring is enabled, and from then on it
// is behind an `Rc`.
unsafe impl Send for Ring {}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    sink: Option<Rc<dyn Sink>>,
}

impl Slots {
    fn insert(&mut self, sink: Rc<dyn Sink>) -> Operation {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        slot.sink = Some(sink);
        Operation(u64::from(slot.generation) << 32 | u64::from(index))
    }

    /// Whose it is; after its last completion it is nobody's.
    fn sink(&mut self, operation: u64, is_last: bool) -> Option<Rc<dyn Sink>> {
        let index = operation as u32;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != (operation >> 32) as u32 {
            return None;
        }
        if !is_last {
            return slot.sink.clone();
        }
        // The highest generation is never reached: `UNHEEDED` has it.
        slot.generation = (slot.generation + 1) % u32::MAX;
        self.free.push(index);
        slot.sink.take()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Ring {
    /// A ring with its buffers.
    ///
    /// # Errors
    /// The kernel has none for us.
    pub fn new() -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS)
            .build(REQUESTS)?;
        let tcp = Provided::register(&uring, TCP)?;
        let udp = Provided::register(&uring, UDP)?;
        Ok(Self {
            uring: ManuallyDrop::new(uring.into()),
            slots: RefCell::default(),
            fetched: Cell::default(),
            tcp: ManuallyDrop::new(tcp.into()),
            udp: ManuallyDrop::new(udp.into()),
        })
    }

    /// Makes it the running thread's.
    ///
    /// # Errors
    /// It belongs to another one.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.uring.borrow().submitter().register_enable_rings()
    }

    /// Has the kernel do something soon: before the thread sleeps, or at the next
    /// [`submit`](Self::submit).
    ///
    /// # Safety
    /// What `entry` refers to must stay as it is until the kernel is done with it, a file descriptor
    /// until it is submitted.
    pub unsafe fn start(&self, entry: Entry, sink: Rc<dyn Sink>) -> Operation {
        let operation = self.slots.borrow_mut().insert(sink);
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry.user_data(operation.0)) };
        operation
    }

    /// Has the kernel give `operation` up; its last completion follows.
    pub fn cancel(&self, operation: Operation) {
        let entry = opcode::AsyncCancel::new(operation.0).build();
        let entry = entry.user_data(UNHEEDED).flags(Flags::SKIP_SUCCESS);
        // SAFETY: it refers to nothing.
        unsafe { self.push(&entry) };
    }

    /// # Safety
    /// As [`start`](Self::start).
    unsafe fn push(&self, entry: &Entry) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.uring.borrow_mut().submission().push(entry) }.is_ok() {
                return;
            }
            // There is room afterwards: the kernel takes all that is queued, whatever becomes of it
            // (`setup_submit_all`), also while completions wait for room (Linux 5.19).
            self.submit();
        }
    }

    /// Submits now what is queued, and lets the kernel finish what it can. Nobody is told yet.
    pub fn submit(&self) {
        let mut uring = self.uring.borrow_mut();
        let queued = uring.submission().len() as u32;
        // SAFETY: no argument.
        let entered = unsafe { uring.submitter().enter::<()>(queued, 0, GETEVENTS, None) };
        if let Err(error) = entered {
            let is_usual = matches!(
                error.raw_os_error(),
                // A signal, or completions that have to be fetched first.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
            );
            if !is_usual {
                tracing::error!(error = report(&error), "io_uring_enter");
            }
        }
    }

    /// Whether a call is due: something is queued, or the kernel has work to finish.
    fn is_due(&self) -> bool {
        let mut uring = self.uring.borrow_mut();
        let queue = uring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Submits what is queued, fetches completions and tells whom they concern. Costs no call when
    /// there is nothing to do.
    pub fn turn(&self) {
        for _ in 0..CALLS {
            let is_due = self.is_due();
            if is_due {
                self.submit();
            }
            if !self.tell() && !is_due {
                break;
            }
        }
    }

    /// Tells whom the completions concern that are there. `false`: there was none.
    fn tell(&self) -> bool {
        let mut fetched = self.fetched.take();
        for entry in self.uring.borrow_mut().completion() {
            let completion = Completion {
                result: entry.result(),
                flags: entry.flags(),
            };
            fetched.push((entry.user_data(), completion));
        }
        let found = !fetched.is_empty();
        for (operation, completion) in fetched.drain(..) {
            let sink = {
                let mut slots = self.slots.borrow_mut();
                slots.sink(operation, completion.is_last())
            };
            if let Some(sink) = sink {
                sink.complete(self, completion);
            }
        }
        self.fetched.set(fetched);
        found
    }

    /// What a completion received, without its first `skip` bytes. To be called for each that a sink
    /// is told, in order, or the kernel runs out of buffers.
    pub fn take(&self, group: Group, of: Completion, skip: usize) -> Option<BytesMut> {
        let mut provided = self.provided(group).borrow_mut();
        provided.take(of.result, of.flags, skip)
    }

    /// Whether what a completion received stays in its buffer when it is [taken](Self::take).
    pub fn stays(&self, group: Group, of: Completion, skip: usize) -> bool {
        let provided = self.provided(group).borrow();
        provided.stays(of.result, of.flags, skip)
    }

    /// Looks at what a completion received, before it is [taken](Self::take).
    pub fn peek<T>(
        &self,
        group: Group,
        of: Completion,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Option<T> {
        let provided = self.provided(group).borrow();
        provided.peek(of.result, of.flags).map(look)
    }

    fn provided(&self, group: Group) -> &RefCell<Provided> {
        match group {
            Group::Tcp => &self.tcp,
            Group::Udp => &self.udp,
        }
    }

    /// Cancels all that is in flight, and waits for it.
    fn drain(&self) -> io::Result<()> {
        let all = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        let all = all.user_data(UNHEEDED).flags(Flags::SKIP_SUCCESS);
        // SAFETY: it refers to nothing.
        unsafe { self.push(&all) };
        self.turn();
        while self.slots.borrow().in_flight() > 0 {
            self.uring.borrow().submit_and_wait(1)?;
            self.tell();
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let drained = self.slots.borrow().in_flight() == 0 || self.drain().is_ok();
        // SAFETY: nothing uses it any more. It is closed before its buffers go.
        unsafe { ManuallyDrop::drop(&mut self.uring) };
        if drained {
            // SAFETY: nothing is in flight, so the kernel writes nowhere any more.
            unsafe {
                ManuallyDrop::drop(&mut self.tcp);
                ManuallyDrop::drop(&mut self.udp);
            }
        }
    }
}

/// Readable when there are completions.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.borrow().as_raw_fd()
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.slots.borrow().in_flight())
            .finish_non_exhaustive()
    }
}
