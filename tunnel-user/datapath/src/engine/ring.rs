//! A ring: requests to the kernel, and the delivery of completions.
//!
//! Each operation in flight has a slot that holds its [`Sink`] until the last completion, even if its
//! owner has gone. A reused slot number has another generation, so that a late completion reaches no
//! other operation.

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

/// Maximum number of requests that wait to be submitted.
const REQUESTS: u32 = 256;

/// Maximum number of completions that wait to be fetched; the kernel keeps further ones
/// (`IORING_FEAT_NODROP`).
const COMPLETIONS: u32 = 2048;

/// Maximum number of calls per turn: a delivered completion may cause further requests.
const CALLS: usize = 16;

/// Buffers for TCP: as many bytes as the kernel may receive before the process reacts.
const TCP: Shape = Shape {
    group: 0,
    entries: 4,
    size: 64 << 10,
    max: 128,
    incremental: true,
};

/// Buffers for UDP: a full GRO batch each, and the header of recvmsg(2).
const UDP: Shape = Shape {
    group: 1,
    entries: 8,
    size: (64 << 10) + 512,
    max: 136,
    incremental: false,
};

/// `IORING_ENTER_GETEVENTS` of linux/io_uring.h: also fetch completions that found no room.
const GETEVENTS: u32 = 1;

/// User data of requests whose completion is ignored.
const UNHEEDED: u64 = u64::MAX;

/// Receiver of the completions of an operation: one, or several until [`Completion::is_last`].
pub trait Sink {
    /// Receives a completion.
    fn complete(&self, ring: &Ring, completion: Completion);
}

/// A completion of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    result: i32,
    flags: u32,
}

impl Completion {
    /// Returns the number of bytes, or the error.
    pub fn result(self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }

    /// Whether no further completion follows.
    pub fn is_last(self) -> bool {
        !cqueue::more(self.flags)
    }
}

/// An operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation(u64);

/// Group of buffers.
#[derive(Clone, Copy, Debug)]
pub enum Group {
    /// Buffers of TCP.
    Tcp,
    /// Buffers of UDP.
    Udp,
}

impl Group {
    /// Returns the number of the group.
    pub fn number(self) -> u16 {
        match self {
            Self::Tcp => TCP.group,
            Self::Udp => UDP.group,
        }
    }
}

/// A ring, created on any thread and enabled on its own.
pub struct Ring {
    uring: ManuallyDrop<RefCell<IoUring>>,
    slots: RefCell<Slots>,
    /// Fetched completions that are not delivered yet.
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

    /// Returns the receiver of an operation, and frees the slot at its last completion.
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
    /// Creates a ring with its buffers.
    ///
    /// # Errors
    /// The kernel refuses the ring.
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

    /// Assigns the ring to the current thread.
    ///
    /// # Errors
    /// The ring belongs to another thread.
    pub(super) fn enable(&self) -> io::Result<()> {
        self.uring.borrow().submitter().register_enable_rings()
    }

    /// Queues an operation, to be submitted before the thread sleeps or at the next
    /// [`submit`](Self::submit).
    ///
    /// # Safety
    /// Memory that `entry` refers to must stay as it is until the kernel is done with it, a file
    /// descriptor until it is submitted.
    pub unsafe fn start(&self, entry: Entry, sink: Rc<dyn Sink>) -> Operation {
        let operation = self.slots.borrow_mut().insert(sink);
        // SAFETY: the caller's promise.
        unsafe { self.push(&entry.user_data(operation.0)) };
        operation
    }

    /// Cancels `operation`; its last completion follows.
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
            // The queue is empty afterwards: the kernel takes every entry, also one that fails
            // (`setup_submit_all`), and also while completions wait for room (Linux 5.19).
            self.submit();
        }
    }

    /// Submits the queue now, and lets the kernel finish its work. Delivers no completion yet.
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

    /// Whether a call is due: the queue is not empty, or the kernel has work to finish.
    fn is_due(&self) -> bool {
        let mut uring = self.uring.borrow_mut();
        let queue = uring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Submits the queue, then fetches and delivers completions. Makes no call when there is nothing to
    /// do.
    pub fn turn(&self) {
        for _ in 0..CALLS {
            let is_due = self.is_due();
            if is_due {
                self.submit();
            }
            if !self.deliver() && !is_due {
                break;
            }
        }
    }

    /// Delivers the available completions. Returns `false` if there was none.
    fn deliver(&self) -> bool {
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

    /// Takes the received bytes of a completion, without the first `skip` ones. Must be called for each
    /// completion that a sink receives, in order, or the kernel runs out of buffers.
    pub fn take(&self, group: Group, of: Completion, skip: usize) -> Option<BytesMut> {
        let mut provided = self.provided(group).borrow_mut();
        provided.take(of.result, of.flags, skip)
    }

    /// Whether the received bytes of a completion stay in their buffer when they are
    /// [taken](Self::take).
    pub fn stays(&self, group: Group, of: Completion, skip: usize) -> bool {
        let provided = self.provided(group).borrow();
        provided.stays(of.result, of.flags, skip)
    }

    /// Reads the received bytes of a completion, before they are [taken](Self::take).
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

    /// Cancels all operations in flight, and waits for their end.
    fn drain(&self) -> io::Result<()> {
        let all = opcode::AsyncCancel2::new(CancelBuilder::any()).build();
        let all = all.user_data(UNHEEDED).flags(Flags::SKIP_SUCCESS);
        // SAFETY: it refers to nothing.
        unsafe { self.push(&all) };
        self.turn();
        while self.slots.borrow().in_flight() > 0 {
            self.uring.borrow().submit_and_wait(1)?;
            self.deliver();
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

/// A descriptor that is readable when there are completions.
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
