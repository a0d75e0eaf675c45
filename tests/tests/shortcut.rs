//! The shortcut past TCP on loopback (`shortcut` of an attachment), through whole programs: what is
//! promised without it holds with it, and what it wins.
//!
//! One server has two attachments, for two control groups of one namespace: one without the
//! shortcut and one with it. So both are measured in one run, by turns.
//!
//! Clients wait in poll(2), as Go's do. Others can't have the shortcut: `tunnel-user/tests/redirect`
//! shows why.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tunnel_tests::client;
use tunnel_tests::lab::cgroup::Cgroup;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::pattern;
use tunnel_tests::target::Behaviour;

const PATIENCE: Duration = Duration::from_secs(20);
/// More than all windows between a client and a target that has stopped: 6 MiB and 4 MiB on
/// loopback, a stream's, and once more on the worker's side.
const TOO_MUCH: u64 = 64 << 20;

/// A laboratory whose second attachment has the shortcut.
struct Laboratory {
    lab: Lab,
    short: Cgroup,
}

impl Laboratory {
    fn up() -> Result<Option<Self>> {
        if !lab::available()? {
            return Ok(None);
        }
        let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
        lab.configure_connector()?;
        let short = lab.cgroup("short")?;
        let server = &mut lab.control_plane.servers[0].daemon;
        server.configure(|config| {
            let attachments = &mut config["redirect"]["attachments"];
            let mut second = attachments[0].clone();
            second["name"] = "short".into();
            second["cgroup"] = json!(short.path());
            second["listen"] = json!(["127.0.0.1:8138", "[::1]:8138"]);
            second["shortcut"] = true.into();
            if let Some(list) = attachments.as_array_mut() {
                list.push(second);
            }
        })?;
        lab.start_configured()?;
        Ok(Some(Self { lab, short }))
    }

    /// Connects with the shortcut or without it.
    fn connect(&self, short: bool, to: Behaviour) -> Result<Client> {
        let control_plane = &self.lab.control_plane;
        let cgroup = if short {
            &self.short
        } else {
            &control_plane.apiserver
        };
        let address: IpAddr = address::node(1).into();
        let to = SocketAddr::new(address, to.port());
        let stream = cgroup.join(|| control_plane.netns.enter(|| Ok(TcpStream::connect(to)?)))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Client(stream))
    }

    /// What `cpc redirect status` says.
    fn status(&self, arguments: &[&str]) -> Result<String> {
        let mut cpc = Command::new(Programs::of_this_test()?.cpc);
        cpc.args(["redirect", "status", "--config"])
            .arg(self.lab.control_plane.servers[0].daemon.config_file())
            .args(arguments);
        let output = cpc.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// CPU time of server and agent, and of this process.
    fn cpu(&self) -> Result<Duration> {
        let server = &self.lab.control_plane.servers[0].daemon;
        let agent = self.lab.workers[0].agent.as_ref().context("no agent")?;
        let own = getrusage(UsageWho::RUSAGE_SELF)?;
        let own = own.user_time() + own.system_time();
        let others = [server, agent]
            .map(|daemon| of_process(daemon.pid().context("it does not run")?))
            .into_iter()
            .sum::<Result<Duration>>()?;
        Ok(others + Duration::from_micros(own.num_microseconds().unsigned_abs()))
    }
}

/// A socket that never blocks: who uses it waits until it is ready.
struct Client(TcpStream);

impl Client {
    fn wait_for<T>(
        &self,
        event: PollFlags,
        mut attempt: impl FnMut(&TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match attempt(&self.0) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            let mut fds = [PollFd::new(self.0.as_fd(), event)];
            let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, patience)? == 0 {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }

    /// Moves `count` bytes by splice(2), one end of which is this socket.
    fn splice(
        &self,
        event: PollFlags,
        from: &impl AsFd,
        to: &impl AsFd,
        mut count: usize,
    ) -> io::Result<()> {
        let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
        let none = std::ptr::null_mut();
        while count > 0 {
            let moved = self.wait_for(event, |_| {
                // SAFETY: both descriptors live through the call, and no offsets are given.
                let moved =
                    unsafe { libc::splice(from, none, to, none, count, libc::SPLICE_F_NONBLOCK) };
                usize::try_from(moved).map_err(|_| io::Error::last_os_error())
            })?;
            if moved == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            count -= moved;
        }
        Ok(())
    }

    /// Ends its half.
    fn finish(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }
}

impl Read for &Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLIN, |mut socket| socket.read(buffer))
    }
}

impl Write for &Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLOUT, |mut socket| socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// CPU time of all threads of a process (proc_pid_schedstat(5)), in nanoseconds and so finer than
/// the ticks of its status.
fn of_process(pid: Pid) -> Result<Duration> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let ran = stat.split(' ').next().context("an empty schedstat")?;
        total += ran.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}

