//! Random histories against a reference: whatever connects, claims, drains, falls silent, leaves and
//! comes back, under whichever policy, a destination is asked only of who is entitled to it.
//!
//! The reference knows nothing of how the registry keeps its books. It is told who is connected and
//! what each says, and derives from the certificates and the policy alone what may be.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use ipnet::IpNet;
use proptest::option::of;
use proptest::prelude::{ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::sample::{Index, subsequence};
use tokio::sync::Notify;
use tunnel_proto::preface::Host;

use super::*;
use cpc_config::TunnelKind;
use cpc_config::server::{GrantConfig, PolicyConfig, RoutingConfig};
use cpc_identity::{Identity, Role};
use cpc_transport::tunnel::{Path, Probe};

/// An agent that may connect, any number of times.
#[derive(Debug)]
struct Agent {
    tenant: &'static str,
    name: &'static str,
    certified: &'static [&'static str],
    kind: TunnelKind,
    trust: Trust,
}

const fn agent(
    tenant: &'static str,
    name: &'static str,
    certified: &'static [&'static str],
) -> Agent {
    Agent {
        tenant,
        name,
        certified,
        kind: TunnelKind::Quic,
        trust: Trust::Granted,
    }
}

/// Two certificates of tenant a name the same node, and tenant b has nodes of the same addresses.
const AGENTS: [Agent; 8] = [
    agent("a", "w1", &["10.0.0.1"]),
    agent("a", "w2", &["10.0.0.2"]),
    agent("a", "twin", &["10.0.0.2", "10.0.0.3"]),
    agent("a", "gw1", &[]),
    agent("a", "gw2", &["10.0.0.4"]),
    agent("b", "w1", &["10.0.0.1", "10.0.0.2"]),
    Agent {
        kind: TunnelKind::Konnectivity,
        ..agent("a", "gw3", &[])
    },
    Agent {
        kind: TunnelKind::Konnectivity,
        trust: Trust::Believed,
        ..agent("b", "k1", &[])
    },
];

/// A grant of the policy.
#[derive(Clone, Copy, Debug)]
struct Rule {
    pattern: &'static str,
    /// Granted names, for the reference.
    names: &'static [(&'static str, &'static str)],
    cidr: Option<&'static str>,
    name: Option<&'static str>,
    default_route: bool,
}

const RULES: [Rule; 4] = [
    Rule {
        pattern: "spiffe://a/agent/gw*",
        names: &[("a", "gw1"), ("a", "gw2"), ("a", "gw3")],
        cidr: Some("10.0.0.0/8"),
        name: Some("*.svc"),
        default_route: false,
    },
    Rule {
        pattern: "spiffe://*/agent/w1",
        names: &[("a", "w1"), ("b", "w1")],
        cidr: Some("10.0.0.0/29"),
        name: None,
        default_route: false,
    },
    Rule {
        pattern: "spiffe://a/agent/gw1",
        names: &[("a", "gw1")],
        cidr: Some("10.0.0.0/30"),
        name: Some("web.svc"),
        default_route: true,
    },
    Rule {
        pattern: "spiffe://b/*/k1",
        names: &[("b", "k1")],
        cidr: Some("10.1.0.0/16"),
        name: None,
        default_route: true,
    },
];

fn universe() -> Vec<Claim> {
    let addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"];
    let nets = ["10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/30", "10.0.0.2/32"];
    let names = ["web.svc", "*.svc"];
    let addresses = addresses.map(|text| Claim::Address(text.parse().unwrap()));
    let nets = nets.map(|text| Claim::Cidr(text.parse().unwrap()));
    let names = names.map(|text| Claim::Name(text.parse().unwrap()));
    let all = addresses.into_iter().chain(nets).chain(names);
    all.chain([Claim::DefaultRoute]).collect()
}

type Within = fn(&str, &str) -> bool;

fn net_within(outer: &str, inner: &str) -> bool {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    net(outer).contains(&net(inner))
}

