//! Server and agent with the privileges that `deploy/` gives them: a user of their own, no
//! capability, a file system that they can read alone, the seccomp profile. They do the main job.

mod profile;
mod sandbox;
mod uninstall;
mod units;

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, setgid};
use serde_json::json;
use socket2::Socket;
use tunnel_tests::client::{self, eventually, round_trips};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::keeper::Keeper;
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Engine, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

use profile::{IO_URING, Profile};
use sandbox::{ATTACHING, ID, Sandbox, check, keep_of_bounding_set};

const SOON: Duration = Duration::from_secs(15);
const BYTES: u64 = 50_000_000;

/// A laboratory whose programs can be started as another user. Its folder goes with it.
struct Scene {
    lab: Lab,
    /// Outside of the build's folder, which other users need not be able to enter.
    programs: PathBuf,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.programs);
    }
}

impl Scene {
    /// Configured and not started; `None` where there can be none.
    fn new() -> Result<Option<Self>> {
        let maps = "the redirect's maps without CAP_BPF";
        if !lab::available()? || !lab::kernel_since((5, 19), maps)? {
            return Ok(None);
        }
        let built = Programs::of_this_test()?;
        let folder = std::env::temp_dir().join(format!("cpc-privileges-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o755))?;
        let cpc = folder.join("cpc");
        fs::copy(&built.cpc, &cpc)?;
        let programs = Programs { cpc, ..built };
        let mut scene = Self {
            lab: Lab::without_connector(LabSpec::new(programs))?,
            programs: folder,
        };
        scene.lab.configure_connector()?;
        // As systemd mounts it.
        fs::set_permissions(
            scene.lab.folder().join("bpf"),
            Permissions::from_mode(0o700),
        )?;
        let server = scene.server();
        server.configure(|config| config["redirect"]["group"] = ID.into())?;
        Ok(Some(scene))
    }

    fn server(&mut self) -> &mut Daemon {
        &mut self.lab.control_plane.servers[0].daemon
    }

    fn agent(&mut self) -> Result<&mut Daemon> {
        self.lab.workers[0].agent()
    }

    fn daemons(&mut self) -> Result<[&mut Daemon; 2]> {
        let agent = self.lab.workers[0].agent.as_mut().context("no agent")?;
        Ok([&mut self.lab.control_plane.servers[0].daemon, agent])
    }

    /// Runs `cpc redirect COMMAND` on the control plane, prepared by `place`.
    fn redirect(&self, command: &str, place: impl FnOnce(&mut Command)) -> Result<Output> {
        let config = self.lab.control_plane.servers[0].daemon.config_file();
        self.redirect_of(&config, command, place)
    }

    /// The same with another configuration.
    fn redirect_of(
        &self,
        config: &Path,
        command: &str,
        place: impl FnOnce(&mut Command),
    ) -> Result<Output> {
        let cpc = self.programs.join("cpc");
        let mut program = self.lab.control_plane.netns.command(cpc)?;
        program.args(["redirect", command, "--config"]).arg(config);
        place(&mut program);
        Ok(program.output()?)
    }

    /// `cpc redirect attach`, which ends.
    fn attach(&self) -> Result<()> {
        let output = self.redirect("attach", as_the_unit)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "attach: {said}");
        Ok(())
    }

    /// Starts both as their units do, with these profiles, and waits for them.
    fn start(&mut self, server: &Profile, agent: &Profile) -> Result<()> {
        let sandbox = self.for_server(server)?;
        self.server().start_with(|command| sandbox.place(command))?;
        let sandbox = self.for_agent(agent)?;
        self.agent()?.start_with(|command| sandbox.place(command))?;
        self.server().wait_ready(SOON)
    }

    fn for_server(&mut self, profile: &Profile) -> Result<Sandbox> {
        let folder = own(self.server())?;
        Sandbox::new(&folder, profile.compile()?)?.with_pins_of(&self.lab)
    }

    fn for_agent(&mut self, profile: &Profile) -> Result<Sandbox> {
        let folder = own(self.agent()?)?;
        Sandbox::new(&folder, profile.compile()?)
    }
}

/// Lets the group of the user whom a daemon will run as read its files, and write beside them; they
/// stay root's.
fn own(daemon: &Daemon) -> Result<PathBuf> {
    let file = daemon.config_file();
    let folder = file.parent().context("no folder")?;
    give(folder)?;
    Ok(folder.to_owned())
}

fn give(path: &Path) -> Result<()> {
    chown(path, None, Some(ID)).with_context(|| format!("{}", path.display()))?;
    let mode = if path.is_dir() { 0o770 } else { 0o640 };
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path())?;
        }
    }
    Ok(())
}

