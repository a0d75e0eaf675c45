//! The shortcut past TCP on loopback: what it promises, and what the kernel does without those
//! promises. The tests named `the_kernel_alone_..` show hazards: they are why the programs ask what
//! has been read, why only one direction has a shortcut, and why it is off by default.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use aya::maps::{Map, MapData, SkStorage, SockHash};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    },
};
use tunnel_ebpf_common::{FlowKey, Writer};
use tunnel_user::redirect::{SHORTCUT_BYTES, Shortcut, Shortcuts};

use super::*;

/// More than any buffer of TCP's on loopback, and still little memory.
const MUCH: u64 = 64 << 20;

/// One redirected connection of an attachment with the shortcut, both of its ends ours.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    peer: SocketAddr,
    shortcuts: Shortcuts,
    redirect: Redirect,
    _listeners: Listeners,
    it: Parts,
}

/// What the laboratory is made of, without its connector.
struct Parts {
    spec: AttachmentSpec,
    factory: Factory,
    lab: Lab,
}

impl Pair {
    fn new() -> Option<Self> {
        Self::with(true)
    }

    /// With `shortcut: false` the maps are there, but the client is in none of them.
    fn with(shortcut: bool) -> Option<Self> {
        let lab = lab()?;
        let listeners = Listeners::open(&lab.netns);
        let [listen4, listen6] = listeners.addresses();
        let mut spec = lab.spec(listen4, listen6);
        spec.shortcut = true;
        let redirect = Redirect::new(lab.pin());
        let attach = |spec: &AttachmentSpec| {
            let attached = redirect.attach(spec);
            attached.unwrap_or_else(|error| panic!("{}", chain(&error)));
        };
        attach(&spec);
        if !shortcut {
            spec.shortcut = false;
            attach(&spec);
        }
        serve_all(&redirect);
        let mut heartbeat = redirect.heartbeat("test").unwrap();
        listeners.announce(&mut heartbeat);
        heartbeat.beat().unwrap();
        let factory = Factory::new(lab.cgroup.path(), &lab.netns);
        let client: TcpStream = connect(&factory, at(V4)).unwrap().into();
        listeners.0.set_nonblocking(false).unwrap();
        let (server, peer) = listeners.0.accept().unwrap();
        for end in [&client, &server] {
            end.set_nodelay(true).unwrap();
            end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        let shortcuts = redirect.shortcuts("test");
        let shortcuts = shortcuts.unwrap_or_else(|error| panic!("{}", chain(&error)));
        Some(Self {
            client,
            server,
            peer,
            shortcuts,
            redirect,
            _listeners: listeners,
            it: Parts { spec, factory, lab },
        })
    }

    fn open(&mut self) -> Shortcut {
        let local = self.server.local_addr().unwrap();
        self.shortcuts
            .open_to(&self.server, self.peer, local)
            .unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    /// Reads so many bytes, and nothing more.
    fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.server.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn taken(&self, shortcut: Shortcut) -> u64 {
        self.shortcuts.taken(shortcut).unwrap()
    }
}

/// Writes without waiting until nothing more is taken, or `most` is.
fn fill(mut socket: &TcpStream, most: u64) -> u64 {
    socket.set_nonblocking(true).unwrap();
    let chunk = vec![7; 64 << 10];
    let (mut total, mut last) = (0, Instant::now());
    while total < most && last.elapsed() < Duration::from_millis(500) {
        match socket.write(&chunk) {
            Ok(n) => {
                total += n as u64;
                last = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
    socket.set_nonblocking(false).unwrap();
    total
}

/// splice(2) of at most `count` bytes.
fn splice(from: &impl AsFd, to: &impl AsFd, count: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors live through the call, and no offsets are given.
    let moved = unsafe { libc::splice(from, none, to, none, count, 0) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[test]
fn what_is_read_in_time_takes_the_shortcut() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    for round in 1..=100_u64 {
        pair.client.write_all(&[round as u8; 100]).unwrap();
        assert_eq!(pair.read(100), [round as u8; 100]);
        pair.shortcuts.has_read(shortcut, round * 100).unwrap();
    }
    assert_eq!(pair.taken(shortcut), 10_000);
    // The other direction is TCP's.
    pair.server.write_all(b"answer").unwrap();
    let mut answer = [0; 6];
    pair.client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    pair.client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(pair.server.read(&mut [0]).unwrap(), 0);
}

#[test]
fn bytes_from_before_the_shortcut_are_not_overtaken() {
    let Some(mut pair) = Pair::new() else { return };
    pair.client.write_all(b"before ").unwrap();
    let shortcut = pair.open();
    // What was written before is still unread, so this must not take the shortcut.
    pair.client.write_all(b"between ").unwrap();
    assert_eq!(pair.taken(shortcut), 0);
    assert_eq!(pair.read(15), b"before between ");
    pair.shortcuts.has_read(shortcut, 15).unwrap();
    pair.client.write_all(b"after").unwrap();
    assert_eq!(pair.taken(shortcut), 5);
    assert_eq!(pair.read(5), b"after");
}

#[test]
fn a_reader_that_stops_stops_the_writer() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    let written = fill(&pair.client, MUCH);
    assert!(written < MUCH, "{written} bytes were taken");
    let taken = pair.taken(shortcut);
    assert!(taken > 0 && taken <= SHORTCUT_BYTES, "{taken}");
    // All of it is there, in order of the ways.
    let mut read = 0;
    let mut buffer = vec![0; 64 << 10];
    while read < written {
        read += pair.server.read(&mut buffer).unwrap() as u64;
    }
    assert_eq!(read, written);
}

/// Hazard 1. The programs are told that everything was read while nothing was.
#[test]
fn the_kernel_alone_bounds_nothing() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    let mut written = 0;
    let chunk = vec![7; 64 << 10];
    while written < MUCH {
        pair.client.write_all(&chunk).unwrap();
        written += chunk.len() as u64;
        pair.shortcuts.has_read(shortcut, written).unwrap();
    }
    assert_eq!(pair.taken(shortcut), MUCH);
}

/// Hazard 2. What came by the shortcut is not seen by splice(2), though poll(2) tells of it. We
/// never splice, but a client might: that is why answers have no shortcut.
#[test]
fn the_kernel_alone_hides_the_shortcut_from_splice() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    pair.client.write_all(b"hidden").unwrap();
    assert_eq!(pair.taken(shortcut), 6);
    let mut fds = [PollFd::new(pair.server.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    let (_out, into) = io::pipe().unwrap();
    pair.server.set_nonblocking(true).unwrap();
    let error = splice(&pair.server, &into, 6).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    pair.server.set_nonblocking(false).unwrap();
    assert_eq!(pair.read(6), b"hidden");
}

/// Hazard 3. The programs are told that what came by TCP has been read while it was not.
#[test]
fn the_kernel_alone_lets_the_shortcut_overtake() {
    let Some(mut pair) = Pair::new() else { return };
    pair.client.write_all(b"first ").unwrap();
    let shortcut = pair.open();
    pair.shortcuts.has_read(shortcut, 6).unwrap();
    pair.client.write_all(b"second ").unwrap();
    let mut read = Vec::new();
    while read.len() < 13 {
        let mut buffer = [0; 13];
        let n = pair.server.read(&mut buffer).unwrap();
        read.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(read, b"second first ");
}

/// Hazard 4, found on the way, of every socket that is in such a map: a read that blocks gives EAGAIN when anything
/// else than bytes wakes it, here the acknowledgement of the client's own end. Programs that wait
/// in epoll(7), Go's among them, expect that; others take it for an error.
#[test]
fn the_kernel_alone_ends_a_blocking_read() {
    let Some(mut pair) = Pair::new() else { return };
    // The end waits behind bytes for which there is no window.
    let written = fill(&pair.client, MUCH);
    pair.client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut client = pair.client.try_clone().unwrap();
    client.set_read_timeout(None).unwrap();
    let blocked = thread::spawn(move || client.read(&mut [0]));
    thread::sleep(Duration::from_millis(200));
    assert!(!blocked.is_finished());
    let mut buffer = vec![0; 64 << 10];
    let mut read = 0;
    loop {
        match pair.server.read(&mut buffer).unwrap() {
            0 => break,
            n => read += n as u64,
        }
    }
    assert_eq!(read, written);
    let ended = blocked.join().unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// What waits at the shortcut's end outlives the connection, as what TCP holds does. Kernels before
/// 5.15.3 threw it away here; the server notices by counting, and resets.
#[test]
fn what_waits_is_there_when_both_sides_have_ended() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    pair.server.shutdown(std::net::Shutdown::Write).unwrap();
    pair.client.write_all(b"last words").unwrap();
    assert_eq!(pair.taken(shortcut), 10);
    drop(pair.client);
    let mut rest = Vec::new();
    pair.server.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
}

/// The same where the client has ended in good order, and what we send afterwards is answered by a
/// reset.
#[test]
fn what_waits_is_there_after_a_reset() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    pair.client.write_all(b"last words").unwrap();
    assert_eq!(pair.taken(shortcut), 10);
    drop(pair.client);
    pair.server.write_all(b"too late").unwrap();
    thread::sleep(Duration::from_millis(50));
    let mut rest = [0; 10];
    pair.server.read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"last words");
}

/// A client may splice on its side: in both directions.
#[test]
fn a_client_that_splices_notices_nothing() {
    let Some(mut pair) = Pair::new() else { return };
    let shortcut = pair.open();
    let (out, mut into) = io::pipe().unwrap();
    into.write_all(b"request").unwrap();
    assert_eq!(splice(&out, &pair.client, 7).unwrap(), 7);
    assert_eq!(pair.read(7), b"request");
    pair.shortcuts.has_read(shortcut, 7).unwrap();
    pair.server.write_all(b"answer").unwrap();
    assert_eq!(splice(&pair.client, &into, 6).unwrap(), 6);
    let mut answer = [0; 6];
    (&out).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_shortcut_can_be_taken_back() {
    let Some(pair) = Pair::new() else { return };
    let links = |redirect: &Redirect| {
        let status = redirect.status().unwrap();
        (status[0].shortcut, status[0].links.len())
    };
    assert_eq!(links(&pair.redirect), (true, 6));
    let mut spec = pair.it.spec.clone();
    spec.shortcut = false;
    pair.redirect.attach(&spec).unwrap();
    assert_eq!(links(&pair.redirect), (false, 5));
    // A connection from then on has none.
    let Pair {
        mut shortcuts,
        _listeners,
        it,
        ..
    } = pair;
    let mut client: TcpStream = connect(&it.factory, at(V4)).unwrap().into();
    let (mut server, peer) = _listeners.0.accept().unwrap();
    let local = server.local_addr().unwrap();
    let shortcut = shortcuts.open_to(&server, peer, local).unwrap();
    client.write_all(b"by TCP").unwrap();
    let mut read = [0; 6];
    server.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"by TCP");
    assert_eq!(shortcuts.taken(shortcut).unwrap(), 0);
}

/// As on a kernel that can't: one of the maps is of a kind that the programs can't use.
#[test]
fn a_refused_shortcut_is_an_error_that_names_it() {
    let Some(it) = Attached::new() else { return };
    let maps = it.lab.pin().join("maps-v2");
    let other = MapData::from_pin(maps.join("HEARTBEATS")).unwrap();
    other.pin(maps.join("SHORTCUT_READERS")).unwrap();
    let mut spec = it.spec.clone();
    spec.shortcut = true;
    let error = it.redirect.attach(&spec).unwrap_err();
    assert!(matches!(error, RedirectError::Shortcut(_)), "{error:?}");
    assert!(error.to_string().contains("`shortcut`"), "{error}");
    // What was there goes on.
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    assert!(!it.redirect.status().unwrap()[0].shortcut);
}

#[test]
fn nothing_of_it_is_loaded_where_nobody_wants_it() {
    let Some(it) = Attached::new() else { return };
    assert!(it.redirect.shortcuts("test").is_err());
    let pins = std::fs::read_dir(it.lab.pin().join("maps-v2")).unwrap();
    let pinned = pins.filter(|pin| {
        let name = pin.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("SHORTCUT")
    });
    assert_eq!(pinned.count(), 0);
}

/// Not a test: what the leg alone costs, with nothing behind it. docs/adr/0020 has the
/// command, and what came of it.
#[test]
#[ignore = "measures, and asserts nothing of it"]
fn leg_alone() {
    let mut results = Leg::ALL.map(|leg| (leg, Vec::new()));
    for turn in 0..10 {
        for (leg, results) in &mut results {
            let Some(pair) = Pair::with(*leg != Leg::Tcp) else {
                return;
            };
            let result = measure(pair, *leg);
            // The first turn warms up.
            if turn > 0 {
                results.push(result);
            }
        }
    }
    for (leg, results) in results {
        let of = |index: usize| {
            let mut values: Vec<f64> = results.iter().map(|result| result[index]).collect();
            values.sort_by(f64::total_cmp);
            let (first, last) = (values[0], values[values.len() - 1]);
            format!("{:7.2} ({first:.2}..{last:.2})", values[values.len() / 2])
        };
        let [trip, trip_cpu, rate, bulk_cpu] = [0, 1, 2, 3].map(of);
        println!("{leg:?}: 100 B us {trip}  CPU us {trip_cpu}  MB/s {rate}  CPU s/GB {bulk_cpu}");
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leg {
    Tcp,
    /// As the server does it.
    Shortcut,
    /// As if telling what has been read cost nothing: as seldom as it can be.
    TellingFree,
    /// And answers the same way, which nobody may do: a client tells nothing.
    BothWays,
}

impl Leg {
    const ALL: [Self; 4] = [Self::Tcp, Self::Shortcut, Self::TellingFree, Self::BothWays];
}

/// Tells for a client what it would have read.
type Lie = aya::maps::HashMap<MapData, FlowKey, u64>;

/// Gives answers a shortcut too.
fn answers(pair: &Pair) -> (FlowKey, Lie) {
    let map = |name: &str| {
        let pinned = pair.it.lab.pin().join("maps-v2").join(name);
        Map::from_map_data(MapData::from_pin(pinned).unwrap()).unwrap()
    };
    let key = FlowKey {
        netns: pair.redirect.status().unwrap()[0].netns,
        client: pair.server.local_addr().unwrap().into(),
        listener: pair.peer.into(),
    };
    let writer = Writer {
        key,
        written: 0,
        on_shortcut: 0,
    };
    // SAFETY: `#[repr(C)]` of integers without padding.
    let writer: [u8; size_of::<Writer>()] = unsafe { std::mem::transmute(writer) };
    let mut written =
        SkStorage::<_, [u8; size_of::<Writer>()]>::try_from(map("SHORTCUT_WRITTEN")).unwrap();
    written.insert(&pair.server, writer, 0).unwrap();
    let mut taken = Lie::try_from(map("SHORTCUT_TAKEN")).unwrap();
    taken.insert(key, 0, 0).unwrap();
    let mut read = Lie::try_from(map("SHORTCUT_READ")).unwrap();
    read.insert(key, 0, 0).unwrap();
    for (name, socket) in [
        ("SHORTCUT_READERS", &pair.client),
        ("SHORTCUT_WRITERS", &pair.server),
    ] {
        let mut map = SockHash::<_, FlowKey>::try_from(map(name)).unwrap();
        map.insert(key, socket.as_raw_fd(), 0).unwrap();
    }
    (key, read)
}

/// Round trips of 100 bytes, then a gigabyte towards the server; each with its CPU time.
fn measure(mut pair: Pair, leg: Leg) -> [f64; 4] {
    const TRIPS: u64 = 20_000;
    const BYTES: u64 = 1 << 30;
    let key = pair.open();
    let mut lie = (leg == Leg::BothWays).then(|| answers(&pair));
    let mut client = pair.client.try_clone().unwrap();
    // A shortcut takes 256 KiB untold.
    let (each, each_in_bulk) = match leg {
        Leg::Tcp => (u64::MAX, u64::MAX),
        Leg::Shortcut => (1, 1),
        Leg::TellingFree | Leg::BothWays => (100_000, 128 << 10),
    };
    thread::scope(|scope| {
        let served = scope.spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            let (mut read, mut told) = (0, 0);
            let mut tell = |shortcuts: &mut Shortcuts, read: u64, each: u64| {
                if read - told >= each {
                    told = read;
                    shortcuts.has_read(key, read).unwrap();
                    if let Some((key, lie)) = &mut lie {
                        lie.insert(*key, read.saturating_sub(100), 0).unwrap();
                    }
                }
            };
            while read < TRIPS * 100 {
                pair.server.read_exact(&mut bytes[..100]).unwrap();
                read += 100;
                tell(&mut pair.shortcuts, read, each);
                pair.server.write_all(&bytes[..100]).unwrap();
            }
            while read < TRIPS * 100 + BYTES {
                read += pair.server.read(&mut bytes).unwrap() as u64;
                tell(&mut pair.shortcuts, read, each_in_bulk);
            }
            pair.server.write_all(b"!").unwrap();
        });
        let mut bytes = vec![7; 64 << 10];
        let (start, before) = (Instant::now(), cpu());
        for _ in 0..TRIPS {
            client.write_all(&bytes[..100]).unwrap();
            read_all(&mut client, &mut bytes[..100]);
        }
        let trip = start.elapsed().as_secs_f64() * 1e6 / TRIPS as f64;
        let trip_cpu = (cpu() - before) * 1e6 / TRIPS as f64;
        let (start, before) = (Instant::now(), cpu());
        for _ in 0..BYTES >> 16 {
            client.write_all(&bytes).unwrap();
        }
        read_all(&mut client, &mut bytes[..1]);
        let rate = BYTES as f64 / 1e6 / start.elapsed().as_secs_f64();
        let bulk_cpu = (cpu() - before) / (BYTES as f64 / 1e9);
        served.join().unwrap();
        [trip, trip_cpu, rate, bulk_cpu]
    })
}

/// Reads in spite of hazard 4.
fn read_all(socket: &mut TcpStream, mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        match socket.read(bytes) {
            Ok(0) => panic!("the end"),
            Ok(n) => bytes = &mut bytes[n..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Seconds of CPU time of this process.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
}
