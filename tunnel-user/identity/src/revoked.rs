//! Revoked peers: a file of identities and serial numbers that don't count, though a CA vouches for
//! them.
//!
//! A handshake checks the list once. Owners of long-lived resources of a peer wait for
//! [`Revocations::on_revocation`] beside them, so that a revocation ends these too.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::identity::{self, Identity, IdentityError, TrustDomain};
use super::material_error::MaterialError;
use super::reloading;

use cpc_host::report::report;

/// The list in force.
#[derive(Debug)]
pub struct Revocations {
    file: Option<PathBuf>,
    /// Fingerprint of the file at the start.
    fingerprint: Vec<u8>,
    list: watch::Sender<List>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct List {
    identities: HashSet<String>,
    /// Serial numbers without leading zeros.
    serials: HashSet<Vec<u8>>,
}

/// The properties by which a list identifies a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    identity: Option<String>,
    serial: Option<Vec<u8>>,
}

/// The entry that revokes a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} has been revoked (tls.revoked)")]
pub struct Revoked(String);

impl Peer {
    /// Returns the holder of a certificate.
    pub fn of(leaf: &CertificateDer<'_>) -> Self {
        let identity = Identity::from_certificate(leaf).ok();
        let certificate = X509Certificate::from_der(leaf).ok();
        Self {
            identity: identity.map(|identity| identity.uri()),
            serial: certificate.map(|(_, it)| trimmed(it.raw_serial()).to_vec()),
        }
    }

    /// Returns all holders of an identity, by any certificate.
    pub fn called(uri: String) -> Self {
        Self {
            identity: Some(uri),
            serial: None,
        }
    }

    /// Returns the holder of a certificate by its identity and serial number (hexadecimal digits).
    pub fn issued(uri: String, serial: &str) -> Self {
        Self {
            identity: Some(uri),
            serial: digits(serial),
        }
    }

    /// Restores the peer of which a process has kept identity and [serial number](Self::serial).
    pub fn restore(uri: String, serial: &[u8]) -> Self {
        Self {
            identity: Some(uri),
            serial: (!serial.is_empty()).then(|| serial.to_vec()),
        }
    }

    /// Returns the serial number of the certificate; empty if it is not known.
    pub fn serial(&self) -> &[u8] {
        self.serial.as_deref().unwrap_or_default()
    }

    /// Adds the identity that the peer has been taken for.
    #[must_use]
    pub fn known_as(self, identity: &Identity) -> Self {
        Self {
            identity: Some(identity.uri()),
            ..self
        }
    }
}

impl Revocations {
    /// Reads the list. Without a file the list is empty for good.
    ///
    /// # Errors
    /// [`MaterialError::File`] naming the malformed line.
    pub fn load(file: Option<PathBuf>) -> Result<Arc<Self>, MaterialError> {
        let fingerprint = reloading::fingerprint(&file);
        let list = match &file {
            Some(file) => read(file)?,
            None => List::default(),
        };
        Ok(Arc::new(Self {
            file,
            fingerprint,
            list: watch::Sender::new(list),
        }))
    }

    /// Returns a list that is empty for good.
    pub fn none() -> Arc<Self> {
        Arc::new(Self {
            file: None,
            fingerprint: Vec::new(),
            list: watch::Sender::new(List::default()),
        })
    }

    /// Checks that `peer` is not revoked.
    ///
    /// # Errors
    /// [`Revoked`] for a revoked peer.
    pub fn check(&self, peer: &Peer) -> Result<(), Revoked> {
        self.list.borrow().check(peer)
    }

    /// Checks that the holder of a certificate, possibly without an identity of ours, is not revoked.
    ///
    /// # Errors
    /// [`Revoked`] for a revoked holder.
    pub fn check_certificate(&self, leaf: &CertificateDer<'_>) -> Result<(), Revoked> {
        // Most lists are empty: then nothing has to be read.
        if self.list.borrow().is_empty() {
            return Ok(());
        }
        self.check(&Peer::of(leaf))
    }

