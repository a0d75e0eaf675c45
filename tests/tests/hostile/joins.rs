//! The join listener in a flood: connections that say nothing, and tokens that are none.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tunnel_proto::certificate::Join;
use tunnel_proto::join::{self, Reader};
use tunnel_tests::lab::{self, address};

use crate::peer;
use crate::scene::{SOON, Scene};

/// Source of the flood: an address beside the workers' common one.
const SOURCE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 66);
const JOIN_PORT: u16 = 8138;
/// Wrong tokens; more than the lines that one source may cause.
const TOKENS: usize = 150;
/// Silent connections; more than there are places.
const SILENT: usize = 400;
/// Lines of one kind about one source: 100 at once, and 12 a minute.
const LINES: usize = 130;

fn desk() -> SocketAddr {
    (address::server(1), JOIN_PORT).into()
}

fn connect() -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((SOURCE, 0)).into())?;
    socket.connect(&desk().into())?;
    socket.set_read_timeout(Some(SOON))?;
    Ok(socket.into())
}

/// Asks with a token that has the form of one; what is answered.
fn ask(tls: &Arc<ClientConfig>, csr: &[u8]) -> Result<String> {
    let name = ServerName::try_from("cpc.invalid")?;
    let session = ClientConnection::new(tls.clone(), name)?;
    let mut session = StreamOwned::new(session, connect()?);
    let asked = join::request(&Join {
        token: format!("{}.{}", "0".repeat(8), "0".repeat(32)),
        node: "w9".into(),
        addresses: vec![IpAddr::from([10, 99, 9, 9])],
        csr: csr.to_vec(),
    })?;
    session.write_all(&asked)?;
    let (mut reader, mut room) = (Reader::default(), [0; 4096]);
    loop {
        let read = session.read(&mut room)?;
        ensure!(read > 0, "no answer");
        if let Some(answer) = reader.answer(&room[..read])? {
            return answer.err().context("it was let in");
        }
    }
}

/// The server refuses both floods in a bounded number of lines, and a worker from elsewhere joins meanwhile.
#[test]
fn a_flood_at_the_join_listener_keeps_nobody_out() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|lab| {
        let ca = lab.folder().join("pki");
        let own = format!("address add {SOURCE}/32 dev lo\n");
        lab.control_plane.netns.ip(&own)?;
        let server = &mut lab.control_plane.servers[0].daemon;
        server.configure(|config| config["join"] = json!({"listen": desk(), "ca": ca}))
    })?;
    let tls = Arc::new(peer::client_tls(None, join::ALPN)?);
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?;
    let netns = scene.lab.control_plane.netns.clone();
    netns.enter(|| {
        for _ in 0..TOKENS {
            let told = ask(&tls, csr.der())?;
            ensure!(told.contains("the token is unknown"), "{told}");
        }
        Ok(())
    })?;
    let silent = netns.enter(|| (0..SILENT).map(|_| connect()).collect::<Result<Vec<_>>>())?;
    scene
        .server()
        .wait_log(SOON, 0, &["WARN", "join listener is dropped"])?;

    let cpc = scene.lab.programs().cpc.clone();
    let mut create = Command::new(&cpc);
    let config = scene.server().config_file();
    create.args([
        "token",
        "create",
        "--node",
        "w7",
        "--ip",
        "10.99.7.7",
        "--server",
    ]);
    create.arg(desk().to_string()).arg("--config").arg(config);
    let created = String::from_utf8(create.output()?.stdout)?;
    let arguments = created.trim().strip_prefix("cpc ").context("no token")?;
    let mut honest = scene.lab.workers[1].netns.command(&cpc)?;
    honest.args(arguments.split(' ')).arg("--out");
    let joined = honest.arg(scene.folder("w7")).output()?;
    ensure!(joined.status.success(), "{joined:?}");
    drop(silent);

    let log = scene.server().log();
    for kind in [
        "no certificate issued",
        "join listener is dropped",
        "join failed",
    ] {
        let lines = log.lines().filter(|line| line.contains(kind)).count();
        ensure!(lines <= LINES, "{lines} lines {kind:?}");
    }
    let dropped = scene.metric("cpc_join_handshakes_failed_total{why=\"source_share\"}")?;
    ensure!(dropped >= (SILENT / 4) as f64, "{dropped} were dropped");
    scene.unharmed()
}
