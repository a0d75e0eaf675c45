//! The sockets and connections that the redirect captures, and those that it ignores.

use std::net::UdpSocket;

use super::*;

#[test]
fn both_families_are_redirected() {
    let Some(it) = Attached::new() else { return };
    for address in [V4, V6] {
        assert_eq!(
            ask(&it.client, at(address)).unwrap(),
            at(address).to_string()
        );
    }
    // A v4-mapped destination is an IPv4 one.
    let mapped = at("::ffff:10.99.1.2");
    assert_eq!(ask(&it.client, mapped).unwrap(), at(V4).to_string());
    assert_eq!(it.count(Counter::Redirected), 3);
    assert_eq!(it.count(Counter::Established), 3);
}

#[test]
fn getpeername_names_the_destination() {
    let Some(it) = Attached::new() else { return };
    for to in [at(V4), at(V6), at("::ffff:10.99.1.2")] {
        let socket = connect(&it.client, to).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
    }
}

#[test]
fn a_nonblocking_connect_is_redirected() {
    let Some(it) = Attached::new() else { return };
    let socket = it.client.tcp(Domain::IPV4);
    socket.set_nonblocking(true).unwrap();
    let error = socket.connect(&at(V4).into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    let mut fds = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&socket),
        nix::poll::PollFlags::POLLOUT,
    )];
    assert_eq!(nix::poll::poll(&mut fds, 10_000_u16), Ok(1));
    assert!(socket.take_error().unwrap().is_none());
    socket.set_nonblocking(false).unwrap();
    assert_eq!(answer(socket).unwrap(), at(V4).to_string());
}

#[test]
fn a_bound_source_address_is_kept() {
    let Some(it) = Attached::new() else { return };
    let socket = it.client.tcp(Domain::IPV4);
    socket
        .bind(&"127.3.2.1:0".parse::<SocketAddr>().unwrap().into())
        .unwrap();
    socket.connect(&at(V4).into()).unwrap();
    assert_eq!(answer(socket).unwrap(), at(V4).to_string());
}

#[test]
fn multipath_tcp_is_tcp() {
    let Some(it) = Attached::new() else { return };
    let Ok(socket) = it
        .client
        .socket(Domain::IPV4, Type::STREAM, libc::IPPROTO_MPTCP)
    else {
        // This kernel has none, so that none can escape.
        return;
    };
    socket.connect(&at(V4).into()).unwrap();
    // The hooks of getpeername(2) are not called for it: it sees where it is connected to.
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(it.listen4()));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = TcpStream::from(socket);
    let mut said = vec![0; at(V4).to_string().len()];
    stream.read_exact(&mut said).expect("the answer");
    assert_eq!(said, at(V4).to_string().as_bytes());
    assert_eq!(stream.read(&mut said).expect("the end of file"), 0);
}

/// sendto(2) with MSG_FASTOPEN connects too.
#[test]
fn a_connect_by_the_first_write_is_redirected() {
    let Some(it) = Attached::new() else { return };
    let socket = it.client.tcp(Domain::IPV4);
    let to = at(V4).into();
    socket
        .send_to_with_flags(b"x", &to, libc::MSG_FASTOPEN)
        .unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(at(V4)));
    assert_eq!(it.count(Counter::Redirected), 1);
}

/// The creation of a socket decides whether it is redirected. Its user and their cgroup don't
/// matter: a socket created outside takes the ordinary route, and one created inside does not.
#[test]
fn sockets_keep_the_cgroup_in_which_they_were_made() {
    let Some(it) = Attached::new() else { return };
    let outside = it.lab.cgroup.path().parent().unwrap();
    let moved = Factory::new(outside, &it.lab.netns);
    for to in [at(V4), at(V6)] {
        let domain = Domain::for_address(to);
        let before = moved.tcp(domain);
        moved.move_to(it.lab.cgroup.path());
        let after = moved.tcp(domain);
        moved.move_to(outside);
        before.connect(&to.into()).unwrap();
        assert_eq!(answer(before).unwrap(), "decoy");
        // This process, which connects, is outside as well: the descriptor was passed to it.
        after.connect(&to.into()).unwrap();
        assert_eq!(answer(after).unwrap(), to.to_string());
    }
}

#[test]
fn raw_sockets_are_left_alone() {
    let Some(it) = Attached::new() else { return };
    for to in [at(V4), at(V6)] {
        let domain = Domain::for_address(to);
        let raw = it
            .client
            .socket(domain, Type::RAW, libc::IPPROTO_TCP)
            .unwrap();
        raw.connect(&to.into()).unwrap();
        assert_eq!(raw.peer_addr().unwrap().as_socket().unwrap().ip(), to.ip());
    }
    assert_eq!(it.count(Counter::Redirected), 0);
    assert_eq!(it.count(Counter::NotCaptured), 0);
}

