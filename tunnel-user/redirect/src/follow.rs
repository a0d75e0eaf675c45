//! A watch on a cgroup that comes and goes.
//!
//! A container's cgroup is removed with the container and made again with the next one; links go with
//! it. By inotify on its ancestors the follower learns of a new one within a millisecond, while a
//! container runtime still sets the program up. This is the second-best choice: while the connector is
//! away, a new container is not redirected. A stable ancestor, to which the programs stay attached, has
//! no such gap.

use std::{
    fs, io,
    io::PipeWriter,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use cpc_host::report::report;

/// Presence of the cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The cgroup exists, with this inode number, which changes with each creation.
    Present(u64),
    /// The cgroup does not exist.
    Absent,
}

/// A thread that watches a cgroup. Dropping it ends the thread.
#[derive(Debug)]
pub struct Follower {
    /// Pipe whose end ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Calls `changed` with the cgroup's presence, once at the start and then after each change.
    /// Changes between two calls may appear as one.
    ///
    /// `changed` runs on the follower's thread: call [`super::Attachment::link`] there.
    ///
    /// # Errors
    /// The error of inotify (`fs.inotify.max_user_instances`).
    pub fn spawn(
        cgroup: impl Into<PathBuf>,
        mut changed: impl FnMut(Presence) + Send + 'static,
    ) -> io::Result<Self> {
        let cgroup = cgroup.into();
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let (stopped, stop) = io::pipe()?;
        let run = move || {
            let mut last = None;
            loop {
                // Watching comes before looking: what happens in between is an event.
                watch(&inotify, &cgroup);
                let now = presence(&cgroup);
                if last != Some(now) {
                    last = Some(now);
                    changed(now);
                }
                let mut fds = [
                    PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => {
                        return tracing::error!(
                            error = report(&error),
                            "a cgroup is no longer followed"
                        );
                    }
                }
                if fds[1].any() == Some(true) {
                    return;
                }
                // What happened does not matter, only what is there now.
                while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
            }
        };
        let thread = thread::Builder::new()
            .name("cgroup-follower".to_owned())
            .spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the callback has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Watches the existing ancestors of the cgroup, the outermost first: a new one is an event of the one
/// above. Watching twice does no harm.
fn watch(inotify: &Inotify, cgroup: &Path) {
    let changes = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_ONLYDIR;
    let mut ancestors: Vec<_> = cgroup.ancestors().skip(1).collect();
    ancestors.reverse();
    for directory in ancestors {
        if inotify.add_watch(directory, changes).is_err() {
            return;
        }
    }
}

fn presence(cgroup: &Path) -> Presence {
    match fs::metadata(cgroup) {
        Ok(metadata) => Presence::Present(metadata.ino()),
        Err(_) => Presence::Absent,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[test]
    fn follows_through_missing_ancestors() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = root.path().join("a/b/c");
        let (sender, receiver) = mpsc::channel();
        let follower =
            Follower::spawn(&cgroup, move |presence| sender.send(presence).unwrap()).unwrap();
        let next = || receiver.recv_timeout(Duration::from_secs(10)).unwrap();

        assert_eq!(next(), Presence::Absent);
        fs::create_dir_all(&cgroup).unwrap();
        assert!(matches!(next(), Presence::Present(_)));
        fs::remove_dir_all(root.path().join("a")).unwrap();
        assert_eq!(next(), Presence::Absent);
        fs::create_dir_all(&cgroup).unwrap();
        assert!(matches!(next(), Presence::Present(_)));

        drop(follower);
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
    }
}
