//! A simulated process: a runtime of its own, which runs until it has nothing left to do. Dropping it is a
//! crash: everything of it ends at once, and sends nothing more.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use tokio::runtime::{Builder, Runtime};
use tokio::task::LocalSet;

use crate::interpose::{begin_step, end_step, is_idle, kernel, set_wall};
use crate::kernel::FileId;

/// Whether a program has used a thread of its own, whose timing nothing determines.
static HAS_THREAD: AtomicBool = AtomicBool::new(false);

/// Whether a program has used a thread beside the simulation's.
pub fn has_thread() -> bool {
    HAS_THREAD.load(Ordering::Relaxed)
}

/// A simulated process.
#[derive(Debug)]
pub struct Process {
    // Dropped in this order: tasks, then their runtime.
    tasks: LocalSet,
    runtime: Runtime,
    host: usize,
    epoll: FileId,
    /// Time of the next timer.
    alarm: Option<u64>,
    /// Difference of the wall clock to the monotonic clock.
    wall: i64,
}

impl Process {
    /// Starts a process on `host`.
    ///
    /// # Errors
    /// The runtime can't be made.
    pub fn new(host: usize, wall: i64) -> io::Result<Self> {
        kernel(|kernel| kernel.enter(host));
        set_wall(wall);
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_start(|| HAS_THREAD.store(true, Ordering::Relaxed))
            .build()?;
        Ok(Self {
            tasks: LocalSet::new(),
            runtime,
            host,
            epoll: kernel(|kernel| kernel.last_epoll()),
            alarm: None,
            wall,
        })
    }

    /// Returns the host.
    pub fn host(&self) -> usize {
        self.host
    }

    /// Moves the wall clock.
    pub fn step_clock(&mut self, by: i64) {
        self.wall += by;
    }

    /// Runs `task` in this process. Its result is in the cell once it is done.
    pub fn spawn<T: 'static>(
        &mut self,
        task: impl Future<Output = T> + 'static,
    ) -> Rc<RefCell<Option<T>>> {
        let result = Rc::new(RefCell::new(None));
        let place = result.clone();
        self.tasks.spawn_local(async move {
            let done = task.await;
            place.replace(Some(done));
        });
        self.alarm = Some(0);
        result
    }

    /// Calls `call` in the context of the process, as a task that needs no waiting.
    pub fn run<T>(&mut self, call: impl FnOnce() -> T) -> T {
        self.enter();
        self.alarm = Some(0);
        let _runtime = self.runtime.enter();
        let _tasks = self.tasks.enter();
        call()
    }

    fn enter(&self) {
        kernel(|kernel| kernel.enter(self.host));
        set_wall(self.wall);
    }

    /// Whether there is something to do at `now`.
    pub fn has_work(&self, now: u64) -> bool {
        self.alarm.is_some_and(|at| at <= now) || kernel(|kernel| kernel.has_news(self.epoll))
    }

    /// Returns the time of the next timer.
    pub fn alarm(&self) -> Option<u64> {
        self.alarm
    }

    /// Runs until nothing is left to do.
    pub fn step(&mut self) {
        self.enter();
        begin_step();
        let idle = poll_fn(|cx| match is_idle(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        });
        self.tasks.block_on(&self.runtime, idle);
        self.alarm = end_step();
    }
}