/// There are two names only.
fn name_within(outer: &str, inner: &str) -> bool {
    outer == inner || outer == "*.svc" && inner == "web.svc"
}

/// Destinations of the clients.
const HOSTS: [&str; 8] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "10.0.0.4",
    "10.1.2.3",
    "192.0.2.1",
    "web.svc",
    "db.svc",
];

#[derive(Clone, Debug)]
enum Event {
    /// Agent, its process, the process that it reports to have ended, and its offer.
    Connect(usize, u8, Option<u8>, Vec<Claim>),
    Offer(Index, Vec<Claim>),
    Disconnect(Index),
    Silent(Index, bool),
    Draining(Index, bool),
    Policy(Vec<Rule>),
}

fn any_event() -> impl Strategy<Value = Event> {
    let offer = || subsequence(universe(), 0..=4);
    prop_oneof![
        4 => (0..AGENTS.len(), 0..3_u8, of(0..3_u8), offer())
            .prop_map(|(who, instance, ended, offer)| Event::Connect(who, instance, ended, offer)),
        2 => (any::<Index>(), offer()).prop_map(|(which, offer)| Event::Offer(which, offer)),
        2 => any::<Index>().prop_map(Event::Disconnect),
        1 => any::<(Index, bool)>().prop_map(|(which, is)| Event::Silent(which, is)),
        1 => any::<(Index, bool)>().prop_map(|(which, is)| Event::Draining(which, is)),
        1 => subsequence(RULES.to_vec(), 0..=RULES.len()).prop_map(Event::Policy),
    ]
}

/// A connection as the reference knows it.
#[derive(Clone, Debug)]
struct Connected {
    info: Arc<LinkInfo>,
    who: usize,
    instance: u8,
    silent: bool,
    offer: Vec<Claim>,
}

/// Reference for the registry.
#[derive(Debug, Default)]
struct Reference {
    rules: Vec<Rule>,
    /// The oldest first.
    connected: Vec<Connected>,
}

impl Connected {
    fn agent(&self) -> &'static Agent {
        &AGENTS[self.who]
    }

    fn is_certified(&self, address: &str) -> bool {
        self.agent().certified.contains(&address)
    }

    fn is_available(&self) -> bool {
        self.info.is_available()
    }
}

