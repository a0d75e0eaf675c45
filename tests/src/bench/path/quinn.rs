//! The yardstick: `tests/benches/stock_quinn`.

use std::process::Command;

use anyhow::Result;

use super::{Running, Start};
use crate::bench::load::Dial;
use crate::bench::scene::{Wire, local};
use crate::bench::target;

/// The most that quinn looks for on the usual path: its own default.
const MTU: &str = "1452";
/// Packet size on a larger wire: above it, ten packets pass 64 KiB and can't be sent at once.
const JUMBO: &str = "6500";

pub(super) fn start(place: &Start<'_>, chunks: bool) -> Result<Running> {
    let mut running = Running::new(Dial::Tcp(local(place.port(20_000))));
    let udp = format!("{}:{}", place.scene.server(), place.port(20_000));
    let certificate = place.folder.join("certificate.der");
    let command = |role: &str| {
        let mut command = Command::new(&place.programs.quinn);
        command.arg(role);
        command.arg(if chunks { "chunks" } else { "copy" });
        command.arg(match place.scene.wire {
            Wire::USUAL | Wire::NO_USO => MTU,
            _ => JUMBO,
        });
        command.arg(&certificate).arg(&udp);
        command
    };
    let node = place.scene.node(place.number, 0);
    let mut server = command("server");
    server.arg(local(place.port(20_000)).to_string());
    server.arg(format!("{node}:{}", target::PORT));
    running.processes[0].push(place.server(&mut server)?);
    running.processes[1].push(place.agent(&mut command("agent"))?);
    Ok(running)
}