    /// Logs a warning about identities on the list whose trust domain is not in `known`: no peer here
    /// has them, and the domain may be misspelt. They are no error, because servers with other tenants
    /// may share a list.
    pub fn warn_of_strangers(&self, known: &HashSet<TrustDomain>) {
        let strangers = self.list.borrow().strangers(known);
        if let Some(first) = strangers.first() {
            tracing::warn!(
                identity = first,
                count = strangers.len(),
                "tls.revoked names identities of a trust domain that is not trusted here: they match no peer"
            );
        }
    }

    /// Waits until the list revokes `peer`.
    pub async fn on_revocation(&self, peer: &Peer) -> Revoked {
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

    /// Reads the file again when it changes, without end. Calls `changed` then, also for an unreadable
    /// file: the old list stays in force.
    pub async fn watch(self: Arc<Self>, changed: impl Fn(Result<(), &MaterialError>)) {
        let Some(file) = &self.file else {
            return;
        };
        let fingerprint = || reloading::fingerprint([file]);
        let mut last = self.fingerprint.clone();
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
                changed(Ok(()));
            }
            Ok(())
        };
        let on_error = |error: &MaterialError| {
            tracing::error!(
                error = report(error),
                "list of revoked peers not reloaded, the old one stays"
            );
            changed(Err(error));
        };
        reloading::watch(reload, on_error).await;
    }
}

impl List {
    /// Returns the identities of other trust domains than `known`, in order.
    fn strangers(&self, known: &HashSet<TrustDomain>) -> Vec<String> {
        let is_known = |uri: &str| {
            let domain = identity::domain_of(uri);
            domain.is_some_and(|domain| known.contains(&domain))
        };
        let strangers = self.identities.iter().filter(|uri| !is_known(uri));
        let mut strangers: Vec<_> = strangers.cloned().collect();
        strangers.sort_unstable();
        strangers
    }

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

    /// Parses one entry per line: an identity, or `serial:` and hexadecimal digits, as `openssl x509
    /// -serial` prints them. Text behind a `#` is a comment. An entry that no peer can match is an
    /// error: its author believes that a peer is shut out which is not.
    fn parse(text: &str) -> Result<Self, String> {
        let mut list = Self::default();
        for (number, line) in text.lines().enumerate() {
            let entry = line.split('#').next().unwrap_or_default().trim();
            let added = match entry {
                "" => Ok(()),
                entry => list.add(entry),
            };
            added.map_err(|why| format!("line {}: {why}", number + 1))?;
        }
        Ok(list)
    }

    fn add(&mut self, entry: &str) -> Result<(), String> {
        let serial = entry.strip_prefix("serial");
        let serial = serial.and_then(|rest| rest.strip_prefix([':', '=']));
        if let Some(serial) = serial {
            let serial = digits(serial.trim()).ok_or_else(|| {
                format!(
                    "{entry:?} is no serial number: hexadecimal digits are, as `openssl x509 -serial` \
                     prints them, with a colon between each two or without"
                )
            })?;
            self.serials.insert(serial);
            return Ok(());
        }
        if !entry.starts_with("spiffe://") {
            return Err(format!(
                "{entry:?} is neither an identity (spiffe://...) nor serial:0A1B..."
            ));
        }
        if entry.contains('*') {
            return Err(format!(
                "{entry:?}: there are no patterns here; name each identity on a line of its own"
            ));
        }
        let uri = identity::canonical(entry).map_err(|error| match error {
            IdentityError::Uri(_) => error.to_string(),
            error => format!("{entry:?}: {error}"),
        })?;
        self.identities.insert(uri);
        Ok(())
    }
}

