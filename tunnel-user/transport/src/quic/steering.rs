//! Steering: the kernel chooses the shard of each packet, before any thread wakes.
//!
//! The shards' sockets share one port (`SO_REUSEPORT`, socket(7)), and a classic BPF program picks
//! one of them for each packet by its number in the order of their binding. Steering needs no capability.
//!
//! * A packet with a connection id of ours goes to the shard that made it, wherever it comes from:
//!   a new NAT mapping or address stays on its shard. With fewer shards than before a restart any
//!   will do: each knows that the id is ours and answers with a stateless reset.
//! * A client's first packets have an id that the client chose. Its first two bytes choose the shard,
//!   and all packets of the flight have the same ones. A random id selects a random shard. Our agents
//!   spread their tunnels over different shards, without knowing the number of shards ([`Spread`]). An
//!   unauthenticated peer may choose too: it gains the handshakes of one shard, which are bounded for
//!   all shards together.
//! * A shard that has more tunnels than another sends a newcomer there, by a Retry with an id of the
//!   other's ([`Incoming::retry`](super::Incoming::retry)): keys are the same on all of them.
//! * Packets that are not QUIC go to any shard, which drops them.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use quinn_proto::ConnectionId;

use super::connection_id::{LAYOUT, LEN, SHARD_AT};
use cpc_host::random;

/// The destination connection id of a packet with a short header (RFC 9000 section 17.3)..
const SHORT_ID: u32 = 1;

/// ..and of one with a long header, behind the id's length (section 17.2).
const LONG_ID: u32 = 6;

/// Bit in the first byte of a long header.
const LONG_HEADER: u32 = 0x80;

/// Length of the longest id, in bytes: never mistaken for one of ours.
const CHOSEN: usize = 20;

/// Length of the id of a tunnel that must stay on the shard which its id chooses.
const PLACED: usize = 19;

/// Makes the kernel steer packets to the sockets of `group`, which share a port and are in the order of
/// their binding. Sockets of the port that follow them get no packets any more. The effect is on all processes
/// that use the port. A socket that is alone, and opened without sharing, needs no steering.
///
/// # Errors
/// The error of the system call; packets go where they went before, or by a hash of their addresses.
pub fn steer(group: &[UdpSocket]) -> io::Result<()> {
    match attach(group) {
        Err(error) if group.len() == 1 && error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        attached => attached,
    }
}

fn attach(group: &[UdpSocket]) -> io::Result<()> {
    let (Some(any), Ok(shards)) = (group.first(), u32::try_from(group.len())) else {
        return Ok(());
    };
    let mut program = program(shards);
    let program = libc::sock_fprog {
        // A handful of instructions.
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads a sock_fprog and the instructions behind it, which both live through
    // the call, and keeps a copy of its own.
    let done = unsafe {
        libc::setsockopt(
            any.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the program. It sees a packet from the UDP payload on. A load beyond the packet's end
/// returns 0.
fn program(shards: u32) -> Vec<libc::sock_filter> {
    let load = |size: u32, at: u32| statement(libc::BPF_LD | size | libc::BPF_ABS, at);
    let choose = || {
        [
            statement(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, shards),
            statement(libc::BPF_RET | libc::BPF_A, 0),
        ]
    };
    let shard_at = SHARD_AT as u32;
    let mut program = vec![
        load(libc::BPF_B, 0),
        // A short header goes on behind the next three.
        jump(libc::BPF_JSET, LONG_HEADER, 0, 3),
        load(libc::BPF_B, LONG_ID - 1),
        jump(libc::BPF_JEQ, LEN as u32, 4, 0),
        statement(libc::BPF_JMP | libc::BPF_JA, 8),
        // Short: ours has no length in the packet.
        load(libc::BPF_B, SHORT_ID + shard_at),
    ];
    program.extend(choose());
    // Long, of our length.
    program.extend([
        load(libc::BPF_B, LONG_ID),
        jump(libc::BPF_JEQ, LAYOUT.into(), 0, 3),
        load(libc::BPF_B, LONG_ID + shard_at),
    ]);
    program.extend(choose());
    // Long, chosen by a client.
    program.push(load(libc::BPF_H, LONG_ID));
    program.extend(choose());
    program
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        // All codes are below 2^8.
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(condition: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        jt,
        jf,
        ..statement(libc::BPF_JMP | condition | libc::BPF_K, k)
    }
}

/// Spread of one agent's tunnels over different shards of a server: consecutive numbers choose
/// different ones, for any number of shards.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    first: u16,
    /// Length of the ids, in bytes.
    length: usize,
}

impl Spread {
    /// Creates a spread with a random start, so that agents don't all choose the same shard. The server
    /// may move a tunnel to a shard with fewer, unless it is one of `several` of its agent, which had
    /// better be apart.
    pub fn random(several: bool) -> Self {
        let mut bytes = [0; 2];
        // Without random numbers TLS has failed before.
        let _ = random::fill(&mut bytes);
        Self {
            first: u16::from_be_bytes(bytes),
            length: if several { PLACED } else { CHOSEN },
        }
    }

    /// Returns the generator of the first connection ids of tunnel `number`.
    pub(super) fn ids(self, number: u8) -> Arc<dyn Fn() -> ConnectionId + Send + Sync> {
        // Not around the end: the numbers there leave other remainders.
        let number = self.first.min(u16::MAX - u16::from(u8::MAX)) + u16::from(number);
        let length = self.length;
        Arc::new(move || {
            let mut id = [0; CHOSEN];
            // What must not be guessed is behind it (RFC 9000 section 7.2).
            let _ = random::fill(&mut id);
            id[..2].copy_from_slice(&number.to_be_bytes());
            ConnectionId::new(&id[..length])
        })
    }
}

/// Whether the client that sent `id` wants the shard that it chooses, and no other.
pub(super) fn is_placed(id: &ConnectionId) -> bool {
    id.len() == PLACED
}

#[cfg(test)]
mod tests;
