//! Messages that carry more than numbers, in checked form, and their conversion to and from the
//! wire.

use std::fmt;
use std::time::Duration;

use prost::Message as _;

use super::{MessageError, SessionError};
use crate::control::envelope::Message;
use crate::control::{self, MAX_FRAME, Offer, VERSION, Version};
use crate::route::{Claim, MAX_CLAIMS, from_offer, to_offer};
use crate::text::{name, sanitized};

/// The longest text in a message (a name, a release, a refusal), in bytes.
pub const MAX_TEXT: usize = 253;

/// The most features in a [`Hello`].
pub const MAX_FEATURES: usize = 64;

/// The feature of an agent that takes dials while it drains. Earlier releases refuse them.
pub const SERVES_WHILE_DRAINING: &str = "serves-while-draining";

/// The feature of an agent whose connections can outlive their tunnel ([`resumption`](crate::resumption)).
pub const HOLDS_SESSIONS: &str = "holds-sessions";

/// Random bytes of one process, which distinguish a restart from a second tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub [u8; 16]);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// An agent introduces itself.
///
/// No text is longer than [`MAX_TEXT`] or holds control characters; none is proof of anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The version that the agent speaks: [`VERSION`] for this release.
    pub version: Version,
    /// The agent's name as people know it.
    pub agent_id: String,
    /// The agent's process.
    pub instance_id: InstanceId,
    /// The node that the agent runs on.
    pub node: String,
    /// The release of the agent's software.
    pub software_version: String,
    /// Abilities beyond the version's, at most [`MAX_FEATURES`].
    pub features: Vec<String>,
    /// Claims that the agent offers.
    pub offer: Vec<Claim>,
    /// An earlier process of the agent that has certainly ended.
    pub predecessor: Option<InstanceId>,
    /// Number of processes that had the instance id before. All have ended.
    pub incarnation: u64,
}

impl Hello {
    /// Whether the agent takes dials while it drains.
    #[must_use]
    pub fn serves_while_draining(&self) -> bool {
        self.features.iter().any(|f| f == SERVES_WHILE_DRAINING)
    }

    /// Whether connections over the agent can outlive their tunnel.
    #[must_use]
    pub fn holds_sessions(&self) -> bool {
        self.features.iter().any(|f| f == HOLDS_SESSIONS)
    }
}

/// A server takes an agent in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The version that the server speaks: [`VERSION`] for this release.
    pub version: Version,
    /// Server id; a text as those of agents.
    pub server_id: String,
    /// Number of servers, at least 1.
    pub server_count: u32,
    /// The server's process.
    pub instance_id: InstanceId,
    /// The part of the offer that connections will be sent for.
    pub accepted: Vec<Claim>,
    /// Refused claims with the cause. Where not all fit into a message, the last are not sent: a
    /// claim that is not accepted is refused, listed or not.
    pub refused: Vec<Refusal>,
    /// Interval without a life sign of the server after which the agent should send a Ping, in
    /// whole milliseconds. Zero: the agent chooses.
    pub heartbeat: Duration,
    /// Number of processes that had the instance id before. All have ended.
    pub incarnation: u64,
}

/// Claim that a server did not accept.
///
/// Texts are cut to [`MAX_TEXT`] and control characters in them replaced on their way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The claim's text.
    pub claim: String,
    /// Missing grant, and the place to add it.
    pub why: String,
}

impl From<&Hello> for control::Hello {
    fn from(hello: &Hello) -> Self {
        Self {
            version: Some(hello.version),
            agent_id: hello.agent_id.clone(),
            instance_id: hello.instance_id.0.to_vec(),
            node: hello.node.clone(),
            software_version: hello.software_version.clone(),
            features: hello.features.clone(),
            offer: Some(to_offer(&hello.offer)),
            predecessor: hello.predecessor.map_or_else(Vec::new, |id| id.0.to_vec()),
            incarnation: hello.incarnation,
        }
    }
}

impl TryFrom<control::Hello> for Hello {
    type Error = SessionError;

    fn try_from(wire: control::Hello) -> Result<Self, SessionError> {
        // First: another major version may have given the other fields other rules.
        let version = supported(wire.version)?;
        let checked = || {
            Ok(Self {
                version,
                agent_id: name("the agent's id", wire.agent_id)?,
                instance_id: instance_id(&wire.instance_id)?,
                node: name("the node", wire.node)?,
                software_version: name("the software's version", wire.software_version)?,
                features: features(wire.features)?,
                offer: claims(wire.offer)?,
                predecessor: match &*wire.predecessor {
                    [] => None,
                    bytes => Some(instance_id(bytes)?),
                },
                incarnation: wire.incarnation,
            })
        };
        checked().map_err(|error| SessionError::Invalid {
            message: "Hello",
            error,
        })
    }
}

