//! Origins, as the accepting side gets them.

use super::*;

#[test]
fn an_origin_is_taken_once() {
    let Some(it) = Attached::new() else { return };
    let addresses = it.listeners();
    drop(it.connector);
    let listeners = Listeners::reopen(&it.lab.netns, addresses);
    let mut heartbeat = it.redirect.heartbeat("test").unwrap();
    listeners.announce(&mut heartbeat);
    heartbeat.beat().unwrap();
    let _client = connect(&it.client, at(V4)).unwrap();
    listeners.0.set_nonblocking(false).unwrap();
    let (stream, client) = listeners.0.accept().unwrap();
    let mut flows = it.redirect.flows("test").unwrap();
    let local = stream.local_addr().unwrap();
    let origin = flows.take_origin(client, local).unwrap().unwrap();
    assert_eq!((origin.destination, origin.refused), (at(V4), None));
    assert_eq!(flows.take_origin(client, local).unwrap(), None);
}

#[test]
fn a_direct_connection_has_no_origin() {
    let Some(it) = Attached::new() else { return };
    let outside = Factory::new(it.lab.cgroup.path().parent().unwrap(), &it.lab.netns);
    for client in [&outside, &it.client] {
        let error = ask(client, it.listen4()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn an_earlier_attempt_is_forgotten() {
    let Some(it) = Attached::new() else { return };
    let socket = it.client.tcp(Domain::IPV4);
    socket.connect(&at(V4).into()).unwrap();
    // Dissolves the association, so that the socket can be used again.
    let unspecified = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as u16,
        sa_data: [0; 14],
    };
    // SAFETY: the address lives through the call and has the size that is given.
    let result = unsafe {
        libc::connect(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            &raw const unspecified,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
    socket.connect(&at(OTHER_V4).into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(at(OTHER_V4)));
    assert_eq!(answer(socket).unwrap(), "decoy");
}