fn to(behaviour: Behaviour) -> SocketAddr {
    (address::node(1), behaviour.port()).into()
}

fn confined() -> [(&'static str, &'static str); 3] {
    // The text of ID.
    [("Uid", "61234"), ("Gid", "61234"), ("Seccomp", "2")]
}

/// Without any capability both hand over to a successor.
#[test]
fn a_handover_takes_no_privilege() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    scene.attach()?;
    let agent = scene.agent()?;
    let state_dir = agent.config_file().with_file_name("state");
    agent.configure(|config| config["state_dir"] = json!(state_dir))?;
    let [server, agent] = [Profile::of("server")?, Profile::of("agent")?];
    scene.start(&server, &agent)?;
    let stream = Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo))?;
    round_trips(&stream, 3)?;
    let sandbox = scene.for_server(&server)?;
    let place = |command: &mut Command| sandbox.place(command);
    scene.server().replace_with(SOON, place)?;
    round_trips(&stream, 3).context("another server")?;
    let sandbox = scene.for_agent(&agent)?;
    let place = |command: &mut Command| sandbox.place(command);
    scene.agent()?.replace_with(SOON, place)?;
    round_trips(&stream, 3).context("another agent")?;
    check(scene.server().pid(), &confined())?;
    check(scene.agent()?.pid(), &confined())
}

/// Without any capability, and with a filter of its own, a keeper holds the connections of both.
#[test]
fn a_keeper_takes_no_privilege() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    scene.attach()?;
    let cpc = scene.programs.join("cpc");
    let profile = Profile::of("keeper")?.compile()?;
    let mut keepers = Vec::new();
    for daemon in scene.daemons()? {
        let sandbox = Sandbox::new(&own(daemon)?, profile.clone())?;
        let place = |command: &mut Command| sandbox.place(command);
        keepers.push(Keeper::start_with(&cpc, daemon, place)?);
    }
    let [server, agent] = [Profile::of("server")?, Profile::of("agent")?];
    scene.start(&server, &agent)?;
    let stream = Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo))?;
    round_trips(&stream, 3)?;
    // Until the connection is kept.
    std::thread::sleep(Duration::from_secs(2));
    round_trips(&stream, 1)?;
    let sandbox = scene.for_server(&server)?;
    scene.server().kill()?;
    scene
        .server()
        .start_with(|command| sandbox.place(command))?;
    round_trips(&stream, 3).with_context(|| format!("another server\n{}", scene.lab.logs()))?;
    let sandbox = scene.for_agent(&agent)?;
    scene.agent()?.kill()?;
    scene
        .agent()?
        .start_with(|command| sandbox.place(command))?;
    round_trips(&stream, 3).with_context(|| format!("another agent\n{}", scene.lab.logs()))?;
    for keeper in &keepers {
        check(Some(keeper.pid()), &confined())?;
    }
    // The profile lets a keeper install its own filter.
    for daemon in scene.daemons()? {
        let log = fs::read_to_string(daemon.config_file().with_file_name("keeper.log"))?;
        let is_restricted = !log.contains("not restricted to the system calls");
        ensure!(is_restricted && log.contains("the keeper listens"), "{log}");
    }
    Ok(())
}

