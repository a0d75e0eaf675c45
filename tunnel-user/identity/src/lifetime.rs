//! The ends of the certificates that a process uses, announced ahead of time.
//!
//! Whoever reads certificates tells what it has in force ([`Certificates`]). [`Announcer`] decides what is
//! said of them and when, [`watch`] says it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::sign::CertifiedKey;

use super::anchors::{Anchor, Anchors};
use super::credential::validity;
use super::identity::Identity;
use super::pin::KeyHash;
use cpc_observe::admin::status::{CertificateRow, rfc3339};

/// How often the clock is compared with the certificates.
const INTERVAL: Duration = Duration::from_secs(60);

/// From when on the end of an own certificate is announced, at most.
const OWN_AHEAD: Duration = Duration::from_secs(30 * 24 * 3600);

/// The same of a CA, which takes longer to replace.
const CA_AHEAD: Duration = Duration::from_secs(90 * 24 * 3600);

/// A certificate that has expired is named again after so long.
const REMINDER: Duration = Duration::from_secs(24 * 3600);

/// What a certificate is to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It is shown to peers.
    Own,
    /// It vouches for peers.
    Ca,
}

impl Kind {
    /// Metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Ca => "ca",
        }
    }
}

/// What a certificate is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Tunnels over QUIC.
    Tunnel,
    /// Frontends on TCP.
    Frontend,
    /// Konnectivity's agents or servers.
    Konnectivity,
}

impl Purpose {
    /// Metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Frontend => "frontend",
            Self::Konnectivity => "konnectivity",
        }
    }
}

/// One certificate in force, and its life.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lifetime {
    /// What it is.
    pub kind: Kind,
    /// What for.
    pub purpose: Purpose,
    /// Its identity or subject.
    pub subject: String,
    /// Its file.
    pub file: PathBuf,
    /// Its key, of a CA.
    pub key: Option<KeyHash>,
    /// The first moment at which it is valid.
    pub not_before: SystemTime,
    /// The last moment at which it is valid; of a chain, that of the certificate that ends first.
    pub not_after: SystemTime,
}

impl Lifetime {
    /// Of the chain in `key`, which was read from `file`.
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

    /// Of each CA in `anchors`, which were read from `file`.
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

    /// How it is at `now`.
    pub fn state(&self, now: SystemTime) -> State {
        if now > self.not_after {
            State::Expired
        } else if now < self.not_before {
            State::NotYet
        } else if self.left(now) < self.ahead() {
            State::Ending
        } else {
            State::Valid
        }
    }

    fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }

    /// How long before the end it is announced: a quarter of the life, since a certificate that is
    /// renewed is so at two thirds.
    fn ahead(&self) -> Duration {
        let life = self.not_after.duration_since(self.not_before);
        let most = match self.kind {
            Kind::Own => OWN_AHEAD,
            Kind::Ca => CA_AHEAD,
        };
        (life.unwrap_or_default() / 4).min(most)
    }
}

/// How a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// For a while yet.
    Valid,
    /// It expires soon.
    Ending,
    /// It has.
    Expired,
    /// Its time has not come, or the clock is behind.
    NotYet,
}

impl State {
    /// As status shows it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Ending => "expires soon",
            Self::Expired => "expired",
            Self::NotYet => "not valid yet",
        }
    }
}

/// Somebody who has certificates in force.
pub trait Certificates: Send + Sync {
    /// All of them, as they are now.
    fn lifetimes(&self) -> Vec<Lifetime>;

    /// How often a CA was added or removed since the start.
    fn ca_changes(&self) -> u64 {
        0
    }
}

/// The certificates of a process. Clones share them.
#[derive(Clone)]
pub struct Lifetimes(Arc<[Arc<dyn Certificates>]>);

impl Lifetimes {
    /// Of all who have some.
    pub fn new(all: Vec<Arc<dyn Certificates>>) -> Self {
        Self(all.into())
    }

    /// All of them, as they are now.
    pub fn all(&self) -> Vec<Lifetime> {
        { self.0.iter() }.flat_map(|it| it.lifetimes()).collect()
    }

    /// How often a CA was added or removed since the start.
    pub fn ca_changes(&self) -> u64 {
        { self.0.iter() }.map(|it| it.ca_changes()).sum()
    }

    /// Why no tunnel can be opened any more, if none can: our own certificate is not valid, or no CA is.
    pub fn obstacle(&self, now: SystemTime) -> Option<String> {
        obstacle(&self.all(), now)
    }
}

fn obstacle(all: &[Lifetime], now: SystemTime) -> Option<String> {
    let tunnel =
        |kind| { all.iter() }.filter(move |it| it.purpose == Purpose::Tunnel && it.kind == kind);
    let is_bad = |it: &&Lifetime| matches!(it.state(now), State::Expired | State::NotYet);
    // No file: strangers may ask for readiness.
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
    // One that vouches for somebody is enough: others may have a tenant of their own.
    match tunnel(Kind::Ca).all(|it| is_bad(&it)) {
        true => tunnel(Kind::Ca).next().map(|ca| describe("the CA", ca)),
        false => None,
    }
}

/// Decides when the end of a certificate is announced: when a quarter of its life is left, each time that
/// half of what was left is gone, at the end, and then once a day.
#[derive(Debug, Default)]
pub struct Announcer {
    /// What was said of each, and from when on it is said again.
    said: HashMap<Lifetime, (State, SystemTime)>,
}

impl Announcer {
    /// What is to be said at `now`.
    pub fn due(&mut self, all: &[Lifetime], now: SystemTime) -> Vec<(Lifetime, State)> {
        self.said.retain(|known, _| all.contains(known));
        let mut due = Vec::new();
        for life in all {
            let state = life.state(now);
            let is_said = |(said, until): &(State, SystemTime)| {
                // A clock that was set back silences nothing for longer.
                *said == state && now < *until && *until <= now + REMINDER.max(life.left(now))
            };
            if state == State::Valid || self.said.get(life).is_some_and(is_said) {
                continue;
            }
            let again = match state {
                State::Ending => (life.left(now) / 2).max(INTERVAL),
                _ => REMINDER,
            };
            self.said.insert(life.clone(), (state, now + again));
            due.push((life.clone(), state));
        }
        due
    }
}

/// Announces the ends of `lifetimes`, for ever.
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
            tracing::error!(purpose, subject, %file, %until, "{what} has expired and counts no more: replace it");
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
            let mut said = Vec::new();
            // Every minute of its last hundred days, and a week more.
            for minute in days.saturating_sub(100) * 24 * 60..(days + 7) * 24 * 60 {
                let now = start + minute * INTERVAL;
                said.extend(
                    announcer
                        .due(&one, now)
                        .iter()
                        .map(|(_, state)| (minute, *state)),
                );
            }
            let (minute, state) = said[0];
            assert_eq!(
                (minute / 24 / 60, state),
                (first, State::Ending),
                "{kind:?} {days}"
            );
            let ending = said.iter().filter(|(_, state)| *state == State::Ending);
            let (ending, all) = (ending.count(), said.len());
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
