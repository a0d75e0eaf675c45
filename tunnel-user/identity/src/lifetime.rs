//! Expiry of the certificates that a process uses, announced ahead of time.
//!
//! The owners of certificates list those in force ([`Certificates`]). [`Announcer`] decides about the
//! announcements, and [`watch`] logs them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::CertifiedKey;

use super::anchors::{Anchor, Anchors};
use super::identity::Identity;
use super::key_hash::KeyHash;
use super::validity::validity;
use cpc_observe::admin::status::{CertificateRow, rfc3339};

/// Interval between two checks of the certificates.
const INTERVAL: Duration = Duration::from_secs(60);

/// Maximum time before the end of an own certificate at which it is announced.
const OWN_AHEAD: Duration = Duration::from_secs(30 * 24 * 3600);

/// Maximum time before the end of a CA at which it is announced: a CA takes longer to replace.
const CA_AHEAD: Duration = Duration::from_secs(90 * 24 * 3600);

/// Interval between two announcements of an expired certificate.
const REMINDER: Duration = Duration::from_secs(24 * 3600);

/// Kind of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A certificate that the process shows to peers.
    Own,
    /// A CA that vouches for peers.
    Ca,
}

impl Kind {
    /// Returns the metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Ca => "ca",
        }
    }
}

/// Purpose of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Tunnels over QUIC.
    Tunnel,
    /// Frontends on TCP.
    Frontend,
    /// Agents or servers of Konnectivity.
    Konnectivity,
}

impl Purpose {
    /// Returns the metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Frontend => "frontend",
            Self::Konnectivity => "konnectivity",
        }
    }
}

/// One certificate in force, and its validity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lifetime {
    /// Kind of the certificate.
    pub kind: Kind,
    /// Purpose of the certificate.
    pub purpose: Purpose,
    /// Identity or subject.
    pub subject: String,
    /// File of the certificate.
    pub file: PathBuf,
    /// Hash of the key, for a CA.
    pub key: Option<KeyHash>,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity; for a chain, that of the certificate that ends first.
    pub not_after: SystemTime,
}

impl Lifetime {
    /// Returns the lifetime of the chain in `key`, which was read from `file`.
    pub fn own(purpose: Purpose, key: &CertifiedKey, file: &Path) -> Option<Self> {
        let leaf = key.cert.first()?;
        let spans: Vec<_> = key.cert.iter().filter_map(validity).collect();
        let subject = match Identity::from_certificate(leaf) {
            Ok(identity) => identity.uri(),
            Err(_) => file.display().to_string(),
        };
        Some(Self {
            kind: Kind::Own,
            purpose,
            subject,
            file: file.into(),
            key: None,
            not_before: spans.iter().map(|(from, _)| *from).max()?,
            not_after: spans.iter().map(|(_, until)| *until).min()?,
        })
    }

    /// Returns the lifetime of each CA in `anchors`, which were read from `file`.
    pub fn cas(purpose: Purpose, anchors: &Anchors, file: &Path) -> Vec<Self> {
        let life = |anchor: &Anchor| Self {
            kind: Kind::Ca,
            purpose,
            subject: anchor.subject().to_owned(),
            file: file.into(),
            key: Some(anchor.key()),
            not_before: anchor.validity().0,
            not_after: anchor.validity().1,
        };
        anchors.iter().map(life).collect()
    }

    /// Returns the state at `now`.
    pub fn state(&self, now: SystemTime) -> State {
        if now > self.not_after {
            State::Expired
        } else if now < self.not_before {
            State::NotYet
        } else if self.left(now) < self.notice_period() {
            State::Ending
        } else {
            State::Valid
        }
    }

    fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// Returns the time before the end from which the end is announced: a quarter of the validity,
    /// because renewal happens at two thirds.
    fn notice_period(&self) -> Duration {
        let life = self.not_after.duration_since(self.not_before);
        let max = match self.kind {
            Kind::Own => OWN_AHEAD,
            Kind::Ca => CA_AHEAD,
        };
        (life.unwrap_or_default() / 4).min(max)
    }
}

/// State of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The certificate is valid.
    Valid,
    /// The certificate expires soon.
    Ending,
    /// The certificate has expired.
    Expired,
    /// The certificate is not valid yet, or the clock is behind.
    NotYet,
}

impl State {
    /// Returns the text for status.
    pub fn label(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Ending => "expires soon",
            Self::Expired => "expired",
            Self::NotYet => "not valid yet",
        }
    }
}

/// An owner of certificates in force.
pub trait Certificates: Send + Sync {
    /// Returns all certificates in force.
    fn lifetimes(&self) -> Vec<Lifetime>;

