//! Strangers at every port: noise, heads without end, and connections that do nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::{self, address};

use crate::scene::{SOON, Scene, echo};

/// Idle connections that a stranger holds to one port.
const IDLE: usize = 300;
/// Input that no HTTP/1.1 server should accept as a request.
const NONSENSE: [&[u8]; 4] = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\0\0\0\0\0\0",
    b"\0\xff\0\xff\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT\r\n\r\n",
];

/// Numbers that look random and are the same in each run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        // Marsaglia's xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Noise, packets that look like a client's first, and packets of connections that never were.
#[test]
fn noise_at_the_tunnels_port() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::new(|_| Ok(()))?;
    let server = scene.tunnel();
    let socket = scene.lab.workers[1].netns.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(server)?;
        Ok(socket)
    })?;
    let mut noise = Noise(0x2545_f491_4f6c_dd1d);
    for round in 0..12_000 {
        let mut packet = match round % 3 {
            0 => {
                let length = 1 + noise.next() as usize % 1400;
                noise.bytes(length)
            }
            // Initial, version 1, both connection ids of 8 bytes, no token (RFC 9000 s. 17.2.2).
            1 => [
                &[0xc3, 0, 0, 0, 1, 8][..],
                &noise.bytes(8),
                &[8],
                &noise.bytes(8),
                &[0, 0x44, 0x99],
                &noise.bytes(1200),
            ]
            .concat(),
            // Short header with a connection id of the server's layout and another key.
            _ => noise.bytes(120),
        };
        if round % 3 == 2 {
            packet[..3].copy_from_slice(&[0x40, 1, 0]);
        }
        // A full buffer of ours or an answer of ICMP is no matter.
        let _ = socket.send(&packet);
        if round % 100 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    scene.unharmed()
}

/// Health and admin answer others while one stranger holds hundreds of connections that ask for
/// nothing, and end those.
#[test]
fn idle_and_senseless_http_clients() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let health = scene.tunnel();
    let admin = scene.server().admin;
    let before = scene.server().open_files()?;
    let strangers = [
        (health, scene.lab.workers[1].netns.clone()),
        (admin, scene.lab.control_plane.netns.clone()),
    ];
    let mut idle = Vec::new();
    for (port, netns) in strangers {
        let dial = || -> Result<TcpStream> {
            let stream = netns.enter(|| Ok(TcpStream::connect_timeout(&port, SOON)?))?;
            stream.set_read_timeout(Some(SOON))?;
            Ok(stream)
        };
        for nonsense in NONSENSE {
            let answer = exchange(dial()?, nonsense)?;
            ensure!(
                !answer.starts_with("HTTP/1.1 2"),
                "{port} took {nonsense:?}: {answer}"
            );
        }
        let endless = [b"GET /readyz HTTP/1.1\r\nX: ", &vec![b'x'; 1 << 20][..]].concat();
        let answer = exchange(dial()?, &endless)?;
        ensure!(!answer.starts_with("HTTP/1.1 2"), "{port}: {answer}");

        for _ in 0..IDLE {
            let mut stream = dial()?;
            stream.write_all(b"GET /readyz HTT")?;
            idle.push(stream);
        }
        let answer = exchange(dial()?, b"GET /readyz HTTP/1.0\r\n\r\n")?;
        ensure!(answer.starts_with("HTTP/1.0 200"), "{port}: {answer}");
    }
    eventually(2 * SOON, || {
        let now = scene.lab.control_plane.servers[0].daemon.open_files()?;
        ensure!(now < before + 50, "{now} descriptors, {before} before");
        Ok(())
    })
    .context("connections that ask for nothing are kept")?;
    drop(idle);
    scene.unharmed()
}

