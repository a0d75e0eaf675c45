//! TCP below HTTP/2: it must detect a vanished peer even where there is nothing to send, because the
//! connections of the peer hang meanwhile.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// Time without acknowledgement after which a peer is gone (`TCP_USER_TIMEOUT`, tcp(7)). A peer whose
/// process has not read for so long counts as gone as well.
const SILENCE: Duration = Duration::from_secs(20);

/// Prepares a connected socket, or a listener, whose accepted sockets inherit its options on Linux.
///
/// # Errors
/// The error of the system call.
pub(crate) fn prepare(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(5));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE))
}
