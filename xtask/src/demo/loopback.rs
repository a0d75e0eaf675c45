//! The demonstration without root: the same programs on loopback, through HTTP CONNECT.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;
use tunnel_tests::client::{connect_through, eventually};
use tunnel_tests::lab::Programs;
use tunnel_tests::lab::address::{KUBELET_PORT, TUNNEL_PORT};
use tunnel_tests::lab::config::{self, ConnectorPki, ServerSockets};
use tunnel_tests::lab::daemon::{Daemon, Role};
use tunnel_tests::lab::kubelet::{self, ClusterPki};
use tunnel_tests::lab::process::{Process, end_with_parent};
use tunnel_tests::target::Behaviour;

use super::measure::{self, Duplex};
use super::story::{Evidence, step};
use crate::setup::{self, Purpose};
use crate::workspace::AS_ROOT;
use crate::{interrupt, programs};

const PICTURE: &str = r#"
Control Plane Connector: an API server reaches kubelets that nothing can reach.

   kube-apiserver (here: curl)                              kubelet (here: nginx)
        | CONNECT node:10250, with a client certificate          ^
        v                                                        |
   cpc server <================= QUIC =================== cpc agent
                                                          dials out

You are not root, so all of this runs on the loopback interface. Left out are the redirect in the
kernel (with it, the client needs no proxy setting) and the network namespaces with the NAT router
in between. To see them:
"#;

const READY: Duration = Duration::from_secs(15);
const ANSWER: &str = r#""node":"w1""#;

/// Builds and shows.
pub(super) fn run() -> Result<()> {
    println!("{PICTURE}\n   {AS_ROOT} demo\n");
    setup::ensure(Purpose::Loopback)?;
    let programs = programs::build()?;
    println!();
    interrupt::catch()?;
    show(&programs)?;
    println!("Every step passed, as far as possible without root.");
    Ok(())
}

fn show(programs: &Programs) -> Result<()> {
    let mut demo = step("A kubelet, and certificates for the connector", |say| {
        let demo = Demo::prepare(programs)?;
        say.note(format!("the node's address is {}", demo.node));
        Ok(demo)
    })?;
    step("Without the connector there is no way through", |say| {
        say.note(format!("in {}:", demo.folder.path().display()));
        say.run(&mut demo.curl())?.expect_failure("(7)")
    })?;
    step(
        "The connector starts: a server, and an agent that dials it",
        |say| demo.start(say),
    )?;
    step("The same command, unchanged, reaches the kubelet", |say| {
        say.run(&mut demo.curl())?.expect_success(ANSWER)
    })?;
    step("The status of the connector", |say| {
        let mut cpc = Command::new(&programs.cpc);
        cpc.args(["status", "--admin", &demo.server.admin.to_string()]);
        say.run(&mut cpc)?.expect_success("w1")
    })?;
    step("The connection in the access log", |say| {
        demo.access_log(say)
    })?;
    step("The speed of the connector", |say| demo.measure(say))?;
    step("The agent is stopped: the client reads why", |say| {
        demo.stopped_agent(say)
    })?;
    step("The agent is started again: the kubelet is back", |say| {
        demo.back(say)
    })?;
    step("Everything is removed", |say| demo.clean_up(say))
}

struct Demo {
    node: Ipv4Addr,
    sockets: ServerSockets,
    server: Daemon,
    agent: Daemon,
    programs: Vec<Process>,
    folder: TempDir,
}