/// The CONNECT socket refuses what is no CONNECT with a status, a head without end as well, and a
/// head that never ends in time; bytes right behind the head belong to the tunnel.
#[test]
fn senseless_connect_clients() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let sockets = scene.lab.control_plane.servers[0].sockets.clone();
    let dial = || -> Result<UnixStream> {
        let stream = UnixStream::connect(&sockets.connect_unix)?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    };
    let status = |request: &[u8]| -> Result<String> {
        let answer = exchange(dial()?, request)?;
        Ok(answer.lines().next().unwrap_or_default().to_owned())
    };
    // They begin now and are looked at in the end.
    let idle: Vec<_> = (0..IDLE).map(|_| dial()).collect::<Result<_>>()?;
    for mut stream in &idle {
        stream.write_all(b"CONNECT 10.99.")?;
    }
    let begun = Instant::now();

    for nonsense in NONSENSE {
        let status = status(nonsense)?;
        ensure!(
            status.starts_with("HTTP/1.1 4") || status.starts_with("HTTP/1.1 5"),
            "{status}"
        );
    }
    let endless = [b"CONNECT a:1 HTTP/1.1\r\nX: ", &vec![b'x'; 1 << 20][..]].concat();
    assert_eq!(status(&endless)?.split(' ').nth(1), Some("431"));
    assert_eq!(
        status(b"GET http://10.99.1.2:7001/ HTTP/1.1\r\nHost: x\r\n\r\n")?
            .split(' ')
            .nth(1),
        Some("405")
    );

    let mut early = dial()?;
    early.write_all(format!("CONNECT {} HTTP/1.1\r\n\r\nhello", echo()).as_bytes())?;
    let mut answer = [0; b"HTTP/1.1 200 Connection Established\r\n\r\nhello".len()];
    early.read_exact(&mut answer)?;
    assert!(answer.ends_with(b"\r\n\r\nhello"), "{answer:?}");

    // TLS: noise, and silence.
    let netns = scene.lab.control_plane.netns.clone();
    let tcp = || -> Result<TcpStream> {
        let stream = netns.enter(|| Ok(TcpStream::connect(sockets.connect_tcp)?))?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(stream)
    };
    let mut silent = tcp()?;
    let mut noisy = tcp()?;
    noisy.write_all(b"CONNECT 10.99.1.2:7001 HTTP/1.1\r\n\r\n")?;
    let _ = noisy.read_to_end(&mut Vec::new());
    let server = scene.server();
    server.wait_log(
        SOON,
        0,
        &["WARN", "frontend handshake failed", "InvalidContentType"],
    )?;
    ensure!(matches!(silent.read(&mut [0]), Ok(0)) || begun.elapsed() < SOON);
    server.wait_log(
        SOON,
        0,
        &["WARN", "frontend handshake not finished in time"],
    )?;

    for mut stream in idle {
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    scene.unharmed()
}

/// A connection made directly to the redirect's listener is reset before a byte is read, and the
/// log says so.
#[test]
fn the_redirects_listener_is_no_way_in() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|_| Ok(()))?;
    let netns = scene.lab.control_plane.netns.clone();
    for listener in ["127.0.0.1:8137", "[::1]:8137"] {
        let listener: SocketAddr = listener.parse()?;
        for _ in 0..50 {
            let mut stream = netns.enter(|| Ok(TcpStream::connect(listener)?))?;
            stream.set_read_timeout(Some(SOON))?;
            let request = format!("CONNECT {} HTTP/1.1\r\n\r\n", echo());
            // Whichever call comes after the reset is told of it.
            let told = stream.write_all(request.as_bytes());
            let told = told.and_then(|()| stream.read(&mut [0]));
            let error = told.err().context("ended in order")?;
            assert_eq!(
                error.kind(),
                ErrorKind::ConnectionReset,
                "{listener}: {error}"
            );
        }
    }
    let pieces = [
        "WARN",
        "connection without an origin is reset",
        "kube-apiserver",
    ];
    scene.server().wait_log(SOON, 0, &pieces)?;
    assert_eq!(scene.metric("cpc_redirect_origins_missing_total")?, 100.0);
    // Nor does it lead anywhere for the captured program itself.
    let port = scene.lab.control_plane.as_apiserver(|| {
        let stream = TcpStream::connect((address::node(1), 7001))?;
        Ok(stream.peer_addr()?.port())
    })?;
    assert_eq!(port, 7001, "the redirect itself works");
    scene.unharmed()
}

/// Sends, and reads to the end, however it comes.
fn exchange(mut stream: impl Read + Write, request: &[u8]) -> Result<String> {
    // It may be refused before it is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error).context("no answer"),
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}
