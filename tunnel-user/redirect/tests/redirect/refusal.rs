//! Refused connections, and their errors.

use std::process::Command;

use super::*;
use crate::lab::skip;

#[test]
fn refusals_say_why() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    routes(&it.redirect, &[]);
    assert_eq!(errno(&it.client, at(V4)), libc::ENETUNREACH);
    assert_eq!(errno(&it.client, at(V6)), libc::ENETUNREACH);
    routes(
        &it.redirect,
        &[
            ("10.99.0.0/16", Verdict::NoAgent),
            ("fd99::/64", Verdict::NoAgent),
        ],
    );
    assert_eq!(errno(&it.client, at(V4)), libc::EHOSTUNREACH);
    assert_eq!(errno(&it.client, at(V6)), libc::EHOSTUNREACH);
    assert_eq!(
        errno(&it.client, at("::ffff:10.99.1.2")),
        libc::EHOSTUNREACH
    );
    routes(&it.redirect, &[("10.99.0.0/16", Verdict::Denied)]);
    assert_eq!(errno(&it.client, at(V4)), libc::EACCES);

    assert_eq!(it.count(Counter::NoRoute), 2);
    assert_eq!(it.count(Counter::NoAgent), 3);
    assert_eq!(it.count(Counter::Denied), 1);
    // A refused socket can try again.
    let socket = it.client.tcp(Domain::IPV4);
    socket.connect(&at(V4).into()).unwrap_err();
    serve_all(&it.redirect);
    socket.connect(&at(V4).into()).unwrap();
    assert_eq!(answer(socket).unwrap(), at(V4).to_string());
}

#[test]
fn the_longest_route_of_the_tenant_decides() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    routes(
        &it.redirect,
        &[
            ("0.0.0.0/0", Verdict::Serve),
            ("10.99.1.0/24", Verdict::NoAgent),
        ],
    );
    assert_eq!(errno(&it.client, at(V4)), libc::EHOSTUNREACH);
    assert_eq!(
        ask(&it.client, at("10.99.2.2")).unwrap(),
        at("10.99.2.2").to_string()
    );
    // IPv4's default route is not IPv6's.
    assert_eq!(errno(&it.client, at(V6)), libc::ENETUNREACH);
    // Another tenant's routes count for nothing.
    let other = [(TENANT + 1, "10.99.0.0/16".parse().unwrap(), Verdict::Serve)];
    it.redirect
        .routes()
        .unwrap()
        .replace(&other, false)
        .unwrap();
    assert_eq!(errno(&it.client, at(V4)), libc::ENETUNREACH);
}

#[test]
fn a_dead_connector_is_refused() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    drop(it.connector);
    let mut heartbeat = it.redirect.heartbeat("test").unwrap();
    heartbeat.beat().unwrap();
    for to in [at(V4), at(V6), at("::ffff:10.99.1.2")] {
        assert_eq!(errno(&it.client, to), libc::ECONNREFUSED);
    }
    let status = it.redirect.status().unwrap();
    assert_eq!(status[0].counters["refused_dead"], 3);
}

#[test]
fn a_stuck_connector_is_refused() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    drop(it.connector);
    // The connector listens, but does not beat.
    let listeners = Listeners::reopen(
        &it.lab.netns,
        [
            it.spec.listen4.unwrap().into(),
            it.spec.listen6.unwrap().into(),
        ],
    );
    let mut heartbeat = it.redirect.heartbeat("test").unwrap();
    listeners.announce(&mut heartbeat);
    heartbeat.beat().unwrap();
    assert!(connect(&it.client, at(V4)).is_ok());
    thread::sleep(Duration::from_millis(3100));
    assert_eq!(errno(&it.client, at(V4)), libc::ECONNREFUSED);
    heartbeat.beat().unwrap();
    assert!(connect(&it.client, at(V4)).is_ok());
    heartbeat.stop().unwrap();
    assert_eq!(errno(&it.client, at(V4)), libc::ECONNREFUSED);
    let status = it.redirect.status().unwrap();
    assert_eq!(status[0].counters["refused_stuck"], 2);
}