/// Without any capability both do the main job: curl through the redirect, bytes both ways over each
/// way in, a drain. What attached has ended.
#[test]
fn the_main_job_takes_no_privilege() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    assert_eq!(confined()[0].1, ID.to_string());
    scene.attach()?;
    scene.start(&Profile::of("server")?, &Profile::of("agent")?)?;

    let lab = &scene.lab;
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "10", "--fail"]);
    curl.arg("--cacert").arg(lab.cluster_pki.ca());
    curl.arg("--cert").arg(lab.cluster_pki.client_cert());
    curl.arg("--key").arg(lab.cluster_pki.client_key());
    curl.arg(format!("https://{}:10250/healthz", address::node(1)));
    lab.control_plane.place(&mut curl)?;
    let curl = curl.output()?;
    let said = String::from_utf8_lossy(&curl.stdout);
    ensure!(said.contains(r#""node":"w1""#), "{curl:?}");
    for frontend in Frontend::ALL {
        let up = frontend.dial(lab, to(Behaviour::Sink))?;
        client::upload(up, BYTES, |it| it.shutdown(std::net::Shutdown::Write))?;
        client::download(frontend.dial(lab, to(Behaviour::Source))?, BYTES)?;
    }
    check(scene.server().pid(), &confined())?;
    check(scene.agent()?.pid(), &confined())?;
    let (_, metrics) = scene.server().get("/metrics")?;
    ensure!(metrics.contains("cpc_redirect_events_total"), "{metrics}");
    for daemon in scene.daemons()? {
        daemon.wait_log(SOON, 0, &["serves without capabilities"])?;
    }

    let open = Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo))?;
    round_trips(&open, 1)?;
    scene.server().signal(Signal::SIGTERM)?;
    scene.server().wait_log(SOON, 0, &["draining"])?;
    // A drain serves new connections too, until there is none.
    round_trips(
        &Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo))?,
        1,
    )?;
    round_trips(&open, 3)?;
    drop(open);
    scene.server().wait_ended(SOON)?;
    let lab = &scene.lab;
    let dialled = lab
        .control_plane
        .as_apiserver(|| Ok(TcpStream::connect(to(Behaviour::Echo)).map(drop)))?;
    let kind = dialled.err().map(|error| error.kind());
    ensure!(kind == Some(ErrorKind::ConnectionRefused), "{kind:?}");
    scene.agent()?.terminate()
}

