//! Programs of everyday work, whose connections go on while server and agent are killed and replaced.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::eventually;
use tunnel_tests::keeper;
use tunnel_tests::lab::process::Process;
use tunnel_tests::lab::{self, Lab, Programs, address};
use tunnel_tests::pattern;
use tunnel_tests::side::Side;

/// Time for a program to start, or for a process to take over.
const SOON: Duration = Duration::from_secs(15);

/// Age from which on a connection is kept, with room.
const KEPT: Duration = Duration::from_secs(2);

/// Port of the shell on the worker.
const SSH: u16 = 2222;

/// Bytes of the download, and the number of them in a second.
const BYTES: usize = 60_000_000;
const RATE: &str = "5M";

/// Starts an ssh server on the worker, whose root logs in with the key `folder/client`.
fn start_sshd(lab: &Lab, folder: &Path) -> Result<Process> {
    for name in ["host", "client"] {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        let made = keygen.arg(folder.join(name)).status()?;
        ensure!(made.success(), "ssh-keygen: {made}");
    }
    let config = folder.join("sshd_config");
    let text = format!(
        "Port {SSH}\nHostKey {0}/host\nAuthorizedKeysFile {0}/client.pub\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n\
         PidFile none\n",
        folder.display()
    );
    fs::write(&config, text)?;
    // sshd wants a directory in /run, which this machine may lack.
    let mut unshare = lab.workers[0].netns.command("unshare")?;
    unshare.args(["--mount", "sh", "-ec"]);
    unshare.arg("mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec $(command -v sshd) -D -e -f $0");
    unshare.arg(&config);
    unshare.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    lab.cgroup("workers")?.place(&mut unshare)?;
    let mut sshd = Process::start("sshd", &mut unshare, &folder.join("sshd.log"))?;
    let address: SocketAddr = (address::node(1), SSH).into();
    lab.workers[0].netns.enter(|| {
        eventually(SOON, || {
            sshd.check()?;
            Ok(std::net::TcpStream::connect(address)?)
        })
    })?;
    Ok(sshd)
}

/// Starts a shell loop on the worker that repeats each line.
fn start_shell(lab: &Lab, folder: &Path) -> Result<Child> {
    let mut ssh = Command::new("ssh");
    ssh.args(["-F", "none", "-o", "StrictHostKeyChecking=no"]);
    ssh.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]);
    ssh.arg("-i").arg(folder.join("client"));
    ssh.args(["-p", &SSH.to_string()]);
    ssh.arg(format!("root@{}", address::node(1)));
    ssh.arg("while read line; do echo heard $line; done");
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped());
    lab.control_plane.place(&mut ssh)?;
    ssh.spawn().context("ssh")
}

/// Starts the download of `BYTES` from the kubelet's stand-in.
fn start_download(lab: &Lab, to: &Path) -> Result<Child> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--limit-rate", RATE]);
    curl.arg("--cacert").arg(lab.cluster_pki.ca());
    curl.arg("--cert").arg(lab.cluster_pki.client_cert());
    curl.arg("--key").arg(lab.cluster_pki.client_key());
    curl.arg("--output").arg(to);
    curl.arg(format!("https://{}:10250/files/large", address::node(1)));
    lab.control_plane.place(&mut curl)?;
    curl.spawn().context("curl")
}

/// Kills each side, and then has each replaced.
fn disturb(lab: &mut Lab) -> Result<()> {
    for side in [Side::Server, Side::Agent] {
        thread::sleep(KEPT);
        let process = side.daemon(lab)?;
        process.kill()?;
        process.start()?;
    }
    for side in [Side::Server, Side::Agent] {
        thread::sleep(KEPT);
        side.daemon(lab)?.replace(SOON)?;
    }
    thread::sleep(KEPT);
    Ok(())
}

#[test]
fn a_shell_and_a_download_outlive_both_processes() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = keeper::lab(Programs::of_this_test()?, 1)?;
    let agent = lab.workers[0].agent()?;
    let allowed = json!({"cidr": format!("{}/32", address::node(1)), "ports": [SSH]});
    agent.configure(|config| {
        let rules = config["allow"].as_array_mut();
        rules
            .into_iter()
            .for_each(|rules| rules.push(allowed.clone()));
    })?;
    agent.replace(SOON)?;
    let folder = tempfile::tempdir()?;
    let files = lab.files(1)?;
    let mut large = vec![0; BYTES];
    pattern::fill(0, &mut large);
    fs::write(files.join("large"), &large)?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let mut sshd = start_sshd(&lab, folder.path())?;
    let worked = work(&mut lab, folder.path(), &large);
    sshd.kill()?;
    worked.with_context(|| lab.logs())
}

/// Types in a shell and copies a file, while both processes are killed and replaced.
fn work(lab: &mut Lab, folder: &Path, large: &[u8]) -> Result<()> {
    let copy = folder.join("copy");
    let mut download = start_download(lab, &copy)?;
    let mut shell = start_shell(lab, folder)?;
    let mut stdin = shell.stdin.take().context("it is piped")?;
    let stdout = BufReader::new(shell.stdout.take().context("it is piped")?);
    let typing = thread::spawn(move || -> Result<u32> {
        let mut lines = stdout.lines();
        for number in 0..200 {
            writeln!(stdin, "{number}")?;
            let line = lines
                .next()
                .with_context(|| format!("no line {number}"))??;
            ensure!(line == format!("heard {number}"), "{line} for {number}");
            thread::sleep(Duration::from_millis(50));
        }
        drop(stdin);
        ensure!(lines.next().is_none(), "more lines than were typed");
        Ok(200)
    });
    let disturbed = disturb(lab);
    let typed = typing
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let (shell, download) = (shell.wait()?, download.wait()?);
    disturbed?;
    typed?;
    ensure!(shell.success(), "ssh: {shell}");
    ensure!(download.success(), "curl: {download}");
    ensure!(fs::read(&copy)? == large, "the copy is different");
    Ok(())
}
