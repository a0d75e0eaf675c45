//! Restarts, upgrades, and cgroups that come and go.

use super::*;

#[test]
fn nothing_escapes_over_a_restart() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    let Attached {
        lab,
        redirect,
        spec,
        connector,
        client,
    } = it;
    let addresses = [spec.listen4.unwrap().into(), spec.listen6.unwrap().into()];
    let id = redirect.prepare(&spec).unwrap().id();
    drop((redirect, connector));
    assert_eq!(errno(&client, at(V4)), libc::ECONNREFUSED);
    assert_eq!(errno(&client, at(V6)), libc::ECONNREFUSED);

    let redirect = Redirect::new(lab.pin());
    let listeners = Listeners::reopen(&lab.netns, addresses);
    let attachment = redirect.prepare(&spec).unwrap();
    assert_eq!(attachment.id(), id);
    assert_eq!(attachment.link().unwrap(), Linked::Replaced);
    let _connector = Connector::start(&redirect, "test", listeners);
    // The routes were pinned too.
    assert_eq!(ask(&client, at(V4)).unwrap(), at(V4).to_string());
}

#[test]
fn programs_are_replaced_under_load_without_an_escape() {
    let Some(it) = Attached::new() else { return };
    let stop = AtomicBool::new(false);
    let load = |to: SocketAddr| {
        let client = Factory::new(it.lab.cgroup.path(), &it.lab.netns);
        let mut answers = BTreeMap::new();
        while !stop.load(Ordering::Relaxed) {
            let answer = ask(&client, to).unwrap_or_else(|error| error.to_string());
            *answers.entry(answer).or_insert(0) += 1;
        }
        answers
    };
    thread::scope(|scope| {
        let v4 = scope.spawn(|| load(at(V4)));
        let v6 = scope.spawn(|| load(at(V6)));
        let before = it.redirect.status().unwrap();
        for _ in 0..10 {
            let attachment = it.redirect.prepare(&it.spec).unwrap();
            assert_eq!(attachment.link().unwrap(), Linked::Replaced);
        }
        let after = it.redirect.status().unwrap();
        stop.store(true, Ordering::Relaxed);
        for (worker, to) in [(v4, at(V4)), (v6, at(V6))] {
            let answers = worker.join().unwrap();
            assert_eq!(
                answers.keys().collect::<Vec<_>>(),
                [&to.to_string()],
                "{answers:?}"
            );
        }
        for ((_, before), (_, after)) in before[0].links.iter().zip(&after[0].links) {
            let (
                LinkState::Attached {
                    program: old,
                    cgroup,
                },
                LinkState::Attached {
                    program: new,
                    cgroup: still,
                },
            ) = (before, after)
            else {
                panic!("{before:?} {after:?}");
            };
            assert_ne!(old, new);
            assert_eq!(cgroup, still);
        }
    });
}

#[test]
fn settings_change_under_load_without_an_escape() {
    let Some(mut it) = Attached::new() else {
        return;
    };
    let mut attachment = it.redirect.prepare(&it.spec).unwrap();
    let stop = AtomicBool::new(false);
    let (pin, netns) = (it.lab.pin(), &it.lab.netns);
    let client = Factory::new(it.lab.cgroup.path(), netns);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut answers = BTreeMap::new();
            while !stop.load(Ordering::Relaxed) {
                let answer = ask(&client, at(V4)).unwrap_or_else(|error| error.to_string());
                *answers.entry(answer).or_insert(0) += 1;
            }
            answers
        });
        // The address is captured and served throughout, each time by other prefixes.
        let prefixes = [
            "10.99.0.0/16",
            "10.99.1.0/24",
            "10.96.0.0/12",
            "10.99.1.2/32",
            "0.0.0.0/0",
        ];
        let mut kernel = Redirect::new(pin).routes().unwrap();
        for prefix in prefixes.iter().cycle().take(200) {
            let served = [(TENANT, prefix.parse().unwrap(), Verdict::Serve)];
            kernel.replace(&served, false).unwrap();
            it.spec.capture = vec![rule(prefix)];
            attachment.update(&it.spec).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        let answers = worker.join().unwrap();
        assert_eq!(
            answers.keys().collect::<Vec<_>>(),
            [&at(V4).to_string()],
            "{answers:?}"
        );
    });
}