/// A server without capabilities, even under an attacker's control, can neither change the capture
/// nor remove the programs. Its log names the actions that need another process.
#[test]
fn a_server_without_privileges_captures_what_it_is_told() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    // Before anything is attached it does not start.
    let folder = own(scene.server())?;
    let compiled = Profile::of("server")?.compile()?;
    let sandbox = Sandbox::new(&folder, compiled.clone())?;
    scene.server().start_with(|it| sandbox.place(it))?;
    let missing = ["no attachment named kube-apiserver", "cpc redirect attach"];
    scene.server().wait_log(SOON, 0, &missing)?;
    ensure!(scene.server().wait_ended(SOON).is_err());

    scene.attach()?;
    let pins = scene.lab.folder().join("bpf/cpc");
    for (pin, wanted) in [
        ("maps-v2/ATTACHMENTS", 0o640),
        ("maps-v2/CAPTURES", 0o640),
        ("maps-v2/ROUTES", 0o660),
        ("maps-v2/HEARTBEATS", 0o660),
        ("maps-v2/LISTENERS", 0o660),
        ("links/kube-apiserver", 0o750),
        ("links/kube-apiserver/connect4", 0o600),
    ] {
        let pin = fs::metadata(pins.join(pin)).with_context(|| pin.to_owned())?;
        assert_eq!((pin.uid(), pin.mode() & 0o777), (0, wanted));
    }
    let listed = scene.redirect("list", |_| ())?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    ensure!(
        listed.contains("attachment kube-apiserver pinned below"),
        "{listed}"
    );
    scene.start(&Profile::of("server")?, &Profile::of("agent")?)?;
    let dial = |scene: &Scene| Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo));
    round_trips(dial(&scene)?, 1)?;
    for command in ["attach", "detach"] {
        let sandbox = Sandbox::new(&folder, Vec::new())?.with_pins_of(&scene.lab)?;
        let output = scene.redirect(command, |it| sandbox.place(it))?;
        ensure!(!output.status.success(), "{command}: {output:?}");
    }
    round_trips(dial(&scene)?, 1)?;

    // A changed capture set, and a cgroup that is created again.
    let before = scene.server().log().len();
    scene.server().configure(|config| {
        let port = json!({"cidr": "0.0.0.0/0", "ports": [Behaviour::Echo.port()]});
        config["redirect"]["attachments"][0]["exclude"] = json!([port]);
    })?;
    scene.server().signal(Signal::SIGHUP)?;
    let told = ["capture set not reloaded", "cpc redirect attach"];
    scene.server().wait_log(SOON, before, &told)?;
    round_trips(dial(&scene)?, 1)?;
    scene.attach()?;
    ensure!(dial(&scene).is_err(), "it is captured still");
    scene
        .server()
        .configure(|config| config["redirect"]["attachments"][0]["exclude"] = json!([]))?;
    scene.attach()?;
    round_trips(dial(&scene)?, 1)?;

    let cgroup = &scene.lab.control_plane.apiserver;
    cgroup.remove()?;
    fs::create_dir(cgroup.path())?;
    let told = ["redirect NOT in place", "cpc redirect attach"];
    scene.server().wait_log(SOON, before, &told)?;
    ensure!(dial(&scene).is_err(), "the laboratory has a route");
    scene.attach()?;
    round_trips(dial(&scene)?, 1)?;
    Ok(())
}

/// `cpc redirect attach --stay` keeps no capability either, and follows for the server: a recreated
/// cgroup, a later address of the host, a changed capture set.
#[test]
fn what_attached_may_stay_and_follow_the_host() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    let netns = scene.lab.control_plane.netns.clone();
    let stays = Stays::start(&scene)?;
    let pid = stays.pid();
    // The bounding set stays, without CAP_SETPCAP, and no_new_privs lets nothing come of it.
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for line in ["CapPrm:\t0000000000000000\n", "NoNewPrivs:\t1\n"] {
        ensure!(status.contains(line), "{status}");
    }

    scene.start(&Profile::of("server")?, &Profile::of("agent")?)?;
    served(&scene)?;
    let cgroup = scene.lab.control_plane.apiserver.clone();
    cgroup.remove()?;
    fs::create_dir(cgroup.path())?;
    served(&scene)?;
    scene.server().wait_ready(SOON)?;

    // The host's own now: nothing of it goes to the worker.
    let own = format!("address add {}/32 dev lo\n", address::node(1));
    netns.ip(&own)?;
    refused(&scene)?;
    netns.ip(&own.replace(" add ", " del "))?;
    served(&scene)?;

    scene.server().configure(|config| {
        let port = json!({"cidr": "0.0.0.0/0", "ports": [Behaviour::Echo.port()]});
        config["redirect"]["attachments"][0]["exclude"] = json!([port]);
    })?;
    kill(pid, Signal::SIGHUP)?;
    stays.hear("RELOADING=1")?;
    stays.hear("READY=1")?;
    refused(&scene)
}

/// Attachments outlive the process that stays, whether it is killed or stopped. The next one takes it over,
/// with what has changed meanwhile.
#[test]
fn what_is_attached_outlives_the_process_that_stays() -> Result<()> {
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    let netns = scene.lab.control_plane.netns.clone();
    let stays = Stays::start(&scene)?;
    scene.start(&Profile::of("server")?, &Profile::of("agent")?)?;
    served(&scene)?;
    let open = dial(&scene)?;
    drop(stays);
    served(&scene)?;
    let own = format!("address add {}/32 dev lo\n", address::node(1));
    netns.ip(&own)?;
    let mut stays = Stays::start(&scene)?;
    refused(&scene)?;
    netns.ip(&own.replace(" add ", " del "))?;
    served(&scene)?;

    kill(stays.pid(), Signal::SIGTERM)?;
    stays.hear("STOPPING=1")?;
    let ended = stays.process.wait()?;
    ensure!(ended.success(), "{ended}: {}", stays.log()?);
    served(&scene)?;
    round_trips(open, 1)?;
    scene.server().wait_ready(SOON)
}

