//! OpenVPN, which carries packets: over UDP, with the connector's cipher, without its kernel module.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{Running, Start};
use crate::bench::load::Dial;
use crate::bench::target;
use crate::lab::config::ConnectorPki;

/// The two ends of the virtual wire.
const ENDS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 98, 0, 1), Ipv4Addr::new(10, 98, 0, 2)];
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/sbin"];

fn program() -> Option<std::path::PathBuf> {
    let mut folders = FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join("openvpn"));
    folders.find(|program| program.exists())
}

pub(super) fn missing() -> Option<String> {
    match program() {
        None => Some("openvpn is not installed".to_owned()),
        Some(_) if !Path::new("/dev/net/tun").exists() => Some("no /dev/net/tun".to_owned()),
        Some(_) => None,
    }
}

pub(super) fn start(place: &Start<'_>) -> Result<Running> {
    let pki = ConnectorPki::create(&place.programs.cpc, place.folder.join("pki"))?;
    let text = |path: &Path| path.display().to_string();
    let (server, agent) = (place.folder.join("server"), place.folder.join("agent"));
    pki.run("server", &["--id", "s1", "--out", &text(&server)])?;
    pki.run("agent", &["--node", "w1", "--out", &text(&agent)])?;
    let mut running = Running::new(Dial::Tcp(SocketAddr::from((ENDS[1], target::PORT))));
    let port = place.port(27_000).to_string();
    let command = |folder: &Path, name: &str, own: Ipv4Addr, other: Ipv4Addr| {
        let mut command = Command::new(program().unwrap_or_default());
        command.current_dir(folder);
        command.args([
            "--dev",
            "tun",
            "--proto",
            "udp",
            "--disable-dco",
            "--verb",
            "1",
        ]);
        command.args(["--data-ciphers", "AES-128-GCM"]);
        command.args(["--ca", "ca.crt", "--cert", &format!("{name}.crt")]);
        command.args(["--key", &format!("{name}.key")]);
        command.args(["--ifconfig", &own.to_string(), &other.to_string()]);
        command
    };
    let mut listening = command(&server, "server", ENDS[0], ENDS[1]);
    listening.args(["--tls-server", "--dh", "none", "--lport", &port]);
    running.processes[0].push(place.server(&mut listening)?);
    let mut dialling = command(&agent, "agent", ENDS[1], ENDS[0]);
    dialling.args(["--tls-client", "--nobind", "--rport", &port, "--remote"]);
    dialling.arg(place.scene.server().to_string());
    running.processes[1].push(place.agent(&mut dialling)?);
    Ok(running)
}
