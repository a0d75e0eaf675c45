//! TCP below HTTP/2: a peer that is gone without a word must be noticed, also where there is
//! nothing to send, for its connections hang meanwhile.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// A peer that has acknowledged nothing for so long is gone (`TCP_USER_TIMEOUT`, tcp(7)); one whose
/// process has stopped reading for so long counts as gone as well.
const SILENCE: Duration = Duration::from_secs(20);

/// Prepares a connected socket, or a listener, whose accepted sockets inherit it on Linux.
///
/// # Errors
/// What the system says.
pub fn prepare(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(5));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE))
}
