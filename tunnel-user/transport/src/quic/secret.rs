//! The one persisted secret of a server, and the keys derived from it.
//!
//! Stateless resets, address-validation tokens and connection ids must survive a restart: the agent of
//! a restarted server learns of it at once from a reset that it can check, instead of waiting for the
//! idle timeout (RFC 9000 section 10.3).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aws_lc_rs::{hkdf, hmac, rand};

use cpc_host::directory::Directory;

/// Name of the file in the state directory.
const FILE: &str = "secret";

const SECRET_LEN: usize = 32;

/// Reason why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The state directory is not usable.
    #[error("{}: {why}; `state_dir` has to be a directory that this process may write", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        why: io::Error,
    },
    /// The file is truncated or not ours.
    #[error("{} is not a secret of {SECRET_LEN} bytes; remove it and a new one is made", .0.display())]
    Malformed(PathBuf),
}

/// A server's secret.
pub struct Secret(hkdf::Prk);

impl Secret {
    /// Reads `<state_dir>/secret`, or creates it (mode 0600) when it is missing.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn load_or_create(state_dir: &Path) -> Result<Self, SecretError> {
        let path = state_dir.join(FILE);
        let io = |why| SecretError::Io {
            path: path.clone(),
            why,
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => create(state_dir).map_err(io)?,
            Err(e) => return Err(io(e)),
        };
        if bytes.len() != SECRET_LEN {
            return Err(SecretError::Malformed(path));
        }
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"cpc/1");
        Ok(Self(salt.extract(&bytes)))
    }

    /// Returns the key of stateless reset tokens.
    pub fn reset_key(&self) -> hmac::Key {
        self.hmac_key(b"stateless reset")
    }

    /// Returns the key of connection ids.
    pub fn connection_id_key(&self) -> hmac::Key {
        self.hmac_key(b"connection id")
    }

    /// Returns the key of address-validation tokens (Retry and NEW_TOKEN).
    pub fn token_key(&self) -> hkdf::Prk {
        hkdf::Salt::new(hkdf::HKDF_SHA256, b"token").extract(&self.derive(b"token"))
    }

    fn hmac_key(&self, label: &[u8]) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.derive(label))
    }

    #[expect(
        clippy::expect_used,
        reason = "HKDF gives up to 255 hashes, and 32 bytes are one"
    )]
    fn derive(&self, label: &[u8]) -> [u8; 32] {
        let info = [label];
        let okm = self.0.expand(&info, hkdf::HKDF_SHA256);
        let mut key = [0; 32];
        okm.and_then(|okm| okm.fill(&mut key))
            .expect("one hash can be derived");
        key
    }
}

fn create(state_dir: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SECRET_LEN];
    rand::fill(&mut bytes).map_err(|_| io::Error::other("no random numbers"))?;
    Directory::create(state_dir, 0o755)?.replace(FILE, &bytes, 0o600)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_the_same_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let first = Secret::load_or_create(dir.path()).unwrap();
        let second = Secret::load_or_create(dir.path()).unwrap();
        let sign = |s: &Secret| hmac::sign(&s.reset_key(), b"x").as_ref().to_vec();
        assert_eq!(sign(&first), sign(&second));
        assert_ne!(
            sign(&first),
            hmac::sign(&first.connection_id_key(), b"x")
                .as_ref()
                .to_vec()
        );
    }

    #[test]
    fn a_cut_secret_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), b"short").unwrap();
        assert!(matches!(
            Secret::load_or_create(dir.path()),
            Err(SecretError::Malformed(_))
        ));
    }
}
