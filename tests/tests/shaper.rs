//! The laboratory's paths do to packets what they are told.

use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use tunnel_tests::client;
use tunnel_tests::lab::shaper::{Direction, Impairment, Link, Shaper};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

/// Timeout of an answer: far beyond every delay here.
const PATIENCE: Duration = Duration::from_secs(2);
/// After so long without a datagram none is under way any more.
const QUIET: Duration = Duration::from_millis(300);

fn laboratory() -> Result<Lab> {
    Lab::without_connector(LabSpec::new(Programs::of_this_test()?))
}

/// Two UDP sockets with the path of worker 1 between them: at the router, and at the worker.
struct Ends {
    router: UdpSocket,
    worker: UdpSocket,
}

impl Ends {
    fn new(lab: &Lab) -> Result<Self> {
        let at = |netns: &lab::netns::Netns, address: IpAddr| {
            netns.enter(|| Ok(UdpSocket::bind((address, 0))?))
        };
        let router = at(&lab.router.netns, address::gateway(1).into())?;
        let worker = at(&lab.workers[0].netns, address::node(1).into())?;
        router.connect(worker.local_addr()?)?;
        worker.connect(router.local_addr()?)?;
        router.set_read_timeout(Some(PATIENCE))?;
        worker.set_read_timeout(Some(PATIENCE))?;
        // For whole bursts.
        SockRef::from(&worker).set_recv_buffer_size(4 << 20)?;
        Ok(Self { router, worker })
    }

    fn round_trip(&self) -> Result<Duration> {
        let (start, mut buffer) = (Instant::now(), [0; 8]);
        self.router.send(b"there")?;
        self.worker.recv(&mut buffer)?;
        self.worker.send(b"back")?;
        self.router.recv(&mut buffer)?;
        Ok(start.elapsed())
    }

    /// Sends numbered datagrams to the worker, and gives the numbers in the order of arrival.
    fn burst(&self, count: u32, size: usize) -> Result<Vec<u32>> {
        let mut datagram = vec![0; size];
        for number in 0..count {
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            self.router.send(&datagram)?;
        }
        self.worker.set_read_timeout(Some(QUIET))?;
        let mut arrived = Vec::new();
        while let Ok(length) = self.worker.recv(&mut datagram) {
            ensure!(length == size, "{length} bytes arrived of {size}");
            let number = datagram.first_chunk().context("no number")?;
            arrived.push(u32::from_be_bytes(*number));
        }
        self.worker.set_read_timeout(Some(PATIENCE))?;
        Ok(arrived)
    }
}

/// Effects of delay, loss, reordering and the largest packet on UDP.
#[test]
fn datagrams_meet_what_is_configured() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory()?;
    let shaper = lab.shape(Link::Worker(1))?;
    let ends = Ends::new(&lab)?;

    let mut plain = (0..20)
        .map(|_| ends.round_trip())
        .collect::<Result<Vec<_>>>()?;
    shaper.set(Impairment::of_rtt(Duration::from_millis(80)));
    let mut far = (0..5)
        .map(|_| ends.round_trip())
        .collect::<Result<Vec<_>>>()?;
    let (plain, far) = (client::median(&mut plain), client::median(&mut far));
    println!("round trips: {plain:?}, and {far:?} where 80 ms are configured");
    ensure!(far >= Duration::from_millis(80), "{far:?}");
    ensure!(far < Duration::from_millis(800), "{far:?}");

    shaper.set(Impairment {
        loss: 0.2,
        ..Impairment::default()
    });
    let arrived = ends.burst(2000, 100)?;
    ensure!((1400..1800).contains(&arrived.len()), "{}", arrived.len());
    ensure!(arrived.is_sorted(), "lost, and reordered too");

    shaper.set(Impairment {
        reorder: 0.3,
        reorder_by: Duration::from_millis(20),
        ..Impairment::default()
    });
    let mut arrived = ends.burst(500, 100)?;
    let overtaken = arrived.windows(2).filter(|pair| pair[0] > pair[1]).count();
    ensure!(overtaken > 20, "{overtaken} were overtaken");
    arrived.sort_unstable();
    ensure!(arrived.iter().copied().eq(0..500), "not all arrived");

    shaper.set_one(
        Direction::Outward,
        Impairment {
            mtu: Some(1300),
            ..Impairment::default()
        },
    );
    // 20 bytes for IP, 8 for UDP.
    assert_eq!(ends.burst(3, 1300 - 28)?.len(), 3);
    assert_eq!(ends.burst(3, 1301 - 28)?.len(), 0);
    assert_eq!(shaper.counts(Direction::Outward).too_large, 3);
    Ok(())
}