/// Without it nothing of it is seen; with it the status says so.
#[test]
fn the_status_tells_who_has_it() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    let status: Value = serde_json::from_str(&it.status(&["--json"])?)?;
    for (name, on) in [("kube-apiserver", false), ("short", true)] {
        let all = status.as_array().context("no list")?;
        let attachment = all.iter().find(|attachment| attachment["name"] == name);
        let attachment = attachment.context("no such attachment")?;
        assert_eq!(attachment["shortcut"], on, "{attachment}");
        let link = &attachment["links"]["shortcut_begin"]["state"];
        assert_eq!(link == "attached", on, "{attachment}");
    }
    let text = it.status(&[])?;
    assert_eq!(text.matches("shortcut is on").count(), 1, "{text}");
    let log = it.lab.control_plane.servers[0].daemon.log();
    let warnings = log
        .lines()
        .filter(|line| line.contains("the shortcut past TCP"));
    assert_eq!(warnings.count(), 1, "{log}");
    Ok(())
}

/// Bytes do take it: TCP has seen next to nothing of what a client with it has sent.
#[test]
fn what_a_client_sends_is_not_in_its_tcp() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    for (short, least, most) in [(false, 99_999, 100_000), (true, 0, 50_000)] {
        let stream = it.connect(short, Behaviour::Echo)?;
        hundred_bytes(&stream, 1000)?;
        let acknowledged = acknowledged(&stream.0)?;
        ensure!(
            (least..=most).contains(&acknowledged),
            "{acknowledged} bytes, shortcut: {short}"
        );
    }
    Ok(())
}

/// Bytes that TCP has sent and its peer has acknowledged (tcp(7), `TCP_INFO`); the handshake counts
/// as one in some kernels.
fn acknowledged(socket: &TcpStream) -> Result<u64> {
    /// Where `tcpi_bytes_acked` lies in `struct tcp_info`.
    const BYTES_ACKED: usize = 120;
    let mut info = [0_u64; BYTES_ACKED / 8 + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, to a place that lives through the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(done == 0, "{}", io::Error::last_os_error());
    Ok(info[BYTES_ACKED / 8].saturating_sub(1))
}

/// Hazard 3, reordering: clients that write at once and never wait, in pieces of all sizes, so that
/// their bytes arrive before the server has accepted, and change ways many times.
#[test]
fn no_byte_overtakes_another() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..8_u64)
            .map(|client| {
                let connections: Result<Vec<_>> =
                    (0..25).map(|_| it.connect(true, Behaviour::Sink)).collect();
                connections.map(|connections| {
                    scope.spawn(move || {
                        for (n, connection) in (0..).zip(connections) {
                            upload_in_pieces(&connection, client * 100 + n)?;
                        }
                        Ok::<_, anyhow::Error>(())
                    })
                })
            })
            .collect::<Result<_>>()?;
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        Ok(())
    })
}

/// Sends about a megabyte in pieces from 1 byte to 64 KiB with pauses in between, and has the sink
/// compare.
fn upload_in_pieces(mut stream: &Client, seed: u64) -> Result<()> {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let (mut sent, mut hasher) = (0, crc32fast::Hasher::new());
    while sent < 1 << 20 {
        let most = [16, 1000, 64 << 10][next(3) as usize];
        let mut piece = vec![0; 1 + next(most) as usize];
        pattern::fill(sent, &mut piece);
        stream
            .write_all(&piece)
            .with_context(|| format!("seed {seed}, after {sent}"))?;
        hasher.update(&piece);
        sent += piece.len() as u64;
        if next(4) == 0 {
            thread::sleep(Duration::from_micros(next(2000)));
        }
    }
    stream.finish()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let expected = format!("{sent} {:08x}\n", hasher.finalize());
    ensure!(answer == expected, "seed {seed}: {answer} for {expected}");
    Ok(())
}

/// Hazard 1, back-pressure: a target that never reads stops the client, after as many bytes as
/// without the shortcut, and a little.
#[test]
fn a_target_that_stops_stops_the_client() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    for short in [false, true] {
        let mut stream = &it.connect(short, Behaviour::Stuck)?.0;
        let chunk = vec![0; 64 << 10];
        let (mut taken, mut last) = (0, Instant::now());
        while last.elapsed() < Duration::from_secs(2) {
            match stream.write(&chunk) {
                Ok(n) => (taken, last) = (taken + n as u64, Instant::now()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(e.into()),
            }
            if taken >= TOO_MUCH {
                bail!("{taken} bytes were taken, shortcut: {short}");
            }
        }
        eprintln!("shortcut {short}: {taken} bytes were taken before the client had to wait");
    }
    Ok(())
}