impl Reference {
    /// Whether the certificate or the policy lets `link` serve `claim`, leaving rivals aside.
    fn is_entitled(&self, link: &Connected, claim: &Claim) -> bool {
        let agent = link.agent();
        if agent.trust == Trust::Believed {
            return true;
        }
        let alone = format!("spiffe://{}/agent/{}", agent.tenant, agent.name);
        let is_own = |rule: &&Rule| rule.names.contains(&(agent.tenant, agent.name));
        let own = self.rules.iter().filter(is_own);
        // What several are granted is claimed as it is granted, and what one is granted is not
        // claimed within what others are.
        let judge = |claim: &str, range: fn(&Rule) -> Option<&'static str>, within: Within| {
            own.clone().filter_map(range).any(|granted| {
                let others = self.rules.iter().filter(|rule| rule.pattern != alone);
                let mut between = others
                    .filter_map(range)
                    .filter(|other| within(other, claim) && within(granted, other));
                within(granted, claim) && (granted == claim || between.next().is_none())
            })
        };
        match claim {
            Claim::Address(addr) if link.is_certified(&addr.to_string()) => true,
            Claim::Address(addr) => {
                let net = IpNet::from(*addr).to_string();
                judge(&net, |rule| rule.cidr, net_within)
            }
            Claim::Cidr(net) => {
                let alone = net.prefix_len() == net.max_prefix_len();
                let is_own = alone && link.is_certified(&net.addr().to_string());
                is_own || judge(&net.to_string(), |rule| rule.cidr, net_within)
            }
            Claim::Name(name) => judge(&name.to_string(), |rule| rule.name, name_within),
            Claim::DefaultRoute => own.clone().any(|rule| rule.default_route),
        }
    }

    /// Whether `link` says, and may say, that it is the node at `addr`.
    fn contends(&self, link: &Connected, addr: IpAddr) -> bool {
        let names = |claim: &&Claim| match claim {
            Claim::Address(own) => *own == addr,
            Claim::Cidr(net) => *net == IpNet::from(addr),
            _ => false,
        };
        let mut claims = link.offer.iter().filter(names);
        claims.any(|claim| self.is_entitled(link, claim))
    }

    /// Identities that have the best right to a node address; one of them has it. Agents that are heard
    /// come before silent ones, then those whose certificate has the address.
    fn best(&self, tenant: &str, addr: IpAddr) -> Vec<&'static str> {
        let rightful = self.connected.iter().filter(|link| {
            let agent = link.agent();
            agent.trust == Trust::Granted && agent.tenant == tenant && self.contends(link, addr)
        });
        let right = |link: &Connected| (!link.silent, link.is_certified(&addr.to_string()));
        let most = rightful.clone().map(right).max();
        let best = rightful.filter(|link| Some(right(link)) == most);
        best.map(|link| link.agent().name).collect()
    }

    /// Whether dials may go to `link`, as far as its process and its health go.
    fn takes_dials(&self, link: &Connected) -> bool {
        let is_konnectivity = link.agent().kind == TunnelKind::Konnectivity;
        if is_konnectivity {
            return link.info.is_available() || link.info.is_last_resort();
        }
        let mut siblings = self
            .connected
            .iter()
            .filter(|other| other.who == link.who)
            .rev();
        let newest = siblings.find(|other| other.is_available());
        let is_chosen = newest.is_none_or(|newest| newest.instance == link.instance);
        is_chosen && (link.is_available() || link.info.is_last_resort())
    }

    /// The links of `who`'s other processes.
    fn other_processes(&self, who: usize, instance: u8) -> impl Iterator<Item = &Connected> {
        let quic = move |link: &&Connected| link.agent().kind == TunnelKind::Quic;
        let own = self.connected.iter().filter(move |link| link.who == who);
        own.filter(quic).filter(move |l| l.instance != instance)
    }

    fn covers(claim: &Claim, host: &Host) -> bool {
        match (claim, host) {
            (Claim::Address(addr), Host::Ip(host)) => addr == host,
            (Claim::Cidr(net), Host::Ip(host)) => net.contains(host),
            (Claim::Name(pattern), Host::Name(host)) => pattern.matches(host),
            (Claim::DefaultRoute, _) => true,
            _ => false,
        }
    }
}

struct Run {
    registry: Registry,
    reference: Reference,
    /// Links that the last event is to end.
    ended: BTreeSet<LinkId>,
    /// Links that are to give a life sign after it.
    challenged: BTreeSet<LinkId>,
    now: Instant,
    last: u64,
}

impl Run {
    fn new() -> Self {
        let strategies = RoutingConfig::default().strategies;
        Self {
            registry: Registry::new(Grants::default(), &strategies, Duration::from_secs(60)),
            reference: Reference::default(),
            ended: BTreeSet::new(),
            challenged: BTreeSet::new(),
            now: Instant::now(),
            last: 0,
        }
    }

