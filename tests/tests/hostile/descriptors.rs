//! A server that may open few files: clients are refused, not left hanging, and health is answered.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};

use crate::scene::{SOON, echo, metric};

/// Limit of open files of the server (`ulimit -n`).
const FILES: u64 = 256;

/// Clients that say nothing, several times as many as fit.
const IDLE: usize = 400;

fn idle(proxy: &Path) -> Result<UnixStream> {
    let client = UnixStream::connect(proxy)?;
    client.set_read_timeout(Some(SOON))?;
    Ok(client)
}

/// Returns the answer to a refused client that sends nothing.
fn refusal(mut client: UnixStream) -> Result<String> {
    let mut answer = String::new();
    client.read_to_string(&mut answer).context("it hangs")?;
    Ok(answer)
}

#[test]
fn who_finds_no_descriptor_is_refused_and_health_is_answered() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0];
    let proxy = server.sockets.connect_unix.clone();
    server.daemon.start_with(|command| {
        // SAFETY: setrlimit(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES)?));
        }
    })?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    let server = &lab.control_plane.servers[0].daemon;

    // Clients that say nothing have a share, which leaves others theirs.
    let mut held: Vec<_> = (0..IDLE).map(|_| idle(&proxy)).collect::<Result<_>>()?;
    let last = held.pop().context("none")?;
    let answer = refusal(last)?;
    ensure!(answer.starts_with("HTTP/1.1 503"), "{answer:?}");
    assert_eq!(server.get("/readyz")?.0, 200);

    // So have connections.
    held.clear();
    let mut tunnels = Vec::new();
    let refused = eventually(SOON, || {
        for _ in 0..FILES {
            match connect_through(&proxy, &echo().to_string()) {
                Ok(tunnel) => tunnels.push(tunnel),
                Err(error) => return Ok(error),
            }
        }
        anyhow::bail!("all of {} were served", tunnels.len())
    })?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("503"), "{refused}");
    ensure!(
        tunnels.len() > 50,
        "only {} were served: {refused}",
        tunnels.len()
    );
    assert_eq!(server.get("/readyz")?.0, 200);
    round_trips(&tunnels[0], 1)?;
    tunnels.clear();

    // Nothing is left at all: whatever took it is not bounded here.
    let pid = server.pid().context("no process")?;
    let limit = |files: u64| {
        let limit = libc::rlimit {
            rlim_cur: files,
            rlim_max: FILES,
        };
        // SAFETY: `limit` lives through the call, and nothing is written.
        let set = unsafe {
            libc::prlimit(
                pid.as_raw(),
                libc::RLIMIT_NOFILE,
                &raw const limit,
                std::ptr::null_mut(),
            )
        };
        ensure!(set == 0, "{}", std::io::Error::last_os_error());
        Ok(())
    };
    eventually(SOON, || {
        limit(server.open_files()? as u64 + 1)?;
        let clients = (0..4).map(|_| idle(&proxy)).collect::<Result<Vec<_>>>()?;
        let ready = server.get("/readyz");
        limit(FILES)?;
        assert_eq!(ready?.0, 200);
        let refused = metric(server, "cpc_connections_without_descriptor_total")?;
        ensure!(
            refused > 0.0,
            "nobody was refused; {} files are open",
            server.open_files()?
        );
        drop(clients);
        Ok(())
    })?;
    // The count comes before the line, which another thread writes.
    server.wait_log(SOON, 0, &["no file descriptor"])?;
    let log = server.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("no file descriptor"))
        .count();
    ensure!((1..150).contains(&lines), "{lines} lines in\n{log}");

    let tunnel = connect_through(&proxy, &echo().to_string())?;
    round_trips(&tunnel, 1).map(drop)
}