/// Hazard 2, splice(2): a client that moves bytes between pipes and its socket, as Go's `io.Copy`
/// does between two sockets, has them all arrive, both ways.
#[test]
fn a_client_may_splice() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    let stream = it.connect(true, Behaviour::Echo)?;
    let mut sent = 0;
    for round in 0..200_u64 {
        let mut bytes = vec![0; 1 + (round * 331 % 60_000) as usize];
        pattern::fill(sent, &mut bytes);
        sent += bytes.len() as u64;
        // A pipe holds 64 KiB.
        let (pipe, mut into) = io::pipe()?;
        into.write_all(&bytes)?;
        stream.splice(PollFlags::POLLOUT, &pipe, &stream.0, bytes.len())?;
        let (mut pipe, into) = io::pipe()?;
        stream
            .splice(PollFlags::POLLIN, &stream.0, &into, bytes.len())
            .with_context(|| format!("round {round}"))?;
        let mut received = vec![0; bytes.len()];
        pipe.read_exact(&mut received)?;
        ensure!(received == bytes, "round {round}");
    }
    Ok(())
}

/// The end of a connection is as without it: everything that was sent before arrives, whoever ends
/// first; nothing is taken for a loss that is none.
#[test]
fn ends_are_as_without_it() -> Result<()> {
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    for round in 0..50_u64 {
        let stream = it.connect(true, Behaviour::HalfClose)?;
        let mut stream = &stream;
        let count = 1 + (round * 7919) % 300_000;
        client::send(stream, count)?;
        stream.finish()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer == format!("{count} bytes\n"), "{answer} of {count}");

        let stream = it.connect(true, Behaviour::Source)?;
        client::download(&stream, count)?;

        let stream = it.connect(true, Behaviour::Reset)?;
        let mut stream = &stream;
        stream.write_all(b"x")?;
        let error = stream.read(&mut [0]).err().context("a clean end")?;
        ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    }
    let log = it.lab.control_plane.servers[0].daemon.log();
    ensure!(!log.contains("were lost on the shortcut"), "{log}");
    Ok(())
}

/// Not a test: what the shortcut wins, by turns without and with it. docs/adr/0020 has the
/// command, and what came of it.
#[test]
#[ignore = "measures, and asserts nothing of it"]
fn on_against_off() -> Result<()> {
    const TURNS: usize = 9;
    const BYTES: u64 = 256 << 20;
    const ROUND_TRIPS: usize = 5000;
    let Some(it) = Laboratory::up()? else {
        return Ok(());
    };
    let mut results: Vec<(bool, &str, f64, f64)> = Vec::new();
    for turn in 0..=TURNS {
        for short in [turn % 2 == 0, turn % 2 != 0] {
            let gigabytes = BYTES as f64 / 1e9;
            let stream = it.connect(short, Behaviour::Sink)?;
            let cpu = it.cpu()?;
            let up = client::upload(&stream, BYTES, |stream| stream.finish())?;
            let up_cpu = (it.cpu()? - cpu).as_secs_f64() / gigabytes;

            let stream = it.connect(short, Behaviour::Source)?;
            let cpu = it.cpu()?;
            let down = client::download(&stream, BYTES)?;
            let down_cpu = (it.cpu()? - cpu).as_secs_f64() / gigabytes;

            let stream = it.connect(short, Behaviour::Echo)?;
            let cpu = it.cpu()?;
            let mut trips = hundred_bytes(&stream, ROUND_TRIPS)?;
            let trip_cpu = (it.cpu()? - cpu).as_secs_f64() * 1e6 / ROUND_TRIPS as f64;
            let trip = client::median(&mut trips).as_secs_f64() * 1e6;
            // The first turn warms up.
            if turn > 0 {
                results.push((
                    short,
                    "up MB/s, CPU s/GB",
                    up.megabytes_per_second(),
                    up_cpu,
                ));
                results.push((
                    short,
                    "down MB/s, CPU s/GB",
                    down.megabytes_per_second(),
                    down_cpu,
                ));
                results.push((short, "100 B p50 us, CPU us", trip, trip_cpu));
            }
        }
    }
    for what in [
        "up MB/s, CPU s/GB",
        "down MB/s, CPU s/GB",
        "100 B p50 us, CPU us",
    ] {
        for short in [false, true] {
            let of = |value: fn(&(bool, &str, f64, f64)) -> f64| {
                let chosen = results.iter().filter(|r| r.0 == short && r.1 == what);
                let mut values: Vec<_> = chosen.map(value).collect();
                values.sort_by(f64::total_cmp);
                let middle = values[values.len() / 2];
                format!(
                    "{middle:.2} ({:.2}..{:.2})",
                    values[0],
                    values[values.len() - 1]
                )
            };
            println!(
                "{what:22} shortcut {short:5}: {}  {}",
                of(|r| r.2),
                of(|r| r.3)
            );
        }
    }
    Ok(())
}

/// Round trips of 100 bytes.
fn hundred_bytes(mut stream: &Client, count: usize) -> Result<Vec<Duration>> {
    let mut bytes = [7; 100];
    (0..count)
        .map(|_| {
            let start = Instant::now();
            stream.write_all(&bytes)?;
            stream.read_exact(&mut bytes)?;
            Ok(start.elapsed())
        })
        .collect()
}
