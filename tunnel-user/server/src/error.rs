//! Errors of a server's start.

use std::io;

use cpc_config::ConfigError;
use cpc_handover::HandoverError;
use cpc_host::privileges::PrivilegeError;
use cpc_identity::TrustDomain;
use cpc_identity::issue::IssueError;
use cpc_identity::join::IssueLogError;
use cpc_identity::material::MaterialError;
use cpc_kubernetes::AccessError;
use cpc_redirect::RedirectError;
use cpc_transport::quic::config::EndpointError;
use cpc_transport::quic::secret::SecretError;

use crate::attachments::AttachError;

/// Reason why a server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The persisted secret is unusable.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// An attachment of the redirect failed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The capabilities can't be dropped.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The maps of the redirect can't be used.
    #[error("redirect")]
    Redirect(#[from] RedirectError),
    /// The endpoint of the tunnel can't be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A socket can't be opened.
    #[error("{what}: {why}")]
    Socket {
        /// Name of the socket.
        what: String,
        /// Error of the system call.
        why: io::Error,
    },
    /// There is no access to the Kubernetes API.
    #[error(transparent)]
    Kubernetes(#[from] AccessError),
    /// A system call at start failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The CA that issues certificates is unusable.
    #[error("join.ca: {0}")]
    Authority(IssueError),
    /// The file of tokens is unusable.
    #[error("join: {0}")]
    IssueLog(IssueLogError),
    /// The CA of joining agents belongs to another trust domain.
    #[error(
        "join.ca is of {ca}, and our own certificate of {own}: agents join the trust domain of their servers"
    )]
    JoinDomain {
        /// Trust domain of the CA.
        ca: TrustDomain,
        /// Our trust domain.
        own: TrustDomain,
    },
    /// The configuration uses a protocol that this program does not have.
    #[error(
        "this program has no part for the protocols of Konnectivity, which the configuration uses"
    )]
    NoExtension,
    /// The running process does not hand over.
    #[error("takeover")]
    Handover(#[from] HandoverError),
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}

impl From<IssueError> for ServerError {
    fn from(why: IssueError) -> Self {
        Self::Authority(why)
    }
}

impl From<IssueLogError> for ServerError {
    fn from(why: IssueLogError) -> Self {
        Self::IssueLog(why)
    }
}