/// While another attachment decides over the same connections, `attach` fails with the command that takes it
/// away. A process that stays says so once, and once more when that is gone.
#[test]
fn another_attachment_is_named_with_its_remedy() -> Result<()> {
    let Some(scene) = Scene::new()? else {
        return Ok(());
    };
    let own = scene.lab.control_plane.servers[0].daemon.config_file();
    let other = own.with_file_name("other.yaml");
    let text = fs::read_to_string(&own)?;
    fs::write(&other, text.replace("bpf/cpc", "bpf/other"))?;
    let attached = scene.redirect_of(&other, "attach", as_the_unit)?;
    ensure!(attached.status.success(), "{attached:?}");

    let refused = scene.redirect("attach", as_the_unit)?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    let pins = scene.lab.folder().join("bpf/other");
    let remedy = ["redirect", "detach", "--pin"].map(str::to_owned);
    let remedy = [
        &remedy[..],
        &[pins.display().to_string(), "kube-apiserver".into()],
    ]
    .concat();
    let command = format!("`cpc {}`", remedy.join(" "));
    ensure!(said.contains(&command), "{said}");

    let stays = Stays::start(&scene)?;
    let not = "redirect NOT in place";
    eventually(SOON, || {
        let log = stays.log()?;
        ensure!(log.contains(not), "{log}");
        Ok(())
    })?;
    let detached = Command::new(scene.programs.join("cpc"))
        .args(&remedy)
        .output()?;
    ensure!(detached.status.success(), "{detached:?}");
    eventually(2 * SOON, || {
        let log = stays.log()?;
        ensure!(log.contains("redirect in place"), "{log}");
        Ok(())
    })?;
    let log = stays.log()?;
    assert_eq!(log.matches(not).count(), 1, "{log}");
    Ok(())
}

fn dial(scene: &Scene) -> Result<Socket> {
    Frontend::Redirect.dial(&scene.lab, to(Behaviour::Echo))
}

fn served(scene: &Scene) -> Result<()> {
    eventually(SOON, || round_trips(dial(scene)?, 1)).map(drop)
}

fn refused(scene: &Scene) -> Result<()> {
    eventually(SOON, || {
        ensure!(dial(scene).is_err(), "it was served");
        Ok(())
    })
}

/// Starts it like `cpc-redirect.service`: root of the server's group, three capabilities.
fn as_the_unit(command: &mut Command) {
    let enter = || {
        keep_of_bounding_set(&ATTACHING)?;
        Ok(setgid(Gid::from_raw(ID))?)
    };
    // SAFETY: bare system calls.
    unsafe { command.pre_exec(enter) };
}

/// `cpc redirect attach --stay`, which ends with the test.
struct Stays {
    process: Child,
    /// Messages to the service manager.
    told: UnixDatagram,
    log: PathBuf,
}

impl Stays {
    /// Starts it as its unit does, and waits until it says that everything is attached.
    fn start(scene: &Scene) -> Result<Self> {
        let folder = scene.lab.folder();
        let netns = &scene.lab.control_plane.netns;
        let mut program = netns.command(scene.programs.join("cpc"))?;
        program.args(["redirect", "attach", "--stay", "--config"]);
        program.arg(scene.lab.control_plane.servers[0].daemon.config_file());
        let notify = folder.join("stays.sock");
        let _ = fs::remove_file(&notify);
        let told = UnixDatagram::bind(&notify)?;
        told.set_read_timeout(Some(SOON))?;
        program.env("NOTIFY_SOCKET", &notify);
        let log = folder.join("stays.log");
        let file = File::create(&log)?;
        program.stdout(file.try_clone()?).stderr(file);
        as_the_unit(&mut program);
        let stays = Self {
            process: program.spawn()?,
            told,
            log,
        };
        let attached = stays.hear("READY=1");
        attached.with_context(|| format!("it is not attached: {:?}", stays.log()))?;
        Ok(stays)
    }

