//! Peers who count no more, though a CA vouches for them: a file of identities and serial numbers.
//!
//! A handshake looks at the list once; whoever holds something of a peer that lives long waits for
//! [`Revocations::strike`] beside it, so that a list which names the peer ends that too.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::identity::Identity;
use super::material::{self, MaterialError};

/// The list in force.
#[derive(Debug)]
pub struct Revocations {
    file: Option<PathBuf>,
    list: watch::Sender<List>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct List {
    identities: HashSet<String>,
    /// Without leading zeros.
    serials: HashSet<Vec<u8>>,
}

/// What a list may know a peer by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    identity: Option<String>,
    serial: Option<Vec<u8>>,
}

/// The entry that names a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} has been revoked (tls.revoked)")]
pub struct Revoked(String);

impl Peer {
    /// Whose certificate that is.
    pub fn of(leaf: &CertificateDer<'_>) -> Self {
        let identity = Identity::from_certificate(leaf).ok();
        let certificate = X509Certificate::from_der(leaf).ok();
        Self {
            identity: identity.map(|identity| identity.uri()),
            serial: certificate.map(|(_, it)| trimmed(it.raw_serial()).to_vec()),
        }
    }

    /// Whoever is called so, by any certificate.
    pub fn called(uri: String) -> Self {
        Self {
            identity: Some(uri),
            serial: None,
        }
    }

    /// The same, as who it has been taken for.
    #[must_use]
    pub fn known_as(self, identity: &Identity) -> Self {
        Self {
            identity: Some(identity.uri()),
            ..self
        }
    }
}

impl Revocations {
    /// Reads the list; without a file nobody is on it, for good.
    ///
    /// # Errors
    /// [`MaterialError::File`] naming the line that can't be read.
    pub fn load(file: Option<PathBuf>) -> Result<Arc<Self>, MaterialError> {
        let list = match &file {
            Some(file) => read(file)?,
            None => List::default(),
        };
        let list = watch::Sender::new(list);
        Ok(Arc::new(Self { file, list }))
    }

    /// A list that names nobody, for good.
    pub fn none() -> Arc<Self> {
        Arc::new(Self {
            file: None,
            list: watch::Sender::new(List::default()),
        })
    }

    /// Whether the list names `peer`.
    ///
    /// # Errors
    /// [`Revoked`]: it does.
    pub fn check(&self, peer: &Peer) -> Result<(), Revoked> {
        self.list.borrow().check(peer)
    }

    /// The same for the holder of a certificate, who need not be one of ours.
    ///
    /// # Errors
    /// [`Revoked`].
    pub fn check_certificate(&self, leaf: &CertificateDer<'_>) -> Result<(), Revoked> {
        // Most lists are empty: then nothing has to be read.
        if self.list.borrow().is_empty() {
            return Ok(());
        }
        self.check(&Peer::of(leaf))
    }

