//! The misdeeds against the connector, and their expected effects.

/// Place of a misdeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Worker 2, whose certificate was stolen.
    Worker,
    /// The control-plane host.
    ControlPlane,
    /// The same, as the API server: its sockets are redirected.
    ApiServer,
}

/// Target of a misdeed, with the credentials: the arguments of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// The tunnel, with the certificate of worker 2.
    Tunnel,
    /// The tunnel, with none.
    TunnelWithout,
    /// The port of Konnectivity's agents, with the certificate of worker 2.
    Konnectivity,
    /// Worker 1's agent, as the servers that it also knows of.
    Agent,
    /// The Unix socket of HTTP CONNECT.
    Connect,
    /// Every port that a worker reaches.
    Outside,
    /// Every port of the control-plane host itself.
    Inside,
}

/// A misdeed. The names in `some` and `none` are those of the program's counts.
#[derive(Debug)]
pub(super) struct Misdeed {
    /// Name for people.
    pub(super) title: &'static str,
    /// Name for the program.
    pub(super) name: &'static str,
    pub(super) place: Place,
    pub(super) aim: Aim,
    /// Counts that must not be zero; otherwise the run shows nothing.
    pub(super) some: &'static [&'static str],
    /// Counts that must be zero.
    pub(super) none: &'static [&'static str],
    /// The server's log has a line with all of these.
    pub(super) server_says: &'static [&'static [&'static str]],
    /// Worker 1's agent's log has.
    pub(super) agent_says: &'static [&'static [&'static str]],
    /// Metrics of the server that must have grown.
    pub(super) metrics: &'static [&'static str],
    /// The server's audit has a record with all of these.
    pub(super) audit: &'static [&'static [&'static str]],
}

const NOTHING: Misdeed = Misdeed {
    title: "",
    name: "",
    place: Place::Worker,
    aim: Aim::Tunnel,
    some: &[],
    none: &[],
    server_says: &[],
    agent_says: &[],
    metrics: &[],
    audit: &[],
};

/// Misdeeds in their order.
pub(super) const ALL: &[Misdeed] = &[
    // First: of failed handshakes the log shows ten in ten seconds, and these are to be among them.
    Misdeed {
        title: "strangers connect as often as they can",
        name: "strangers",
        aim: Aim::TunnelWithout,
        some: &["handshakes", "ended by the server"],
        server_says: &[&["WARN", "handshake failed", "certificate"]],
        metrics: &["cpc_handshakes_failed_total{why=\"tls\"}"],
        audit: &[&["peer_refused", "tunnel"]],
        ..NOTHING
    },
    Misdeed {
        title: "an agent claims everything, as another",
        name: "claims",
        some: &["claims refused", "claims accepted, its own"],
        none: &["claims accepted, foreign"],
        server_says: &[&["WARN", "claims refused", "agent/w2", "0.0.0.0/0"]],
        metrics: &["cpc_claims_refused_total"],
        audit: &[&["claims_refused", "agent/w2", "10.99.1.2"]],
        ..NOTHING
    },
    Misdeed {
        title: "an agent sends garbage at every state",
        name: "garbage",
        some: &["bytes", "ended: protocol_error"],
        none: &["kept"],
        server_says: &[&["agent disconnected", "agent/w2", "protocol_error"]],
        audit: &[&["agent_disconnected", "agent/w2", "protocol_error"]],
        ..NOTHING
    },
    Misdeed {
        title: "an agent floods its control stream, and never reads",
        name: "deaf",
        some: &["pings"],
        none: &["kept"],
        server_says: &[&["agent disconnected", "agent/w2", "does not read"]],
        audit: &[&["agent_disconnected", "agent/w2", "protocol_error"]],
        ..NOTHING
    },
    Misdeed {
        title: "an agent opens streams towards the server",
        name: "opens",
        some: &["streams tried"],
        none: &["streams opened", "datagrams sent"],
        ..NOTHING
    },
    Misdeed {
        title: "an agent pours into 50 dialled streams, and never reads",
        name: "pours",
        some: &["dials", "bytes"],
        ..NOTHING
    },
    Misdeed {
        title: "an agent withholds a byte of 50 dialled streams, and sends what follows",
        name: "withholds",
        some: &["dials", "bytes behind a gap"],
        ..NOTHING
    },
    Misdeed {
        title: "an agent drains again and again",
        name: "drains",
        some: &["drains"],
        ..NOTHING
    },
    Misdeed {
        title: "a session is replayed",
        name: "replay",
        some: &["sessions recorded", "packets sent again"],
        ..NOTHING
    },
    Misdeed {
        title: "an agent connects as often as it can",
        name: "storm",
        some: &["handshakes", "ended by itself"],
        server_says: &[&["INFO", "agent disconnected", "agent/w2"]],
        ..NOTHING
    },
    Misdeed {
        title: "handshakes that stop after the first packet",
        name: "half-handshakes",
        some: &["first packets"],
        metrics: &["cpc_handshakes_retried_total"],
        ..NOTHING
    },
    Misdeed {
        title: "a foreign server, and an agent's certificate as a server's",
        name: "impostor",
        place: Place::ControlPlane,
        aim: Aim::Agent,
        some: &["agents that came", "agents that left"],
        none: &[
            "agents that believed it",
            "agents that introduced themselves",
        ],
        agent_says: &[
            &[
                "WARN",
                "server not reached",
                ":9000",
                "trust domain that is not trusted",
            ],
            &["WARN", "server not reached", ":9001", "for another role"],
        ],
        ..NOTHING
    },
    Misdeed {
        title: "a client asks for what is forbidden, unresolvable, loopback",
        name: "frontend",
        place: Place::ApiServer,
        aim: Aim::Connect,
        some: &["requests", "connects"],
        none: &["connected", "no answer"],
        server_says: &[&["policy_denied"], &["no_route"]],
        audit: &[&["policy_denied"]],
        ..NOTHING
    },
    Misdeed {
        title: "a slow-loris on every port that a worker reaches",
        name: "slow-loris",
        aim: Aim::Outside,
        some: &["connections"],
        none: &["connections kept", "connections refused"],
        server_says: &[
            &["WARN", "join listener", "the peer's network has its share"],
            &["WARN", "join failed"],
        ],
        metrics: &[
            "cpc_join_handshakes_failed_total{why=\"source_share\"}",
            "cpc_join_handshakes_failed_total{why=\"timeout\"}",
        ],
        audit: &[
            &["peer_refused", "join", "timed out"],
            &["peer_refused", "konnectivity", "timed out"],
        ],
        ..NOTHING
    },
    Misdeed {
        title: "a slow-loris on every port of the control-plane host",
        name: "slow-loris",
        place: Place::ControlPlane,
        aim: Aim::Inside,
        some: &["connections"],
        none: &["connections kept", "connections refused"],
        server_says: &[&["WARN", "frontend handshake not finished in time"]],
        metrics: &["cpc_frontend_handshakes_failed_total{why=\"timeout\"}"],
        audit: &[&["peer_refused", "frontend", "timed out"]],
        ..NOTHING
    },
    Misdeed {
        title: "floods of HTTP/2 on Konnectivity's port",
        name: "http2",
        aim: Aim::Konnectivity,
        some: &["rapid resets sent", "ended by the server"],
        ..NOTHING
    },
];