impl From<&Welcome> for control::Welcome {
    fn from(welcome: &Welcome) -> Self {
        let mut wire = Self {
            version: Some(welcome.version),
            server_id: welcome.server_id.clone(),
            server_count: welcome.server_count,
            instance_id: welcome.instance_id.0.to_vec(),
            accepted: Some(to_offer(&welcome.accepted)),
            refused: Vec::new(),
            heartbeat_ms: milliseconds(welcome.heartbeat),
            incarnation: welcome.incarnation,
        };
        wire.refused = refusals_that_fit(&welcome.refused, wire.encoded_len());
        wire
    }
}

impl TryFrom<control::Welcome> for Welcome {
    type Error = SessionError;

    fn try_from(wire: control::Welcome) -> Result<Self, SessionError> {
        let version = supported(wire.version)?;
        let checked = || {
            if wire.server_count == 0 {
                return Err(MessageError::NoServers);
            }
            Ok(Self {
                version,
                server_id: name("the server's id", wire.server_id)?,
                server_count: wire.server_count,
                instance_id: instance_id(&wire.instance_id)?,
                accepted: claims(wire.accepted)?,
                refused: refusals(wire.refused),
                heartbeat: Duration::from_millis(wire.heartbeat_ms.into()),
                incarnation: wire.incarnation,
            })
        };
        checked().map_err(|error| SessionError::Invalid {
            message: "Welcome",
            error,
        })
    }
}

/// Returns the answer to an offer.
pub(super) fn verdict(accepted: &[Claim], refused: &[Refusal]) -> control::RoutesVerdict {
    let mut wire = control::RoutesVerdict {
        accepted: Some(to_offer(accepted)),
        refused: Vec::new(),
    };
    wire.refused = refusals_that_fit(refused, wire.encoded_len());
    wire
}

/// Reads the answer to an offer.
pub(super) fn from_verdict(
    wire: control::RoutesVerdict,
) -> Result<(Vec<Claim>, Vec<Refusal>), SessionError> {
    let accepted = claims(wire.accepted).map_err(|error| SessionError::Invalid {
        message: "RoutesVerdict",
        error,
    })?;
    Ok((accepted, refusals(wire.refused)))
}

/// Reads an offer.
pub(super) fn from_routes(wire: control::Routes) -> Result<Vec<Claim>, SessionError> {
    claims(wire.offer).map_err(|error| SessionError::Invalid {
        message: "Routes",
        error,
    })
}

/// Returns the name of a message, for errors.
pub(crate) fn message_name(message: &Message) -> &'static str {
    match message {
        Message::Hello(_) => "Hello",
        Message::Welcome(_) => "Welcome",
        Message::Routes(_) => "Routes",
        Message::RoutesVerdict(_) => "RoutesVerdict",
        Message::Ping(_) => "Ping",
        Message::Pong(_) => "Pong",
        Message::Drain(_) => "Drain",
        Message::Statistics(_) => "Statistics",
        Message::CertificateRequest(_) => "CertificateRequest",
        Message::CertificateAnswer(_) => "CertificateAnswer",
        Message::JoinRequest(_) => "JoinRequest",
        Message::NoMoreStreams(_) => "NoMoreStreams",
    }
}

/// Returns milliseconds for the wire, whose longest duration is 49 days.
pub(super) fn milliseconds(duration: Duration) -> u32 {
    duration.as_millis().try_into().unwrap_or(u32::MAX)
}

fn supported(version: Option<Version>) -> Result<Version, SessionError> {
    match version.unwrap_or_default() {
        version if version.major == VERSION.major => Ok(version),
        version => Err(SessionError::UnsupportedVersion(version)),
    }
}

fn instance_id(bytes: &[u8]) -> Result<InstanceId, MessageError> {
    bytes
        .try_into()
        .map(InstanceId)
        .map_err(|_| MessageError::InstanceId(bytes.len()))
}

fn features(features: Vec<String>) -> Result<Vec<String>, MessageError> {
    if features.len() > MAX_FEATURES {
        return Err(MessageError::TooManyFeatures(features.len()));
    }
    features
        .into_iter()
        .map(|feature| name("a feature", feature))
        .collect()
}

fn claims(offer: Option<Offer>) -> Result<Vec<Claim>, MessageError> {
    Ok(from_offer(&offer.unwrap_or_default())?)
}

fn refusals(wire: Vec<control::Refusal>) -> Vec<Refusal> {
    let refusals = wire.iter().take(MAX_CLAIMS);
    refusals
        .map(|refusal| Refusal {
            claim: sanitized(&refusal.claim),
            why: sanitized(&refusal.why),
        })
        .collect()
}

/// Returns as many refusals as a message that has `used` bytes without them has room for.
fn refusals_that_fit(refusals: &[Refusal], used: usize) -> Vec<control::Refusal> {
    /// Maximum size of a tag and a length: around the message, and around each refusal in it.
    const OVERHEAD: usize = 1 + 3;
    let mut used = used + OVERHEAD;
    let refusals = refusals
        .iter()
        .take(MAX_CLAIMS)
        .map(|refusal| control::Refusal {
            claim: sanitized(&refusal.claim),
            why: sanitized(&refusal.why),
        });
    refusals
        .take_while(|refusal| {
            used += refusal.encoded_len() + OVERHEAD;
            used <= MAX_FRAME
        })
        .collect()
}
