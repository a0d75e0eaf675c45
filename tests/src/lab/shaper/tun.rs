//! A TUN device of a namespace: its descriptor returns the sent packets, one by one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

use crate::lab::netns::Netns;

/// Packets that wait for their reader. The default of 500 is less than a burst of TCP's.
const QUEUE: usize = 10_000;

/// Creates the device `name` in `netns`. It carries IP packets without link layer and without
/// offloads: packets above its MTU are fragmented before they are read here. It ends when the file
/// is closed.
pub(super) fn open(netns: &Netns, name: &str) -> Result<File> {
    let file = netns.enter(|| {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("cannot open /dev/net/tun")?;
        attach(&file, name).with_context(|| format!("cannot make the TUN device {name}"))?;
        Ok(file)
    })?;
    netns.ip(&format!("link set {name} txqueuelen {QUEUE}\n"))?;
    Ok(file)
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all zeroes are a valid value: integers, and arrays and a union of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last one stays 0, as the end.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