    fn connect(&mut self, who: usize, instance: u8, ended: Option<u8>, offer: Vec<Claim>) {
        self.last += 1;
        let agent = &AGENTS[who];
        let identity = Identity {
            trust_domain: agent.tenant.parse().unwrap(),
            role: Role::Agent,
            name: agent.name.into(),
            addresses: agent.certified.iter().map(|a| a.parse().unwrap()).collect(),
        };
        let path = Path {
            remote: "127.0.0.1:1".parse().unwrap(),
            rtt: Duration::ZERO,
            mtu: None,
            since_packet: Duration::ZERO,
            since_data: Duration::ZERO,
        };
        let probe = Probe::new(move || path);
        let place = (LinkId(self.last), 0);
        let info = LinkInfo::new(place, agent.kind, (identity, agent.trust), probe);
        if agent.kind == TunnelKind::Quic {
            // Of either release.
            let serves = instance.is_multiple_of(2);
            info.serves_while_draining.store(serves, Ordering::Relaxed);
        }
        let process = |instance| InstanceId([instance; 16]);
        self.registry
            .connect(info.clone(), process(instance), offer.clone(), self.now);
        self.registry.succeed(info.id, ended.map(process));
        if agent.kind == TunnelKind::Quic {
            for link in self.reference.other_processes(who, instance) {
                match link.silent || ended == Some(link.instance) {
                    true => self.ended.insert(link.info.id),
                    false => self.challenged.insert(link.info.id),
                };
            }
        } else {
            let own = self.reference.connected.iter();
            let own = own.filter(|l| l.who == who && l.instance == instance && l.silent);
            self.ended.extend(own.map(|link| link.info.id));
        }
        self.reference.connected.push(Connected {
            info,
            who,
            instance,
            silent: false,
            offer,
        });
    }

    fn happens(&mut self, event: Event) {
        let count = self.reference.connected.len();
        let pick = |index: Index| (count > 0).then(|| index.index(count));
        match event {
            Event::Connect(who, instance, ended, offer) => {
                self.connect(who, instance, ended, offer);
            }
            Event::Offer(which, offer) => {
                if let Some(at) = pick(which) {
                    let link = &mut self.reference.connected[at];
                    link.offer.clone_from(&offer);
                    self.registry.offer(link.info.id, offer, self.now).unwrap();
                }
            }
            Event::Disconnect(which) => {
                if let Some(at) = pick(which) {
                    let link = self.reference.connected.remove(at);
                    self.registry.disconnect(link.info.id, self.now);
                }
            }
            Event::Silent(which, is) => {
                if let Some(at) = pick(which) {
                    self.silent(at, is);
                }
            }
            Event::Draining(which, is) => {
                if let Some(at) = pick(which) {
                    let info = &self.reference.connected[at].info;
                    info.draining.store(is, Ordering::Relaxed);
                }
            }
            Event::Policy(rules) => {
                let grants = rules.iter().map(|rule| GrantConfig {
                    identity: rule.pattern.into(),
                    cidrs: rule.cidr.iter().map(|net| net.parse().unwrap()).collect(),
                    names: rule.name.iter().map(|name| (*name).into()).collect(),
                    default_route: rule.default_route,
                });
                let policy = PolicyConfig {
                    grants: grants.collect(),
                };
                let grants = Grants::new(&policy).unwrap();
                self.registry.set_grants(grants, self.now);
                self.reference.rules = rules;
            }
        }
    }

    fn silent(&mut self, at: usize, is: bool) {
        let link = &mut self.reference.connected[at];
        let falls = !std::mem::replace(&mut link.silent, is) && is;
        let link = self.reference.connected[at].clone();
        link.info.silent.store(is, Ordering::Relaxed);
        self.registry.changed(link.info.id, self.now);
        let mut others = self.reference.other_processes(link.who, link.instance);
        let mut later = others.by_ref().filter(|other| other.info.id > link.info.id);
        let is_quic = link.agent().kind == TunnelKind::Quic;
        if falls && is_quic && later.any(|other| !other.silent) {
            self.ended.insert(link.info.id);
        }
    }

    /// Ended are links of processes that are known to be gone, and no others.
    fn check_successions(&mut self) {
        let told = |notify: fn(&LinkInfo) -> &Notify| {
            let links = self.reference.connected.iter().map(|link| &link.info);
            let told = links.filter(|info| notify(info).notified().now_or_never().is_some());
            told.map(|info| info.id).collect::<BTreeSet<_>>()
        };
        let (ended, challenged) = (told(|info| &info.replaced), told(|info| &info.challenged));
        assert_eq!(std::mem::take(&mut self.ended), ended);
        assert_eq!(std::mem::take(&mut self.challenged), challenged);
    }