impl Demo {
    fn prepare(programs: &Programs) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("cpc-demo-").tempdir()?;
        let subfolder = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir(&path)
                .map(|()| path)
                .context("cannot make a folder")
        };
        let node = own_address();
        let cluster = ClusterPki::create(subfolder("cluster")?)?;
        let pki = ConnectorPki::create(&programs.cpc, subfolder("pki")?)?;

        let server_folder = subfolder("s1")?;
        let out = text(&server_folder)?;
        pki.run(
            "server",
            &["--id", "s1", "--out", out, "--ip", &node.to_string()],
        )?;
        let sockets = ServerSockets {
            tunnel: (node, TUNNEL_PORT).into(),
            admin: (node, 8135).into(),
            connect_unix: server_folder.join("connect.sock"),
            connect_tcp: (node, 8131).into(),
            redirect: Vec::new(),
        };
        let config = config::server(&server_folder, &sockets, 1, None, 0);
        let server = Daemon::new(
            Role::Server,
            "s1",
            &programs.cpc,
            server_folder,
            None,
            config,
        )?;

        let agent_folder = subfolder("w1")?;
        let out = text(&agent_folder)?;
        pki.run(
            "agent",
            &["--node", "w1", "--out", out, "--ip", &node.to_string()],
        )?;
        let config = json!({
            "version": 1,
            "servers": [sockets.tunnel],
            "tls": {"cert": "agent.crt", "key": "agent.key", "ca": "ca.crt"},
            "allow": [{"cidr": format!("{node}/32"), "ports": config::WORKER_PORTS}],
            "admin": SocketAddr::from((node, 8136)),
        });
        let agent = Daemon::new(Role::Agent, "w1", &programs.cpc, agent_folder, None, config)?;

        let out = folder.path().join("client");
        pki.run(
            "client",
            &["--name", "kube-apiserver", "--out", text(&out)?],
        )?;
        let programs = start_targets(&cluster, &subfolder("node")?, node, programs)?;
        Ok(Self {
            node,
            sockets,
            server,
            agent,
            programs,
            folder,
        })
    }

    /// Returns an ordinary curl with the API server's client certificate, and the connector as its
    /// proxy.
    fn curl(&self) -> Command {
        let mut curl = Command::new("curl");
        curl.args([
            "-sSm10",
            "--proxy",
            &format!("https://{}", self.sockets.connect_tcp),
        ]);
        curl.args([
            "--proxy-cacert",
            "client/ca.crt",
            "--proxy-cert",
            "client/client.crt",
        ]);
        curl.args([
            "--proxy-key",
            "client/client.key",
            "--cacert",
            "cluster/ca.crt",
        ]);
        curl.args([
            "--cert",
            "cluster/apiserver.crt",
            "--key",
            "cluster/apiserver.key",
        ]);
        curl.arg(format!("https://{}:{KUBELET_PORT}/healthz", self.node));
        curl.current_dir(self.folder.path());
        curl
    }

    fn start(&mut self, say: &mut Evidence) -> Result<()> {
        self.server.start()?;
        self.agent.start()?;
        self.agent.wait_ready(READY)?;
        self.server.wait_ready(READY)?;
        say.note("the agent has dialled the server and serves its node's address");
        Ok(())
    }

    fn access_log(&self, say: &mut Evidence) -> Result<()> {
        let destination = format!("{}:{KUBELET_PORT}", self.node);
        let line = eventually(Duration::from_secs(5), || {
            super::access_log_line(&self.server.log(), &destination)
                .with_context(|| format!("no line for {destination}"))
        })?;
        say.note(line);
        Ok(())
    }

    fn measure(&self, say: &mut Evidence) -> Result<()> {
        let direct = |behaviour: Behaviour| -> Result<Box<dyn Duplex>> {
            let stream = TcpStream::connect((self.node, behaviour.port()))?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        };
        let tunnel = |behaviour: Behaviour| -> Result<Box<dyn Duplex>> {
            let destination = format!("{}:{}", self.node, behaviour.port());
            Ok(Box::new(connect_through(
                &self.sockets.connect_unix,
                &destination,
            )?))
        };
        measure::compare(say, (&|work| work(), &direct), (&|work| work(), &tunnel))?;
        say.note("direct: plain TCP on loopback; tunnel: HTTP CONNECT on a Unix socket, then");
        say.note("encrypted through server and agent. All of it shares this machine's processors.");
        Ok(())
    }

    fn stopped_agent(&mut self, say: &mut Evidence) -> Result<()> {
        self.agent.terminate()?;
        let destination = format!("{}:{KUBELET_PORT}", self.node);
        let error = match connect_through(&self.sockets.connect_unix, &destination) {
            Ok(_) => bail!("a connection was opened without an agent"),
            Err(error) => error.to_string(),
        };
        say.note(&error);
        if !error.contains("503") {
            bail!("the answer should have been a 503 with the reason");
        }
        Ok(())
    }

    fn back(&mut self, say: &mut Evidence) -> Result<()> {
        let start = Instant::now();
        self.agent.start()?;
        self.agent.wait_ready(READY)?;
        self.server.wait_ready(READY)?;
        say.note(format!(
            "the agent was back after {:.1} s",
            start.elapsed().as_secs_f64()
        ));
        say.run(&mut self.curl())?.expect_success(ANSWER)
    }

    fn clean_up(self, say: &mut Evidence) -> Result<()> {
        let folder = self.folder.path().to_owned();
        drop(self);
        if folder.exists() {
            bail!("{} is left", folder.display());
        }
        say.note("processes and files are gone");
        Ok(())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // One that has ended already is no error here.
        let _ = self.agent.terminate();
        let _ = self.server.terminate();
        for program in &mut self.programs {
            let _ = program.terminate();
        }
    }
}

/// Starts the kubelet's stand-in and the plain targets.
fn start_targets(
    cluster: &ClusterPki,
    folder: &Path,
    node: Ipv4Addr,
    programs: &Programs,
) -> Result<Vec<Process>> {
    let names = ["DNS:w1".to_owned(), format!("IP:{node}")];
    let listen = [format!("{node}:{KUBELET_PORT}")];
    let config = kubelet::configure(cluster, folder, "w1", &names, &listen)?;
    let mut nginx = Command::new("nginx");
    nginx.arg("-c").arg(config);
    let mut target = Command::new(&programs.target);
    target.arg(node.to_string());
    let start = |name: &str, command: &mut Command| {
        end_with_parent(command);
        Process::start(name, command, &folder.join(format!("{name}.log")))
    };
    let mut started = vec![start("nginx", &mut nginx)?, start("targets", &mut target)?];
    for port in Behaviour::ALL
        .map(Behaviour::port)
        .into_iter()
        .chain([KUBELET_PORT])
    {
        eventually(Duration::from_secs(5), || {
            started.iter_mut().try_for_each(Process::check)?;
            Ok(TcpStream::connect((node, port))?)
        })?;
    }
    Ok(started)
}

/// Returns a loopback address of this process alone, so that two demonstrations do not meet.
fn own_address() -> Ipv4Addr {
    let [_, b, c, d] = std::process::id().to_be_bytes();
    // Not 127.0.0.x, which others use, and neither the first nor the last address of a network.
    Ipv4Addr::new(127, 64 | b, c, d.clamp(1, 254))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .context("the temporary folder's name is not UTF-8")
}