fn transfers(lab: &Lab, address: IpAddr, bytes: u64) -> Result<[client::Transfer; 2]> {
    lab.router.netns.enter(|| {
        let dial = |it: Behaviour| TcpStream::connect(SocketAddr::new(address, it.port()));
        let down = client::download(dial(Behaviour::Source)?, bytes)?;
        let finish = |stream: &TcpStream| stream.shutdown(Shutdown::Write);
        let up = client::upload(dial(Behaviour::Sink)?, bytes, finish)?;
        Ok([down, up])
    })
}

/// The kernel's TCP passes too, in both families, and is held to the rate of the bottleneck.
#[test]
fn tcp_keeps_to_the_rate() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory()?;
    let shaper = lab.shape(Link::Worker(1))?;
    let worker = &lab.workers[0];
    for address in worker
        .node_addresses()
        .into_iter()
        .chain(worker.pod_addresses())
    {
        let fast = transfers(&lab, address, 20_000_000)?;
        let [down, up] = fast.map(|transfer| transfer.megabytes_per_second() * 8.0);
        println!("{address}: {down:.0} and {up:.0} Mbit/s without limits");
    }
    shaper.set(Impairment {
        rate: Some(16_000_000),
        queue: 50_000,
        ..Impairment::of_rtt(Duration::from_millis(5))
    });
    for transfer in transfers(&lab, address::node(1).into(), 3_000_000)? {
        let rate = transfer.megabytes_per_second() * 8.0;
        println!("{rate:.1} Mbit/s of 16");
        // The queue is emptied after the last byte has been taken in.
        ensure!(rate < 16.5, "faster than the path");
        ensure!(rate > 3.0, "much slower than the path");
    }
    Ok(())
}

/// The link to the control plane can be shaped as well; and with the path goes the link, and with
/// the laboratory everything.
#[test]
fn a_path_leaves_nothing_behind() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory()?;
    let shaper = lab.shape(Link::ControlPlane)?;
    shaper.set(Impairment::of_rtt(Duration::from_millis(30)));
    let server = SocketAddr::from((address::server(1), address::TUNNEL_PORT));
    let listener = lab
        .control_plane
        .netns
        .enter(|| Ok(UdpSocket::bind(server)?))?;
    listener.set_read_timeout(Some(PATIENCE))?;
    let socket = lab.workers[0]
        .netns
        .enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let start = Instant::now();
    socket.send_to(b"one", server)?;
    let (_, from) = listener.recv_from(&mut [0; 8])?;
    ensure!(start.elapsed() >= Duration::from_millis(15));
    assert_eq!(from.ip(), IpAddr::from(address::ROUTER), "not masqueraded");
    has_link(&lab, "cp", true)?;
    drop(shaper);
    has_link(&lab, "cp", false)?;

    let shaper: Shaper = lab.shape(Link::Worker(1))?;
    let netns = lab.workers[0].netns.path();
    // The namespace goes though the path is still there.
    drop(lab);
    ensure!(!netns.exists());
    drop(shaper);
    Ok(())
}

fn has_link(lab: &Lab, name: &str, expected: bool) -> Result<()> {
    let found = lab.router.netns.ip(&format!("link show {name}\n")).is_ok();
    ensure!(found == expected, "link {name}: {found}");
    Ok(())
}