    fn session(&self, link: &Connected) -> &Session {
        let mut sessions = self.registry.sessions();
        sessions.find(|s| s.info.id == link.info.id).unwrap()
    }

    /// Each claim that counts is offered and entitled; all that is offered either counts or is
    /// refused.
    fn check_claims(&self) {
        for link in &self.reference.connected {
            let session = self.session(link);
            for claim in &session.claims {
                let offered = link.offer.iter().any(|o| *o == *claim || same(o, claim));
                assert!(offered, "{claim} was not offered by {link:?}");
                assert!(
                    self.reference.is_entitled(link, claim),
                    "{claim} of {link:?}"
                );
            }
            let judged = session.claims.len() + session.refused.len();
            assert_eq!(judged, link.offer.len(), "{session:?}");
        }
    }

    /// A node address with entitled agents belongs to one identity, among those with the best right.
    fn check_owners(&self) {
        for tenant in ["a", "b"] {
            for addr in ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"] {
                let addr: IpAddr = addr.parse().unwrap();
                let best = self.reference.best(tenant, addr);
                let sessions = self.registry.sessions().filter(|session| {
                    let identity = &session.info.identity;
                    session.info.trust == Trust::Granted
                        && identity.trust_domain.to_string() == tenant
                        && session.claims.contains(&Claim::Address(addr))
                });
                let owners: BTreeSet<_> = sessions.map(|s| &*s.info.identity.name).collect();
                let owners: Vec<_> = owners.into_iter().collect();
                assert!(
                    owners.len() <= 1,
                    "{addr} of {tenant} has owners {owners:?}"
                );
                assert_eq!(
                    owners.is_empty(),
                    best.is_empty(),
                    "{addr} of {tenant}: {best:?}"
                );
                let rightful = owners.iter().all(|owner| best.contains(owner));
                assert!(rightful, "{addr} of {tenant} is {owners:?}, not {best:?}");
            }
        }
    }

    /// Dials go only to links that may serve them, and to one as soon as there is any.
    fn check_dials(&self) {
        let routes = self.registry.routes();
        for tenant in ["a", "b"] {
            for host in HOSTS {
                let host: Host = host.parse().unwrap();
                let found = routes.candidates(&tenant.parse().unwrap(), &host);
                let found = found.unwrap_or_default();
                let may = |link: &&Connected| {
                    let claims = &self.session(link).claims;
                    link.agent().tenant == tenant
                        && self.reference.takes_dials(link)
                        && claims.iter().any(|claim| Reference::covers(claim, &host))
                };
                let may: Vec<_> = self.reference.connected.iter().filter(may).collect();
                for link in &found {
                    let is_one = may.iter().any(|other| other.info.id == link.id);
                    assert!(is_one, "{host} of {tenant} asked of {link:?}");
                }
                assert_eq!(
                    found.is_empty(),
                    may.is_empty(),
                    "{host} of {tenant}: {may:?}"
                );
            }
        }
    }

    /// The two views of who holds what agree.
    fn check_books(&self) {
        let held: usize = self.registry.holders.values().map(BTreeSet::len).sum();
        let sessions = self.registry.sessions.values();
        let claimed = sessions.map(|s| s.claims.iter().collect::<HashSet<_>>().len());
        assert_eq!(held, claimed.sum::<usize>());
    }
}

/// A network of one address is that address.
fn same(offered: &Claim, claim: &Claim) -> bool {
    match (offered, claim) {
        (Claim::Cidr(net), Claim::Address(addr)) => *net == IpNet::from(*addr),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nobody_is_asked_for_what_is_not_theirs(
        events in proptest::collection::vec(any_event(), 1..40)
    ) {
        let mut run = Run::new();
        for event in events {
            run.happens(event);
            run.check_successions();
            run.check_claims();
            run.check_owners();
            run.check_dials();
            run.check_books();
        }
    }
}
