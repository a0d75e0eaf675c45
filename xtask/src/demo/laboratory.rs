//! The demonstration as root: namespaces, the redirect, an unmodified client.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tunnel_tests::client::eventually;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::keeper::Keeper;
use tunnel_tests::lab::address::{self, KUBELET_PORT};
use tunnel_tests::lab::{Lab, LabSpec, Programs};
use tunnel_tests::target::Behaviour;

use super::measure::{self, Duplex};
use super::story::{CommandOutput, Evidence, step};
use crate::setup::{self, Purpose};
use crate::{ebpf, interrupt, programs, sh};

const PICTURE: &str = r#"
Control Plane Connector: an API server reaches kubelets that nothing can reach.

   control plane                      NAT router            worker w1
   kube-apiserver (here: curl)            |                 kubelet (here: nginx)
        | connect 10.99.1.2:10250         |                      ^ 10.99.1.2:10250
        v   no route to the worker        |  nothing comes in    |
   [kernel: redirect]                     |                      |
        v                                 |                      |
   cpc server <======= QUIC ==============|================== cpc agent
                                          |                  dials out

Each column is a network namespace on this machine. Nothing leaves it.
"#;

/// Maximum time until the connector serves again after its server was killed and started.
const BACK: Duration = Duration::from_secs(10);

/// Interval of the messages of a live connection.
const MESSAGE: Duration = Duration::from_millis(20);

/// Time for which it goes on before and after an upgrade.
const TALK: Duration = Duration::from_secs(2);

/// Sets up, builds and shows.
pub(super) fn run() -> Result<()> {
    println!("{PICTURE}");
    setup::ensure(Purpose::Demo)?;
    ebpf::build()?;
    let programs = programs::build()?;
    println!();
    interrupt::catch()?;
    let shown = show(programs);
    if shown.is_ok() {
        println!("Every step passed. Try it yourself: cargo xtask lab up");
    }
    shown
}

fn show(programs: Programs) -> Result<()> {
    let mut demo = step(
        "A control plane and a worker behind NAT, without the connector",
        |say| {
            let lab = Lab::without_connector(LabSpec::new(programs.clone()))?;
            say.note(format!(
                "namespaces {}, {}",
                lab.control_plane.netns.name(),
                lab.router.netns.name()
            ));
            say.note(format!(
                "and {}; the worker's node address is {}",
                lab.workers[0].netns.name(),
                address::node(1)
            ));
            let keepers = Vec::new();
            Ok(Demo {
                lab,
                keepers,
                programs,
            })
        },
    )?;
    step("The control plane does not reach the kubelet", |say| {
        demo.unreachable(say)
    })?;
    step(
        "The connector starts: a server here, an agent on the worker",
        |say| {
            demo.lab.configure_connector()?;
            let agent = demo.lab.workers[0].agent()?;
            let state_dir = agent.config_file().with_file_name("state");
            agent.configure(|config| config["state_dir"] = json!(state_dir))?;
            demo.keepers.push(Keeper::start(&demo.programs.cpc, agent)?);
            let server = &mut demo.lab.control_plane.servers[0].daemon;
            demo.keepers
                .push(Keeper::start(&demo.programs.cpc, server)?);
            demo.lab.start_configured()?;
            say.note(
                "the agent has dialled out to the server; the kernel redirects the API server",
            );
            Ok(())
        },
    )?;
    step("The same command, unchanged, reaches the kubelet", |say| {
        demo.reachable(say)
    })?;
    step(
        "Only the API server is redirected, no other program on the host",
        |say| demo.outsider(say),
    )?;
    step("The status of the connector", |say| demo.status(say))?;
    step("The connection in the access log", |say| {
        demo.access_log(say)
    })?;
    step("The speed of the connector", |say| demo.measure(say))?;
    step(
        "A live connection goes on while the server and the agent are replaced, as in an upgrade",
        |say| demo.replace(say),
    )?;
    step(
        "The same while the server, then the agent, is killed with kill -9",
        |say| demo.kill(say),
    )?;
    step(
        "The server and its keeper are killed: connections are refused and do not leak",
        |say| demo.killed_server(say),
    )?;
    step("The server is started again: the kubelet is back", |say| {
        demo.back(say)
    })?;
    step("Everything is removed", |say| demo.clean_up(say))
}

fn url() -> String {
    format!("https://{}:{KUBELET_PORT}", address::node(1))
}

struct Demo {
    lab: Lab,
    /// Keepers of the server and of the agent.
    keepers: Vec<Keeper>,
    programs: Programs,
}