/// The connector has ended, its last beat still counts, and another program has its port.
#[test]
fn a_stranger_on_the_connectors_port_gets_nothing() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    let addresses = it.listeners();
    drop(it.connector);
    let strangers = Listeners::reopen(&it.lab.netns, addresses);
    it.redirect.heartbeat("test").unwrap().beat().unwrap();
    for to in [at(V4), at(V6), at("::ffff:10.99.1.2")] {
        assert_eq!(errno(&it.client, to), libc::ECONNREFUSED);
    }
    let not_accepted = |listener: &std::net::TcpListener| {
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    };
    not_accepted(&strangers.0);
    not_accepted(&strangers.1);
    assert_eq!(it.redirect.status().unwrap()[0].counters["refused_dead"], 3);

    // The next connector takes another port, and the programs follow it there.
    let listeners = Listeners::open(&it.lab.netns);
    assert!(
        !listeners
            .addresses()
            .iter()
            .any(|it| addresses.contains(it))
    );
    let _connector = Connector::start(&it.redirect, "test", listeners);
    for to in [at(V4), at(V6)] {
        assert_eq!(ask(&it.client, to).unwrap(), to.to_string());
    }
    not_accepted(&strangers.0);
    not_accepted(&strangers.1);
}

#[test]
fn fail_open_passes_only_while_the_connector_is_away() {
    let Some(mut it) = Attached::with_errno() else {
        return;
    };
    it.spec.fail = FailMode::Open;
    let mut attachment = it.redirect.attach(&it.spec).unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    routes(&it.redirect, &[]);
    assert_eq!(errno(&it.client, at(V4)), libc::ENETUNREACH);

    let addresses = it.listeners();
    drop(it.connector);
    it.redirect.heartbeat("test").unwrap().beat().unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), "decoy");
    assert_eq!(ask(&it.client, at(V6)).unwrap(), "decoy");
    let listeners = Listeners::reopen(&it.lab.netns, addresses);
    let mut heartbeat = it.redirect.heartbeat("test").unwrap();
    listeners.announce(&mut heartbeat);
    heartbeat.stop().unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), "decoy");

    it.spec.fail = FailMode::Closed;
    attachment.update(&it.spec).unwrap();
    assert_eq!(errno(&it.client, at(V4)), libc::ECONNREFUSED);
}

#[test]
fn the_kernel_chooses_errno_where_it_can() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    assert_eq!(
        it.redirect.prepare(&it.spec).unwrap().refusal(),
        Refusal::Errno
    );
}

#[test]
fn kernels_without_errno_reset() {
    let Some(lab) = lab() else { return };
    let Some(it) = Attached::with(lab, |redirect| redirect.refusing_by(Refusal::Reset)) else {
        return;
    };
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    routes(&it.redirect, &[]);
    for to in [at(V4), at(V6)] {
        let error = ask(&it.client, to).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(it.count(Counter::NoRoute), 2);
    assert_eq!(it.count(Counter::Redirected), 1);
    drop(it.connector);
    assert_eq!(errno(&it.client, at(V4)), libc::EPERM);
}

#[test]
fn kernels_without_errno_are_not_asked_for_it() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    for (refusal, called) in [(Refusal::Errno, true), (Refusal::Reset, false)] {
        let redirect = it.redirect.clone().refusing_by(refusal);
        redirect.attach(&it.spec).unwrap();
        for hook in [Hook::Connect4, Hook::Connect6] {
            let status = redirect.status().unwrap();
            let LinkState::Attached { program, .. } = status[0].links[hook.name()] else {
                panic!("{status:?}");
            };
            // The verifier has removed what can't be reached.
            let id = program.to_string();
            let mut bpftool = Command::new("bpftool");
            bpftool.args(["prog", "dump", "xlated", "id", &id]);
            let Ok(dump) = bpftool.output() else {
                return skip("needs bpftool");
            };
            assert!(dump.status.success(), "{dump:?}");
            let dump = String::from_utf8(dump.stdout).unwrap();
            assert_eq!(
                dump.contains("bpf_set_retval"),
                called,
                "{refusal:?} {hook:?}"
            );
        }
    }
}

#[test]
fn refusals_are_logged() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .unwrap();
    let redirect = it.redirect.clone();
    // Ends with the process: it would go on without end.
    let forwarding = redirect.forward_log("test").unwrap();
    thread::spawn(move || runtime.block_on(forwarding).unwrap());

    ask(&it.client, at(V4)).unwrap();
    routes(&it.redirect, &[]);
    errno(&it.client, at(V4));
    errno(&it.client, at(V6));
    for _ in 0..1000 {
        let text = log.text();
        if text.contains(&format!("refused {V6} port {PORT}")) {
            assert!(
                text.contains(&format!("{V4} port {PORT} with errno 101")),
                "{text}"
            );
            assert_eq!(text.lines().count(), 2, "{text}");
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("not logged: {:?}", log.text());
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
