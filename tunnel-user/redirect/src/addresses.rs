//! A watch on the host's own addresses, which are not captured: a later one, by DHCP for example, must
//! not be taken for a worker's.

use std::{
    io::{self, PipeWriter},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};

use super::netns::within;

use cpc_host::report::report;

/// Time for which changes are collected before they count as one.
const REST_MS: u16 = 100;

/// A thread that waits for addresses and interfaces to change. Dropping it ends the thread.
#[derive(Debug)]
pub struct AddressWatch {
    /// Pipe whose end ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl AddressWatch {
    /// Calls `changed` after addresses or interfaces have changed in this thread's network namespace,
    /// or in `netns`; once for all changes within a tenth of a second.
    ///
    /// # Errors
    /// The error of opening rtnetlink there.
    pub fn spawn(
        netns: Option<&Path>,
        mut changed: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let mut sockets = vec![subscribe()?];
        if netns.is_some() {
            sockets.push(within(netns, subscribe)?);
        }
        let (stopped, stop) = io::pipe()?;
        let run = move || {
            loop {
                let mut fds: Vec<_> = { sockets.iter() }
                    .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN))
                    .collect();
                fds.push(PollFd::new(stopped.as_fd(), PollFlags::POLLIN));
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => {
                        return tracing::error!(
                            error = report(&error),
                            "the host's addresses are no longer followed"
                        );
                    }
                }
                // More may follow, and so may the end.
                let mut end = [PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
                if poll(&mut end, REST_MS).is_ok_and(|ready| ready > 0) {
                    return;
                }
                if sockets.iter().map(drain).fold(false, |any, one| any | one) {
                    changed();
                }
            }
        };
        let thread = thread::Builder::new()
            .name("address-watch".to_owned())
            .spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for AddressWatch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the callback has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Opens a socket for changes of addresses and interfaces of this thread's namespace (rtnetlink(7)).
fn subscribe() -> io::Result<OwnedFd> {
    const GROUPS: i32 = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS as u32))?;
    Ok(socket)
}

/// Reads all messages, and returns whether there was any. Their content does not matter, only the
/// present addresses; so a lost message (ENOBUFS) counts as one.
fn drain(socket: &OwnedFd) -> bool {
    let mut heard = false;
    loop {
        match recv(socket.as_raw_fd(), &mut [0; 16 << 10], MsgFlags::empty()) {
            Ok(_) | Err(Errno::ENOBUFS) => heard = true,
            Err(Errno::EINTR) => {}
            Err(_) => return heard,
        }
    }
}