#[test]
fn a_cgroup_made_again_is_attached_at_once() {
    let Some(mut it) = Attached::new() else {
        return;
    };
    it.spec.name = "follower".to_owned();
    it.spec.cgroup = it.lab.cgroup.path().join("pod/container");
    // The outer attachment would redirect what this one misses.
    it.redirect.detach("test").unwrap();
    let attachment = it.redirect.prepare(&it.spec).unwrap();
    let (sender, receiver) = mpsc::channel();
    let follower = Follower::spawn(&it.spec.cgroup, move |presence| {
        let linked = match presence {
            Presence::Present(_) => Some(attachment.link().unwrap()),
            Presence::Absent => None,
        };
        sender.send(linked).unwrap();
    })
    .unwrap();
    let next = || receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(next(), None);
    assert!(matches!(
        it.redirect.attach(&it.spec),
        Err(RedirectError::Cgroup { .. })
    ));

    let addresses = it.listeners();
    drop(it.connector);
    let listeners = Listeners::reopen(&it.lab.netns, addresses);
    let _connector = Connector::start(&it.redirect, "follower", listeners);
    let pod = it.spec.cgroup.parent().unwrap();
    for _ in 0..3 {
        std::fs::create_dir_all(&it.spec.cgroup).unwrap();
        assert_eq!(next(), Some(Linked::Created));
        let client = Factory::new(&it.spec.cgroup, &it.lab.netns);
        assert_eq!(ask(&client, at(V4)).unwrap(), at(V4).to_string());
        assert_eq!(ask(&client, at(V6)).unwrap(), at(V6).to_string());
        drop(client);
        remove_cgroup(&it.spec.cgroup);
        remove_cgroup(pod);
        assert_eq!(next(), None);
    }
    // The kernel lets go of a cgroup only when the last socket made in it is gone.
    let orphaned = || {
        let status = it.redirect.status().unwrap();
        status[0]
            .links
            .iter()
            .all(|(_, state)| *state == LinkState::Orphaned)
    };
    assert!((0..1000).any(|_| orphaned() || {
        thread::sleep(Duration::from_millis(10));
        false
    }));
    drop(follower);
}

#[test]
fn an_attached_ancestor_has_no_gap() {
    let Some(it) = Attached::new() else { return };
    let container = it.lab.cgroup.path().join("container");
    for _ in 0..20 {
        std::fs::create_dir(&container).unwrap();
        let client = Factory::new(&container, &it.lab.netns);
        assert_eq!(ask(&client, at(V4)).unwrap(), at(V4).to_string());
        drop(client);
        remove_cgroup(&container);
    }
}

#[test]
fn one_cgroup_in_two_namespaces_has_two_attachments() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    let other = Netns::new().unwrap();
    other.decoy(PORT);
    let listeners = Listeners::open(&other);
    let [listen4, listen6] = listeners.addresses();
    let mut spec = it.lab.spec(listen4, listen6);
    spec.name = "other".to_owned();
    spec.netns = Some(other.path());
    spec.tenant = TENANT + 1;
    let attachment = it.redirect.attach(&spec).unwrap();
    assert_eq!(attachment.id(), 1);
    let connector = Connector::start(&it.redirect, "other", listeners);
    let there = Factory::new(it.lab.cgroup.path(), &other);
    // Each tenant has its own routes.
    assert_eq!(errno(&there, at(V4)), libc::ENETUNREACH);
    let served = [TENANT, TENANT + 1]
        .into_iter()
        .flat_map(|tenant| ["10.99.0.0/16", "fd99::/64"].map(|cidr| (tenant, cidr)))
        .map(|(tenant, cidr)| (tenant, cidr.parse().unwrap(), Verdict::Serve))
        .collect::<Vec<_>>();
    it.redirect
        .routes()
        .unwrap()
        .replace(&served, false)
        .unwrap();
    for client in [&it.client, &there] {
        assert_eq!(ask(client, at(V4)).unwrap(), at(V4).to_string());
        let socket = connect(client, at(V6)).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(at(V6)));
    }
    // Each connector answers for its own.
    drop(connector);
    assert_eq!(errno(&there, at(V4)), libc::ECONNREFUSED);
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());

    let names: Vec<_> = it
        .redirect
        .status()
        .unwrap()
        .into_iter()
        .map(|s| s.name)
        .collect();
    assert_eq!(names, ["other", "test"]);
}

#[test]
fn a_detached_name_leaves_nothing() {
    let Some(it) = Attached::new() else { return };
    assert!(it.redirect.detach("test").unwrap());
    assert!(!it.redirect.detach("test").unwrap());
    assert!(it.redirect.status().unwrap().is_empty());
    assert!(matches!(
        it.redirect.flows("test"),
        Err(RedirectError::NotAttached(_))
    ));
    assert_eq!(ask(&it.client, at(V4)).unwrap(), "decoy");
    // The number is free again, its counters start from zero.
    let mut spec = it.spec.clone();
    spec.name = "next".to_owned();
    assert_eq!(it.redirect.attach(&spec).unwrap().id(), 0);
    let counts = it.redirect.counters().unwrap().read().unwrap();
    assert!(counts.iter().all(|count| count.value == 0), "{counts:?}");
}

#[test]
fn pins_need_a_bpf_file_system() {
    let Some(it) = Attached::new() else { return };
    let elsewhere = tempfile::tempdir().unwrap();
    let error = Redirect::new(elsewhere.path())
        .attach(&it.spec)
        .unwrap_err();
    assert!(matches!(error, RedirectError::NotBpffs(_)), "{error}");
    assert!(Redirect::new(elsewhere.path()).status().unwrap().is_empty());
}