    /// Returns the number of added and removed CAs since the start.
    fn ca_changes(&self) -> u64 {
        0
    }
}

/// The certificates of a process. Clones share them.
#[derive(Clone)]
pub struct Lifetimes(Arc<[Arc<dyn Certificates>]>);

impl Lifetimes {
    /// Combines all owners.
    pub fn new(all: Vec<Arc<dyn Certificates>>) -> Self {
        Self(all.into())
    }

    /// Returns all certificates in force.
    pub fn all(&self) -> Vec<Lifetime> {
        { self.0.iter() }.flat_map(|it| it.lifetimes()).collect()
    }

    /// Returns the number of added and removed CAs since the start.
    pub fn ca_changes(&self) -> u64 {
        { self.0.iter() }.map(|it| it.ca_changes()).sum()
    }

    /// Returns the reason why no tunnel can be opened, if so: the own certificate is not valid, or no
    /// CA is.
    pub fn obstacle(&self, now: SystemTime) -> Option<String> {
        obstacle(&self.all(), now)
    }
}

fn obstacle(all: &[Lifetime], now: SystemTime) -> Option<String> {
    let tunnel =
        |kind| { all.iter() }.filter(move |it| it.purpose == Purpose::Tunnel && it.kind == kind);
    let is_bad = |it: &&Lifetime| matches!(it.state(now), State::Expired | State::NotYet);
    // Without the file name: strangers may read the readiness.
    let describe = |what: &str, it: &Lifetime| match it.state(now) {
        State::NotYet => format!(
            "{what} is not valid before {}; is the clock right?",
            humantime::format_rfc3339_seconds(it.not_before)
        ),
        _ => format!(
            "{what} has expired at {}",
            humantime::format_rfc3339_seconds(it.not_after)
        ),
    };
    if let Some(own) = tunnel(Kind::Own).find(is_bad) {
        return Some(describe("the certificate", own));
    }
    // One valid CA is enough: others may belong to another tenant.
    match tunnel(Kind::Ca).all(|it| is_bad(&it)) {
        true => tunnel(Kind::Ca).next().map(|ca| describe("the CA", ca)),
        false => None,
    }
}

/// Decides about announcements of expiry: at a quarter of the validity, at each further half of the
/// remaining time, at the end, and then once a day.
#[derive(Debug, Default)]
pub struct Announcer {
    /// State at the last announcement, and the time of the next one.
    logged: HashMap<Lifetime, (State, SystemTime)>,
}

impl Announcer {
    /// Returns the announcements that are due at `now`.
    pub fn due(&mut self, all: &[Lifetime], now: SystemTime) -> Vec<(Lifetime, State)> {
        self.logged.retain(|known, _| all.contains(known));
        let mut due = Vec::new();
        for life in all {
            let state = life.state(now);
            let is_logged = |(logged, until): &(State, SystemTime)| {
                // A clock that was set back silences nothing for longer.
                *logged == state && now < *until && *until <= now + REMINDER.max(life.left(now))
            };
            if state == State::Valid || self.logged.get(life).is_some_and(is_logged) {
                continue;
            }
            let again = match state {
                State::Ending => (life.left(now) / 2).max(INTERVAL),
                _ => REMINDER,
            };
            self.logged.insert(life.clone(), (state, now + again));
            due.push((life.clone(), state));
        }
        due
    }
}