/// Ends a live connection, and says what has become of it.
fn conclude(talk: Conversation, say: &mut Evidence) -> Result<()> {
    let summary = talk.finish()?;
    say.note(format!(
        "{} bytes there and back, none lost, doubled or changed; the longest pause was {} ms",
        summary.bytes,
        summary.longest_gap.as_millis()
    ));
    Ok(())
}

impl Demo {
    /// Returns the stand-in for kube-apiserver: an ordinary curl with the API server's client
    /// certificate.
    fn curl(&self) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["-sSm10", "--cacert", "ca.crt", "--cert", "apiserver.crt"]);
        curl.args(["--key", "apiserver.key", &format!("{}/healthz", url())]);
        curl.current_dir(self.lab.cluster_pki.folder());
        curl
    }

    fn kubectl(&self) -> Option<Command> {
        sh::find("kubectl")?;
        let mut kubectl = Command::new("kubectl");
        kubectl.args(["--kubeconfig=/dev/null", "--request-timeout=10s"]);
        kubectl.args([
            &format!("--server={}", url()),
            "--certificate-authority=ca.crt",
        ]);
        kubectl.args([
            "--client-certificate=apiserver.crt",
            "--client-key=apiserver.key",
        ]);
        kubectl.args(["get", "--raw", "/healthz"]);
        kubectl.current_dir(self.lab.cluster_pki.folder());
        Some(kubectl)
    }

    /// Runs `command` on the control plane, as the API server.
    fn as_apiserver(&self, say: &mut Evidence, command: &mut Command) -> Result<CommandOutput> {
        self.lab.control_plane.place(command)?;
        say.run(command)
    }

    fn unreachable(&self, say: &mut Evidence) -> Result<()> {
        say.note(format!("in {}:", self.lab.cluster_pki.folder().display()));
        self.as_apiserver(say, &mut self.curl())?
            .expect_failure("(7)")?;
        self.expect_refusal(say, ErrorKind::NetworkUnreachable)?;
        if let Some(mut kubectl) = self.kubectl() {
            self.as_apiserver(say, &mut kubectl)?
                .expect_failure("network is unreachable")?;
        }
        Ok(())
    }

    /// Checks the errno of connect(2), which curl does not print.
    fn expect_refusal(&self, say: &mut Evidence, kind: ErrorKind) -> Result<()> {
        let destination = (address::node(1), KUBELET_PORT);
        let connect = || Ok(TcpStream::connect(destination).map(drop));
        match self.lab.control_plane.as_apiserver(connect)? {
            Ok(()) => bail!("connect(2) succeeded"),
            Err(error) => {
                say.note(format!("connect(2) says: {error}"));
                if error.kind() != kind {
                    bail!("it should have said: {kind}");
                }
                Ok(())
            }
        }
    }

    fn reachable(&self, say: &mut Evidence) -> Result<()> {
        let answer = r#""node":"w1""#;
        self.as_apiserver(say, &mut self.curl())?
            .expect_success(answer)?;
        if let Some(mut kubectl) = self.kubectl() {
            self.as_apiserver(say, &mut kubectl)?
                .expect_success(answer)?;
        }
        Ok(())
    }

    fn outsider(&self, say: &mut Evidence) -> Result<()> {
        let mut curl = self.curl();
        self.lab.control_plane.netns.place(&mut curl)?;
        say.note("outside the API server's control group:");
        say.run(&mut curl)?.expect_failure("(7)")
    }

    fn status(&self, say: &mut Evidence) -> Result<()> {
        let mut cpc = Command::new(&self.programs.cpc);
        self.lab.control_plane.netns.place(&mut cpc)?;
        say.run(cpc.args([
            "status",
            "--admin",
            &self.server()?.daemon.admin.to_string(),
        ]))?
        .expect_success("w1")
    }

    fn access_log(&self, say: &mut Evidence) -> Result<()> {
        let destination = format!("{}:{KUBELET_PORT}", address::node(1));
        let daemon = &self.server()?.daemon;
        let line = eventually(Duration::from_secs(5), || {
            super::access_log_line(&daemon.log(), &destination).with_context(|| {
                format!(
                    "no line for {destination} in {}",
                    daemon.log_file().display()
                )
            })
        })?;
        say.note(line);
        Ok(())
    }

    fn measure(&self, say: &mut Evidence) -> Result<()> {
        let open = |behaviour: Behaviour| -> Result<Box<dyn Duplex>> {
            let stream = TcpStream::connect((address::node(1), behaviour.port()))?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        };
        measure::compare(
            say,
            (&|work| self.lab.router.netns.enter(work), &open),
            (&|work| self.lab.control_plane.as_apiserver(work), &open),
        )?;
        say.note("direct: plain TCP from the router, which is where a way to the worker begins;");
        say.note("tunnel: redirected in the kernel, then encrypted through the server and agent.");
        say.note("All of it shares the processors of this machine.");
        Ok(())
    }

    /// Starts a live connection through the redirect, which both sides hold.
    fn talk(&self) -> Result<Conversation> {
        let echo = (address::node(1), Behaviour::Echo.port()).into();
        let stream = Frontend::Redirect.dial(&self.lab, echo)?;
        let talk = Conversation::start(stream, Pace::Messages(100, MESSAGE))?;
        sleep(TALK);
        Ok(talk)
    }

    fn kill(&mut self, say: &mut Evidence) -> Result<()> {
        let talk = self.talk()?;
        let server = &mut self.server_mut()?.daemon;
        server.kill()?;
        server.start()?;
        say.note("kill -9 of cpc server, and another one starts: a keeper has the sockets");
        sleep(TALK);
        let agent = self.lab.workers[0].agent()?;
        agent.kill()?;
        agent.start()?;
        say.note("the same with the agent on the worker");
        sleep(TALK);
        conclude(talk, say)
    }

    fn replace(&mut self, say: &mut Evidence) -> Result<()> {
        let talk = self.talk()?;
        self.server_mut()?.daemon.replace(BACK)?;
        say.note("cpc server --replace: the running server has handed over, and has ended");
        sleep(TALK);
        self.lab.workers[0].agent()?.replace(BACK)?;
        say.note("cpc agent --replace: the same on the worker");
        sleep(TALK);
        conclude(talk, say)
    }

    fn killed_server(&mut self, say: &mut Evidence) -> Result<()> {
        // The trap: with a route, whatever is not caught goes to the router, which counts it.
        self.lab
            .control_plane
            .netns
            .ip(&format!("route add 10.99.0.0/16 via {}\n", address::ROUTER))?;
        say.note("a route to the worker network is added, so that a leak would be seen");
        // With a keeper connects would wait for the next process, for 10 s.
        for keeper in &mut self.keepers {
            keeper.kill()?;
        }
        self.server_mut()?.daemon.kill()?;
        self.as_apiserver(say, &mut self.curl())?
            .expect_failure("(7)")?;
        self.expect_refusal(say, ErrorKind::ConnectionRefused)?;
        let leaked = self.lab.router.leaked()?;
        say.note(format!("packets at the router: {leaked}"));
        if leaked != 0 {
            bail!("{leaked} packets left the control plane by the ordinary route");
        }
        let mut curl = self.curl();
        self.lab
            .control_plane
            .netns
            .place(curl.args(["--max-time", "2"]))?;
        if curl.output()?.status.success() || self.lab.router.leaked()? == 0 {
            bail!("the trap is blind: it did not count a client outside the control group");
        }
        say.note("and the same from outside the control group is counted there, as it should be");
        Ok(())
    }

    fn back(&mut self, say: &mut Evidence) -> Result<()> {
        let start = std::time::Instant::now();
        let server = self.server_mut()?;
        server.daemon.start()?;
        server.daemon.wait_ready(BACK)?;
        say.note(format!(
            "the agent was back after {:.1} s",
            start.elapsed().as_secs_f64()
        ));
        self.as_apiserver(say, &mut self.curl())?
            .expect_success(r#""node":"w1""#)
    }

    fn clean_up(self, say: &mut Evidence) -> Result<()> {
        let described = self.lab.describe();
        let netns = self.lab.control_plane.netns.clone();
        drop(self);
        if described.folder.exists()
            || described.control_plane.cgroup.exists()
            || netns.path().exists()
        {
            bail!("something of laboratory {} is left", described.id);
        }
        say.note("processes, namespaces, control groups, kernel programs and files are gone");
        Ok(())
    }

    fn server(&self) -> Result<&tunnel_tests::lab::server::Server> {
        self.lab
            .control_plane
            .servers
            .first()
            .context("the laboratory has no server")
    }

    fn server_mut(&mut self) -> Result<&mut tunnel_tests::lab::server::Server> {
        self.lab
            .control_plane
            .servers
            .first_mut()
            .context("the laboratory has no server")
    }
}
