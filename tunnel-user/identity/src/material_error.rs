//! Faults of certificates, keys and CAs in files.

use std::path::PathBuf;

use super::identity::{Identity, IdentityError, Role};

/// Reason why TLS material was rejected.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    /// A file can't be read or holds no PEM.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Fault of the file.
        why: String,
    },
    /// The leaf has no identity.
    #[error("{}: {why}", path.display())]
    Identity {
        /// File of the certificate.
        path: PathBuf,
        /// Fault of the certificate.
        why: IdentityError,
    },
    /// The leaf has another role.
    #[error("{}: {identity} can't be used here, which needs a certificate for the role {expected}", path.display())]
    Role {
        /// File of the certificate.
        path: PathBuf,
        /// Identity in the certificate.
        identity: Identity,
        /// Expected role.
        expected: Role,
    },
    /// A renewed certificate has another identity than the running process.
    #[error("{}: {identity} is not the running {current}; restart to change the identity", path.display())]
    Another {
        /// File of the certificate.
        path: PathBuf,
        /// Identity in the certificate.
        identity: Box<Identity>,
        /// Identity of the process.
        current: Box<Identity>,
    },
    /// Key and certificate don't match.
    #[error("{}: the key is not that of the first certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// File of the certificate.
        cert: PathBuf,
        /// File of the key.
        key: PathBuf,
    },
    /// The key is of an unsupported kind.
    #[error(
        "{}: the key is of no kind that can be used: RSA with 2048 to 8192 bits, ECDSA with P-256,          P-384 or P-521, and Ed25519 are", .0.display()
    )]
    KeyKind(PathBuf),
}
