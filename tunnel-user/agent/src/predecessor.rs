//! Proof that an earlier process of this agent has ended, by a lock in `state_dir`.
//!
//! A process holds the lock (flock(2)) on a file that names the process, and the kernel releases the
//! lock at the end of the process, by a crash too. So the next holder of the lock knows that the
//! process in the file has ended. Servers learn of it, and end the connections of that process at once,
//! instead of waiting for a life sign.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use tunnel_proto::session::InstanceId;

use cpc_host::directory::Directory;
use cpc_host::report::report;

/// Name of the file below `state_dir`.
const FILE: &str = "agent.lock";

/// Interval between attempts to get the lock while another process holds it, as in a rollout.
const RETRY: Duration = Duration::from_secs(1);

/// Takes the lock, and returns the process that held it before. While another one holds it, a task
/// waits for it: the next process must find the name of this one.
///
/// Errors are logged, and the agent serves without the lock.
pub(super) fn take(state_dir: Option<&Path>, own: InstanceId) -> Option<InstanceId> {
    let state_dir = state_dir?;
    let taken = open(state_dir).and_then(|file| Ok((lock(&file, own)?, file)));
    match taken {
        Ok((Lock::Taken(predecessor), file)) => {
            tokio::spawn(keep(file));
            predecessor
        }
        Ok((Lock::Busy, file)) => {
            tracing::info!(
                directory = %state_dir.display(),
                "another agent holds the lock in state_dir"
            );
            tokio::spawn(wait(file, own));
            None
        }
        Err(error) => {
            complain(&error);
            None
        }
    }
}

async fn wait(file: File, own: InstanceId) {
    loop {
        tokio::time::sleep(RETRY).await;
        match lock(&file, own) {
            Ok(Lock::Busy) => {}
            Ok(Lock::Taken(_)) => return keep(file).await,
            Err(error) => return complain(&error),
        }
    }
}

/// Keeps the lock until the end of the agent's runtime, when nothing of the agent runs any more.
async fn keep(_file: File) {
    std::future::pending().await
}

fn complain(error: &io::Error) {
    tracing::warn!(
        error = report(error),
        "the lock in state_dir can't be used: after a crash of this agent servers learn of it a second \
         later"
    );
}

/// Outcome of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Lock {
    /// This process holds the lock, which was that process's before.
    Taken(Option<InstanceId>),
    /// Another process holds it.
    Busy,
}

fn open(state_dir: &Path) -> io::Result<File> {
    Directory::create(state_dir, 0o700)?.open_to_write(FILE, 0o600)
}

fn lock(mut file: &File, own: InstanceId) -> io::Result<Lock> {
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Lock::Busy),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let mut text = String::new();
    let read = file.take(64).read_to_string(&mut text);
    // What is not ours names no process.
    let predecessor = read.ok().and_then(|_| parse(&text));
    let written = file
        .rewind()
        .and_then(|()| file.set_len(0))
        .and_then(|()| writeln!(file, "{own}"));
    if let Err(error) = written {
        tracing::warn!(
            error = report(&error),
            "the state directory takes no instance id: after a crash the next process does not know this one"
        );
    }
    Ok(Lock::Taken(predecessor))
}

fn parse(text: &str) -> Option<InstanceId> {
    let id = text.strip_suffix('\n')?;
    let hexadecimal = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let id = u128::from_str_radix(id, 16).ok()?;
    hexadecimal.then(|| InstanceId(id.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn id(byte: u8) -> InstanceId {
        InstanceId([byte; 16])
    }

    #[test]
    fn who_gets_the_lock_knows_who_held_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("state");
        let first = open(&dir).unwrap();
        assert_eq!(lock(&first, id(1)).unwrap(), Lock::Taken(None));
        let second = open(&dir).unwrap();
        assert_eq!(lock(&second, id(2)).unwrap(), Lock::Busy);
        // As the end of its process does.
        drop(first);
        assert_eq!(lock(&second, id(2)).unwrap(), Lock::Taken(Some(id(1))));
        drop(second);
        let third = open(&dir).unwrap();
        assert_eq!(lock(&third, id(3)).unwrap(), Lock::Taken(Some(id(2))));
    }

    #[test]
    fn what_is_no_name_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "\n", "1\n", &format!("+{:031x}\n", 1), &"0".repeat(64)] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let file = open(dir.path()).unwrap();
            assert_eq!(lock(&file, id(1)).unwrap(), Lock::Taken(None), "{text:?}");
        }
        fs::remove_file(dir.path().join(FILE)).unwrap();
        std::os::unix::fs::symlink("elsewhere", dir.path().join(FILE)).unwrap();
        assert!(open(dir.path()).is_err());
    }

    /// A link on the way to state_dir, put there by another user, leads root nowhere.
    #[test]
    fn root_is_not_led_elsewhere() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI runs tests as root");
            println!("skipped: only root can be led elsewhere");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (link, elsewhere) = (dir.path().join("state"), dir.path().join("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(65_534), None).unwrap();
        assert!(open(&link).is_err());
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }
}