/// Returns the number in hexadecimal digits, with a colon between each two or without any.
fn digits(text: &str) -> Option<Vec<u8>> {
    let is_octet = |octet: &str| octet.len() == 2;
    if text.contains(':') && !text.split(':').all(is_octet) {
        return None;
    }
    let digits: Vec<_> = text.chars().filter(|c| *c != ':').collect();
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

/// Returns the number without leading zeros.
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

    /// The author of such a line believes that it revokes a peer.
    #[test]
    fn what_can_match_nobody_is_named_with_its_line() {
        let long = format!("serial:{}", "1".repeat(129));
        let name = format!("spiffe://c/agent/{}", "n".repeat(254));
        for wrong in [
            "w1",
            "c/agent/w1",
            "serial",
            "serial:",
            "serial:xyz",
            "serial 12",
            "serial :12",
            "serial:0x12",
            "serial:-12",
            "serial:12 34",
            "serial:0A:1",
            "serial:0A:1B:",
            "serial::0A",
            "serial:0:A1",
            "Serial:12",
            "serial=serial=12",
            &long,
            "12AB",
            "\u{feff}spiffe://c/agent/w1",
            "spiffe://",
            "spiffe://c",
            "spiffe://c/",
            "spiffe://c/agent",
            "spiffe://c/agent/",
            "spiffe://c/agent/w1/",
            "spiffe://c/agent//w1",
            "spiffe://c//agent/w1",
            "spiffe:///agent/w1",
            "spiffe://C/agent/w1",
            "spiffe://Cluster.local/agent/w1",
            "spiffe://c/Agent/w1",
            "spiffe://c/agents/w1",
            "spiffe://c/node/w1",
            "spiffe://c/agent/*",
            "spiffe://*/agent/w1",
            "spiffe://c/agent/w*",
            "spiffe://c/agent/w 1",
            "spiffe://c/agent/w1,",
            "spiffe://c/agent/w1 spiffe://c/agent/w2",
            "spiffe://c/agent/w%31",
            "spiffe://c/agent/w1?x",
            "spiffe://user@c/agent/w1",
            "spiffe://c:8132/agent/w1",
            "Spiffe://c/agent/w1",
            "SPIFFE://c/agent/w1",
            "https://c/agent/w1",
            "\"spiffe://c/agent/w1\"",
            "- spiffe://c/agent/w1",
            &name,
        ] {
            let Err(error) = List::parse(&format!("# one\n{wrong}\nserial:01")) else {
                panic!("{wrong:?} was taken");
            };
            assert!(error.starts_with("line 2: "), "{wrong:?}: {error}");
        }
        for right in [
            "spiffe://c/agent/w1",
            "  spiffe://c/client/kube-apiserver  # x",
            "spiffe://c_1.x-y/server/S1\r",
            "serial: 0A1B",
            "serial=0a:1b",
        ] {
            assert!(List::parse(right).is_ok(), "{right:?}");
        }
    }

    /// The list itself can't show that a trust domain is misspelt.
    #[test]
    fn a_misspelt_trust_domain_is_noticed() {
        let text = "spiffe://c/agent/w1\nspiffe://d/agent/w1\nserial:01\nspiffe://cc/agent/w2\n";
        let list = List::parse(text).unwrap();
        let known = ["c", "d"].map(|domain| domain.parse().unwrap());
        let known = HashSet::from(known);
        assert_eq!(list.strangers(&known), ["spiffe://cc/agent/w2"]);
    }

    #[test]
    fn whoever_waits_is_told() {
        let revocations = Revocations::load(None).unwrap();
        let named = peer("spiffe://c/agent/w1", &[1]);
        let list = |text| List::parse(text).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut revoked = pin!(revocations.on_revocation(&named));
        assert!(revoked.as_mut().poll(&mut cx).is_pending());
        revocations.list.send_replace(list("serial:02"));
        assert!(revoked.as_mut().poll(&mut cx).is_pending());
        revocations.list.send_replace(list("serial:01"));
        assert!(revoked.as_mut().poll(&mut cx).is_ready());
        // Who comes later as well.
        assert!(
            pin!(revocations.on_revocation(&named))
                .poll(&mut cx)
                .is_ready()
        );
    }
}