    /// Takes the next message to the service manager, which begins with `piece`.
    fn hear(&self, piece: &str) -> Result<()> {
        let mut message = [0; 64];
        let length = self.told.recv(&mut message)?;
        let told = String::from_utf8_lossy(&message[..length]);
        ensure!(told.starts_with(piece), "{told:?}, not {piece}");
        Ok(())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }
}

impl Drop for Stays {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Started by root with everything, both keep nothing: the server attaches by itself first, and puts
/// its programs, without any capability, into a cgroup that is created again.
#[test]
fn root_gives_everything_back() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let cgroup = lab.control_plane.apiserver.clone();
    let server = &mut lab.control_plane.servers[0].daemon;
    check(server.pid(), &[("Uid", "0")])?;
    check(lab.workers[0].agent()?.pid(), &[("Uid", "0")])?;
    let server = &lab.control_plane.servers[0].daemon;
    let before = server.log().len();
    cgroup.remove()?;
    // A server whose attachment is missing is not ready, and says why.
    eventually(SOON, || {
        let (status, why) = server.get("/readyz")?;
        let missing = format!("the cgroup {} is not there", cgroup.path().display());
        ensure!(status == 503 && why.contains(&missing), "{status}: {why}");
        let (_, metrics) = server.get("/metrics")?;
        let gauge = "cpc_redirect_in_place{attachment=\"kube-apiserver\"} 0";
        ensure!(metrics.contains(gauge), "{metrics}");
        Ok(())
    })?;
    server.wait_log(SOON, before, &["redirect NOT in place"])?;
    fs::create_dir(cgroup.path())?;
    server.wait_log(SOON, before, &["redirect in place", "Created"])?;
    eventually(SOON, || {
        let (status, why) = server.get("/readyz")?;
        ensure!(status == 200, "{why}");
        Ok(())
    })?;
    round_trips(Frontend::Redirect.dial(&lab, to(Behaviour::Echo))?, 1)?;
    Ok(())
}

/// io_uring under the profiles: refused, which is told once, and epoll does the job; with its calls
/// allowed it is io_uring that does.
#[test]
fn io_uring_is_refused_by_the_profile_or_let() -> Result<()> {
    if !Engine::IoUring.available()? {
        return Ok(());
    }
    let Some(mut scene) = Scene::new()? else {
        return Ok(());
    };
    scene.attach()?;
    for (engine, further) in [("epoll", &[][..]), ("io_uring", &IO_URING)] {
        let mut before = Vec::new();
        for daemon in scene.daemons()? {
            before.push(daemon.log().len());
            daemon.configure(|config| config["datapath"] = json!({"engine": "io_uring"}))?;
        }
        let [server, agent] = ["server", "agent"].map(|role| Profile::of(role)?.and(further));
        scene.start(&server?, &agent?)?;
        for frontend in Frontend::ALL {
            let up = frontend.dial(&scene.lab, to(Behaviour::Sink))?;
            client::upload(up, BYTES, |it| it.shutdown(std::net::Shutdown::Write))?;
        }
        for (daemon, before) in scene.daemons()?.into_iter().zip(before) {
            daemon.wait_status(SOON, |status| status["engine"] == engine)?;
            check(daemon.pid(), &confined())?;
            let log = daemon.log();
            let told = log[before..].matches("epoll takes its place").count();
            assert_eq!(told, usize::from(engine == "epoll"), "{log}");
            daemon.terminate()?;
        }
    }
    Ok(())
}
