//! Runs seeds, each in a process of its own that is forked from a warm one: static state, such as a count
//! of runtimes, is the same for each, and a panic ends one seed alone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

use crate::scenario::{self, Outcome};
use crate::world::Shared;

/// Maximum time of a seed, in seconds. A seed takes a fraction of one; a program that never waits has no
/// end.
const LIMIT: u32 = 60;

/// A seed under way. Dropping it ends its process.
#[derive(Debug)]
pub struct Running {
    seed: u64,
    /// Process of the seed, `None` once it has ended.
    child: Option<libc::pid_t>,
    output: File,
}

/// Starts a seed.
///
/// # Errors
/// There is no process or no pipe for it.
pub fn start(shared: &Rc<Shared>, seed: u64) -> Result<Running> {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors to a place for two.
    ensure!(unsafe { libc::pipe(ends.as_mut_ptr()) } == 0, "pipe");
    // SAFETY: the call has just opened both, and they have no other owner.
    let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: the child runs on a copy of this thread, the only one that matters here, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(read);
        // SAFETY: both calls set up the end of this process alone: with its parent, and after a time.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::alarm(LIMIT);
        }
        run_here(shared, seed, File::from(write));
    }
    ensure!(child > 0, "fork");
    Ok(Running {
        seed,
        child: Some(child),
        output: File::from(read),
    })
}

/// Runs a seed in this process, writes its outcome to `output` and ends the process.
fn run_here(shared: &Rc<Shared>, seed: u64, mut output: File) -> ! {
    let state = shared
        .pki
        .directory()
        .join(format!("{seed}.{}", std::process::id()));
    // A new thread has new state of std, such as the keys of its hash maps.
    let shared = SendPointer(Rc::into_raw(shared.clone()));
    let place = state.clone();
    let thread = std::thread::Builder::new()
        .stack_size(8 << 20)
        .spawn(move || {
            let shared = shared;
            // SAFETY: the other thread waits for this one, and holds a count.
            let shared = unsafe { Rc::from_raw({ shared }.0) };
            let text = match scenario::run(shared, seed, place) {
                Ok(it) => format!(
                    "ok {} {} {} {} {}",
                    it.trace, it.events, it.requests, it.ran, it.time
                ),
                Err(error) => format!("failed {error:#}"),
            };
            let _ = output.write_all(text.as_bytes());
            drop(output);
            // Nothing is worth the time of destructors.
            let _ = std::fs::remove_dir_all(&state);
            // SAFETY: ends the process, and runs nothing of it.
            unsafe { libc::_exit(0) }
        });
    let _ = thread.map(std::thread::JoinHandle::join);
    // SAFETY: ends the process, and runs nothing of it.
    unsafe { libc::_exit(1) }
}

struct SendPointer(*const Shared);

// SAFETY: one thread at a time uses it: the first waits for the end of the second.
unsafe impl Send for SendPointer {}

impl Running {
    /// Returns the seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Returns the descriptor that has the outcome.
    pub fn descriptor(&self) -> i32 {
        self.output.as_raw_fd()
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// The violated invariant.
    pub fn outcome(mut self) -> Result<Outcome> {
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        self.end();
        let (word, rest) = text.split_once(' ').unwrap_or((&text, ""));
        match word {
            "ok" => {
                let numbers: Vec<u64> =
                    rest.split(' ').map(str::parse).collect::<Result<_, _>>()?;
                let [trace, events, requests, ran, time] = numbers[..] else {
                    bail!("{rest:?} is no outcome");
                };
                Ok(Outcome {
                    trace,
                    events,
                    requests,
                    ran,
                    time,
                })
            }
            "failed" => bail!("{rest}"),
            _ => bail!("no outcome: its panic is above, or it took more than {LIMIT} s"),
        }
    }

    /// Ends the process of the seed, if it has not ended.
    fn end(&mut self) {
        if let Some(child) = self.child.take() {
            // SAFETY: the calls end a child of ours and wait for it; they write nothing.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a seed and waits for it.
///
/// # Errors
/// The violated invariant.
pub fn run(shared: &Rc<Shared>, seed: u64) -> Result<Outcome> {
    let running = start(shared, seed)?;
    running.outcome().with_context(|| format!("seed {seed}"))
}
