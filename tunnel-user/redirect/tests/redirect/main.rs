//! The redirect in the kernel: needs root and the kernel programs (`cargo xtask build-ebpf`).
//!
//! Each test has namespaces, a cgroup and a BPF file system of its own.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "clippy.toml allows them in tests, but does not see that all of this is tests"
)]

mod capture;
mod connector;
mod lab;
mod lifetime;
mod origin;
mod refusal;
mod retired;
mod survey;

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use connector::{Connector, Listeners};
use cpc_redirect::{
    AddressWatch, AttachmentSpec, Counter, FailMode, Follower, Hook, LinkState, Linked, Presence,
    Redirect, RedirectError, Refusal, Verdict,
};
use ipnet::IpNet;
use lab::{
    Factory, Lab, Netns, OTHER_V4, PORT, TENANT, V4, V6, lab, lab_with_errno, remove_cgroup, rule,
};
use socket2::{Domain, Socket, Type};

/// A laboratory with an attachment and a running connector that serves all captured addresses.
struct Attached {
    redirect: Redirect,
    spec: AttachmentSpec,
    connector: Connector,
    client: Factory,
    lab: Lab,
}

impl Attached {
    fn new() -> Option<Self> {
        Self::with(lab()?, |redirect| redirect)
    }

    /// Returns the laboratory of a test that expects errnos.
    fn with_errno() -> Option<Self> {
        Self::with(lab_with_errno()?, |redirect| redirect)
    }

    fn with(lab: Lab, configure: impl Fn(Redirect) -> Redirect) -> Option<Self> {
        lab.netns.decoy(PORT);
        let listeners = Listeners::open(&lab.netns);
        let [listen4, listen6] = listeners.addresses();
        let spec = lab.spec(listen4, listen6);
        let redirect = configure(Redirect::new(lab.pin()));
        redirect
            .attach(&spec)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        serve_all(&redirect);
        let connector = Connector::start(&redirect, &spec.name, listeners);
        let client = Factory::new(lab.cgroup.path(), &lab.netns);
        Some(Self {
            redirect,
            spec,
            connector,
            client,
            lab,
        })
    }

    fn listen4(&self) -> SocketAddr {
        self.spec.listen4.unwrap().into()
    }

    fn listeners(&self) -> [SocketAddr; 2] {
        [self.listen4(), self.spec.listen6.unwrap().into()]
    }

    fn count(&self, counter: Counter) -> u64 {
        let counts = self.redirect.counters().unwrap().read().unwrap();
        counts
            .iter()
            .find(|count| count.counter == counter)
            .unwrap()
            .value
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn routes(redirect: &Redirect, routes: &[(&str, Verdict)]) {
    let routes: Vec<(u32, IpNet, Verdict)> = routes
        .iter()
        .map(|(cidr, verdict)| (TENANT, cidr.parse().unwrap(), *verdict))
        .collect();
    redirect.routes().unwrap().replace(&routes, false).unwrap();
}

fn serve_all(redirect: &Redirect) {
    routes(
        redirect,
        &[
            ("10.99.0.0/16", Verdict::Serve),
            ("fd99::/64", Verdict::Serve),
        ],
    );
}

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), PORT)
}

/// Connects a new socket of `factory`.
fn connect(factory: &Factory, to: SocketAddr) -> io::Result<Socket> {
    let socket = factory.tcp(Domain::for_address(to));
    socket.connect(&to.into())?;
    Ok(socket)
}

/// Timeout of an answer: the requested destination, or "decoy".
const PATIENCE: Duration = Duration::from_secs(10);

fn answer(socket: Socket) -> io::Result<String> {
    let mut answer = String::new();
    socket.set_read_timeout(Some(PATIENCE))?;
    TcpStream::from(socket).read_to_string(&mut answer)?;
    Ok(answer)
}

fn ask(factory: &Factory, to: SocketAddr) -> io::Result<String> {
    answer(connect(factory, to)?)
}

/// Returns the errno of a failed connect.
fn errno(factory: &Factory, to: SocketAddr) -> i32 {
    match connect(factory, to) {
        Ok(socket) => panic!("{to}: connected to {:?}", answer(socket)),
        Err(error) => error.raw_os_error().unwrap(),
    }
}