/// Announces the ends of `lifetimes`, without end.
pub async fn watch(lifetimes: Lifetimes) {
    let mut announcer = Announcer::default();
    loop {
        let now = SystemTime::now();
        for (life, state) in announcer.due(&lifetimes.all(), now) {
            announce(&life, state, now);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn announce(life: &Lifetime, state: State, now: SystemTime) {
    let (what, remedy) = match life.kind {
        Kind::Own => ("certificate", "replace it; the file is watched"),
        Kind::Ca => (
            "CA",
            "replace it before that (docs/joining.md, \"Another CA\")",
        ),
    };
    let (purpose, subject) = (life.purpose.label(), &life.subject);
    let file = life.file.display();
    let until = humantime::format_rfc3339_seconds(life.not_after);
    let left = humantime::format_duration(Duration::from_secs(life.left(now).as_secs()));
    match state {
        State::Valid => {}
        State::Ending => {
            tracing::warn!(purpose, subject, %file, %until, %left, "{what} expires soon: {remedy}");
        }
        State::Expired => {
            tracing::error!(purpose, subject, %file, %until, "{what} has expired: replace it");
        }
        State::NotYet => {
            let from = humantime::format_rfc3339_seconds(life.not_before);
            tracing::error!(purpose, subject, %file, %from, "{what} is not valid yet: is the clock right?");
        }
    }
}

/// Returns the status rows of a process's certificates, as they are at `now`.
pub fn rows(lifetimes: &Lifetimes, now: SystemTime) -> Vec<CertificateRow> {
    let row = |life: Lifetime| CertificateRow {
        state: life.state(now).label().into(),
        purpose: life.purpose.label().into(),
        kind: life.kind.label().into(),
        subject: life.subject,
        key: life.key.map(|key| key.to_string()),
        file: life.file.display().to_string(),
        not_after: rfc3339(life.not_after),
    };
    lifetimes.all().into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn life(kind: Kind, days: u32, start: SystemTime) -> Lifetime {
        Lifetime {
            kind,
            purpose: Purpose::Tunnel,
            subject: "x".into(),
            file: "x.crt".into(),
            key: None,
            not_before: start,
            not_after: start + days * DAY,
        }
    }

    #[test]
    fn an_end_is_announced_ahead_and_seldom() {
        let start = SystemTime::now();
        for (kind, days, first) in [
            (Kind::Own, 365, 335),
            (Kind::Own, 40, 30),
            (Kind::Ca, 3650, 3560),
            (Kind::Ca, 40, 30),
        ] {
            let one = [life(kind, days, start)];
            let mut announcer = Announcer::default();
            let mut logged = Vec::new();
            // Every minute of its last hundred days, and a week more.
            for minute in days.saturating_sub(100) * 24 * 60..(days + 7) * 24 * 60 {
                let now = start + minute * INTERVAL;
                logged.extend(
                    announcer
                        .due(&one, now)
                        .iter()
                        .map(|(_, state)| (minute, *state)),
                );
            }
            let (minute, state) = logged[0];
            assert_eq!(
                (minute / 24 / 60, state),
                (first, State::Ending),
                "{kind:?} {days}"
            );
            let ending = logged.iter().filter(|(_, state)| *state == State::Ending);
            let (ending, all) = (ending.count(), logged.len());
            assert!((8..20).contains(&ending), "{ending} times");
            // At the end, and each day after it.
            assert!((7..=8).contains(&(all - ending)), "{} times", all - ending);
        }
    }

    #[test]
    fn each_is_announced_once_at_the_start_and_anew_when_it_is_replaced() {
        let start = SystemTime::now();
        let now = start + 39 * DAY;
        let (own, ca) = (life(Kind::Own, 40, start), life(Kind::Ca, 20, start));
        let mut announcer = Announcer::default();
        let due = announcer.due(&[own.clone(), ca.clone()], now);
        assert_eq!(
            due,
            [(own.clone(), State::Ending), (ca.clone(), State::Expired)]
        );
        assert_eq!(announcer.due(&[own.clone(), ca.clone()], now), []);
        assert_eq!(announcer.due(&[life(Kind::Own, 99, now)], now), []);
        assert_eq!(
            announcer.due(std::slice::from_ref(&own), now),
            [(own.clone(), State::Ending)]
        );
        // A clock that was set back is no reason to be silent, nor to speak each minute.
        let early = start - 3 * DAY;
        assert_eq!(announcer.due(std::slice::from_ref(&own), early).len(), 1);
        assert_eq!(
            announcer.due(std::slice::from_ref(&own), early + INTERVAL),
            []
        );
    }

    #[test]
    fn without_a_certificate_or_a_ca_there_is_no_tunnel() {
        let start = SystemTime::now();
        let now = start + 30 * DAY;
        let (good, bad) = (life(Kind::Own, 40, start), life(Kind::Own, 20, start));
        let (ca, old_ca) = (life(Kind::Ca, 40, start), life(Kind::Ca, 20, start));
        let frontend = Lifetime {
            purpose: Purpose::Frontend,
            ..bad.clone()
        };
        let all = |all: &[&Lifetime]| {
            let all: Vec<_> = all.iter().map(|&it| it.clone()).collect();
            obstacle(&all, now)
        };
        assert_eq!(all(&[&good, &ca, &old_ca, &frontend]), None);
        assert!(
            all(&[&bad, &ca])
                .unwrap()
                .contains("the certificate has expired")
        );
        assert!(
            all(&[&good, &old_ca])
                .unwrap()
                .contains("the CA has expired")
        );
        let early = obstacle(&[good, ca], start - DAY).unwrap();
        assert!(early.contains("is the clock right"), "{early}");
        // Nothing at all is Konnectivity's alone.
        assert_eq!(all(&[]), None);
    }
}