#[test]
fn what_is_not_captured_is_left_alone() {
    let Some(it) = Attached::new() else { return };
    assert_eq!(ask(&it.client, at(OTHER_V4)).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at("127.0.0.1")).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at("::1")).unwrap(), "decoy");
    assert_eq!(it.count(Counter::NotCaptured), 3);
    assert_eq!(it.count(Counter::Redirected), 0);
}

#[test]
fn ports_and_exclusions_narrow_the_capture() {
    let Some(mut it) = Attached::new() else {
        return;
    };
    let attachment = it.redirect.prepare(&it.spec).unwrap();
    it.spec.capture[0].ports = vec![1..=1024, PORT..=PORT];
    it.spec.exclude = vec![rule("10.99.1.3/32")];
    let mut attachment = attachment;
    attachment.update(&it.spec).unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    assert_eq!(ask(&it.client, at("10.99.1.3")).unwrap(), "decoy");
    it.spec.capture[0].ports = vec![1..=1024];
    attachment.update(&it.spec).unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), "decoy");
}

#[test]
fn own_addresses_are_excluded_where_the_interface_is_up() {
    let Some(it) = Attached::new() else { return };
    let mut attachment = it.redirect.prepare(&it.spec).unwrap();
    it.lab.netns.ip("address add 10.99.7.7/32 dev lo");
    it.lab.netns.ip("address add fd99::7/128 dev lo");
    it.lab.netns.ip("link add down0 type veth peer down1");
    it.lab.netns.ip("address add 10.99.8.8/32 dev down0");
    attachment.update(&it.spec).unwrap();
    assert_eq!(ask(&it.client, at("10.99.7.7")).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at("fd99::7")).unwrap(), "decoy");
    let service = at("10.99.8.8");
    assert_eq!(ask(&it.client, service).unwrap(), service.to_string());
}

#[test]
fn own_addresses_that_come_later_are_followed() {
    let Some(it) = Attached::new() else { return };
    let attachment = it.redirect.prepare(&it.spec).unwrap();
    let (sender, receiver) = mpsc::channel();
    let watch = AddressWatch::spawn(it.spec.netns.as_deref(), move || {
        sender.send(attachment.follow_addresses().unwrap()).unwrap();
    })
    .unwrap();
    let changed = || while !receiver.recv_timeout(Duration::from_secs(10)).unwrap() {};
    let own = at("10.99.7.7");
    assert_eq!(ask(&it.client, own).unwrap(), own.to_string());
    it.lab.netns.ip("address add 10.99.7.7/32 dev lo");
    changed();
    assert_eq!(ask(&it.client, own).unwrap(), "decoy");
    it.lab.netns.ip("address del 10.99.7.7/32 dev lo");
    changed();
    assert_eq!(ask(&it.client, own).unwrap(), own.to_string());
    drop(watch);
    assert!(receiver.try_iter().all(|changed| !changed));
}

#[test]
fn a_default_route_captures_nothing() {
    let Some(it) = Attached::new() else { return };
    routes(
        &it.redirect,
        &[("0.0.0.0/0", Verdict::Serve), ("::/0", Verdict::Serve)],
    );
    assert_eq!(ask(&it.client, at(OTHER_V4)).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at("fd98::2")).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
}

#[test]
fn other_cgroups_are_left_alone() {
    let Some(it) = Attached::new() else { return };
    let sibling = it.lab.cgroup.path().parent().unwrap();
    let outside = Factory::new(sibling, &it.lab.netns);
    assert_eq!(ask(&outside, at(V4)).unwrap(), "decoy");
    assert_eq!(ask(&outside, at(V6)).unwrap(), "decoy");
    // Descendants are inside.
    let child = it.lab.cgroup.path().join("child");
    std::fs::create_dir(&child).unwrap();
    let inside = Factory::new(&child, &it.lab.netns);
    assert_eq!(ask(&inside, at(V4)).unwrap(), at(V4).to_string());
}

#[test]
fn other_namespaces_are_left_alone() {
    let Some(it) = Attached::new() else { return };
    let other = Netns::new().unwrap();
    other.decoy(PORT);
    let client = Factory::new(it.lab.cgroup.path(), &other);
    assert_eq!(ask(&client, at(V4)).unwrap(), "decoy");
    assert_eq!(ask(&client, at(V6)).unwrap(), "decoy");
}

#[test]
fn datagrams_are_left_alone() {
    let Some(it) = Attached::new() else { return };
    let decoy = it.lab.netns.within(|| UdpSocket::bind(("::", PORT)));
    decoy
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    for to in [at(V4), at(V6)] {
        let domain = Domain::for_address(to);
        let socket = it.client.socket(domain, Type::DGRAM, 0).unwrap();
        socket.connect(&to.into()).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
        socket.send(to.to_string().as_bytes()).unwrap();
        let mut datagram = [0; 64];
        let length = decoy.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..length], to.to_string().as_bytes());
    }
}