    /// Waits until the list names `peer`.
    pub async fn strike(&self, peer: &Peer) -> Revoked {
        let mut list = self.list.subscribe();
        loop {
            if let Err(revoked) = list.borrow_and_update().check(peer) {
                return revoked;
            }
            if list.changed().await.is_err() {
                // Not while `self` is borrowed.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Reads the file again when it changes, for ever, and calls `changed` then.
    pub async fn watch(self: Arc<Self>, changed: impl Fn()) {
        let Some(file) = &self.file else {
            return;
        };
        let fingerprint = || material::fingerprint([file]);
        let mut last = fingerprint();
        let reload = || {
            let now = fingerprint();
            if now != last {
                let list = read(file)?;
                last = now;
                tracing::info!(
                    identities = list.identities.len(),
                    serials = list.serials.len(),
                    "list of revoked peers reloaded"
                );
                self.list.send_replace(list);
                changed();
            }
            Ok(())
        };
        material::watch(reload).await;
    }
}

impl List {
    fn is_empty(&self) -> bool {
        self.identities.is_empty() && self.serials.is_empty()
    }

    fn check(&self, peer: &Peer) -> Result<(), Revoked> {
        if let Some(identity) = &peer.identity
            && self.identities.contains(identity)
        {
            return Err(Revoked(identity.clone()));
        }
        match &peer.serial {
            Some(serial) if self.serials.contains(serial) => {
                Err(Revoked(format!("serial:{}", Hex(serial))))
            }
            _ => Ok(()),
        }
    }

    /// A line each: an identity, or `serial:` and hexadecimal digits, as `openssl x509 -serial` prints
    /// them. What follows a `#` is for people.
    fn parse(text: &str) -> Result<Self, String> {
        let mut list = Self::default();
        for (number, line) in text.lines().enumerate() {
            let entry = line.split('#').next().unwrap_or_default().trim();
            if entry.is_empty() {
                continue;
            }
            let serial = entry.strip_prefix("serial").unwrap_or_default();
            let serial = serial.strip_prefix([':', '=']).and_then(digits);
            if entry.starts_with("spiffe://") {
                list.identities.insert(entry.into());
            } else if let Some(serial) = serial {
                list.serials.insert(serial);
            } else {
                return Err(format!(
                    "line {}: {entry:?} is neither an identity (spiffe://...) nor serial:0A1B...",
                    number + 1
                ));
            }
        }
        Ok(list)
    }
}

/// The number that hexadecimal digits stand for, with or without colons between them.
fn digits(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<_> = text.trim().chars().filter(|c| *c != ':').collect();
    // RFC 5280 section 4.1.2.2 has 20 octets at most; others have more.
    if digits.is_empty() || digits.len() > 128 {
        return None;
    }
    let digits: Option<Vec<_>> = digits.iter().map(|digit| digit.to_digit(16)).collect();
    // Two digits an octet, counted from the end; each is below 16.
    let octets = digits?;
    let octets = octets.rchunks(2).rev();
    let octets: Vec<u8> = octets
        .map(|pair| {
            pair.iter()
                .fold(0, |octet, digit| octet << 4 | *digit as u8)
        })
        .collect();
    Some(trimmed(&octets).to_vec())
}

/// Without leading zeros.
fn trimmed(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|octet| **octet == 0).count();
    &serial[zeros..]
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02X}"))
    }
}

fn read(file: &Path) -> Result<List, MaterialError> {
    let wrong = |why| MaterialError::File {
        path: file.into(),
        why,
    };
    let text = std::fs::read_to_string(file).map_err(|e| wrong(e.to_string()))?;
    List::parse(&text).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn peer(identity: &str, serial: &[u8]) -> Peer {
        Peer {
            identity: Some(identity.into()),
            serial: Some(trimmed(serial).into()),
        }
    }

    #[test]
    fn identities_and_serials_are_named() {
        let text = "# stolen\nspiffe://c/agent/w1 # the laptop\n\nserial=0A1B\nserial:00:ff:01\nserial:1ab\n";
        let list = List::parse(text).unwrap();
        for named in [
            peer("spiffe://c/agent/w1", &[9]),
            peer("spiffe://c/agent/w2", &[0x0a, 0x1b]),
            peer("spiffe://c/agent/w2", &[0, 0xff, 1]),
            peer("spiffe://c/agent/w2", &[1, 0xab]),
        ] {
            assert!(list.check(&named).is_err(), "{named:?}");
        }
        let other = peer("spiffe://c/agent/w10", &[0x1b]);
        assert_eq!(list.check(&other), Ok(()));
        assert_eq!(list.check(&Peer::default()), Ok(()));
        let revoked = list.check(&peer("x", &[0, 0xff, 1])).unwrap_err();
        assert_eq!(
            revoked.to_string(),
            "serial:FF01 has been revoked (tls.revoked)"
        );
    }

    #[test]
    fn what_is_neither_is_named_with_its_line() {
        for wrong in ["w1", "serial:", "serial:xyz", "serial 12", "12AB"] {
            let error = List::parse(&format!("# one\n{wrong}")).unwrap_err();
            assert!(error.contains("line 2") && error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn whoever_waits_is_told() {
        let revocations = Revocations::load(None).unwrap();
        let named = peer("spiffe://c/agent/w1", &[1]);
        let list = |text| List::parse(text).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut struck = pin!(revocations.strike(&named));
        assert!(struck.as_mut().poll(&mut cx).is_pending());
        revocations.list.send_replace(list("serial:02"));
        assert!(struck.as_mut().poll(&mut cx).is_pending());
        revocations.list.send_replace(list("serial:01"));
        assert!(struck.as_mut().poll(&mut cx).is_ready());
        // Who comes later as well.
        assert!(pin!(revocations.strike(&named)).poll(&mut cx).is_ready());
    }
}
