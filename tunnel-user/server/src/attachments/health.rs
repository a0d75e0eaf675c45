//! Health of the attachments, for readiness, metrics and the log.
//!
//! A [`Follower`](cpc_redirect::Follower) reports its cgroup, [`Watch`] checks the kernel every two
//! seconds. Both findings form one state, and each change of it is one line of the log.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cpc_host::report::report;
use cpc_redirect::{AttachmentSpec, Counter, Redirect, RedirectError};

/// Interval between checks of the kernel.
const INTERVAL: Duration = Duration::from_secs(2);

/// Number of checks per search for other attachments, which reads the BPF file system.
const SURVEY: u32 = 5;

/// Maximum number of consecutive checks that are skipped while the follower attaches.
const PATIENCE: u32 = 2;

/// Number of consecutive redirected connections that do not arrive, after which they count as lost.
const LOST: u64 = 5;

/// Time without a lost connection after which the count starts again.
const QUIET: Duration = Duration::from_secs(600);

/// Fault of each attachment, if there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health(Arc<Mutex<BTreeMap<String, Option<String>>>>);

impl Health {
    /// Adds an attachment in unknown state.
    pub(super) fn add(&self, name: &str) {
        let unknown = Some("it was not looked at yet".to_owned());
        self.lock().insert(name.to_owned(), unknown);
    }

    /// Sets the state of an attachment. `detail` is for the log line about one that is in place.
    pub(super) fn set(&self, name: &str, fault: Option<String>, detail: &str) {
        let mut all = self.lock();
        let Some(last) = all.get_mut(name) else {
            return;
        };
        if *last == fault {
            return;
        }
        match &fault {
            Some(why) => tracing::error!(attachment = name, why, "redirect NOT in place"),
            None => tracing::info!(attachment = name, detail, "redirect in place"),
        }
        *last = fault;
    }

    /// Returns each attachment, with its fault.
    pub(crate) fn all(&self) -> Vec<(String, Option<String>)> {
        let all = self.lock();
        all.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Checks that all attachments are in place.
    ///
    /// # Errors
    /// The first faulty attachment and its fault.
    pub(crate) fn check(&self) -> Result<(), String> {
        let all = self.lock();
        let fault = all
            .iter()
            .find_map(|(name, why)| Some((name, why.as_ref()?)));
        fault.map_or(Ok(()), |(name, why)| {
            Err(format!("redirect {name} is not in place: {why}"))
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A check of one attachment.
pub(super) struct Look {
    redirect: Redirect,
    spec: AttachmentSpec,
    /// Names of all configured attachments.
    configured: Vec<String>,
    /// Whether this process attached, and may search for others.
    ours: bool,
}

impl Look {
    pub(super) fn new(
        redirect: &Redirect,
        spec: &AttachmentSpec,
        configured: &[String],
        ours: bool,
    ) -> Self {
        Self {
            redirect: redirect.clone(),
            spec: spec.clone(),
            configured: configured.to_vec(),
            ours,
        }
    }

    /// Returns the fault of the attachment.
    pub(super) fn fault(&self, survey: bool) -> Option<String> {
        let Ok(cgroup) = fs::metadata(&self.spec.cgroup) else {
            return Some(no_cgroup(&self.spec.cgroup));
        };
        if survey && self.ours {
            let configured: Vec<_> = self.configured.iter().map(String::as_str).collect();
            if let Err(error) = self.redirect.rivals(&self.spec, &configured) {
                tracing::debug!(
                    error = report(&error),
                    "other attachments were not looked for"
                );
            }
        }
        let verified = self.redirect.verify(&self.spec.name, cgroup.ino());
        verified.err().map(|error| report(&error))
    }

    fn counted(&self) -> Result<(u64, u64), RedirectError> {
        let counts = self.redirect.counters()?.read()?;
        let of = |counter| {
            let own = { counts.iter() }
                .find(|it| it.attachment == self.spec.name && it.counter == counter);
            own.map_or(0, |it| it.value)
        };
        Ok((of(Counter::Redirected), of(Counter::Established)))
    }
}

pub(super) fn no_cgroup(path: &std::path::Path) -> String {
    format!("the cgroup {} is not there", PathBuf::from(path).display())
}

/// A periodic check of every attachment.
pub(super) struct Watch {
    health: Health,
    attachments: Vec<Watched>,
}

struct Watched {
    look: Look,
    /// Error of the last attempt to attach to its cgroup.
    link_error: LinkError,
    arrivals: Arrivals,
    /// Number of consecutive skipped checks.
    left_out: u32,
}

/// Error of the last attempt to attach. The follower writes it, and holds it while it attaches.
pub(super) type LinkError = Arc<Mutex<Option<String>>>;

impl Watch {
    pub(super) fn new(
        health: Health,
        attachments: impl Iterator<Item = (Look, LinkError)>,
    ) -> Self {
        let watched = |(look, link_error)| Watched {
            look,
            link_error,
            arrivals: Arrivals::default(),
            left_out: 0,
        };
        Self {
            health,
            attachments: attachments.map(watched).collect(),
        }
    }

    /// Checks without end, on a thread where files and the kernel block nothing else.
    pub(super) async fn run(mut self) {
        if self.attachments.is_empty() {
            // No thread wakes up once a second for nothing.
            return std::future::pending().await;
        }
        let mut tick = tokio::time::interval(INTERVAL);
        for turn in 1_u32.. {
            tick.tick().await;
            let looked = tokio::task::spawn_blocking(move || {
                self.look(turn % SURVEY == 0);
                self
            });
            // It fails only when the process is ending.
            let Ok(back) = looked.await else { return };
            self = back;
        }
    }

    fn look(&mut self, survey: bool) {
        for watched in &mut self.attachments {
            watched.look(&self.health, survey);
        }
    }
}

impl Watched {
    fn look(&mut self, health: &Health, survey: bool) {
        // Held so that the follower does not attach in between.
        let held = match self.link_error.try_lock() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            // It is attaching, and says itself what came of it.
            Err(TryLockError::WouldBlock) if self.left_out < PATIENCE => {
                self.left_out += 1;
                return;
            }
            // It waits for a process that holds the lock of the pin directory.
            Err(TryLockError::WouldBlock) => None,
        };
        self.left_out = 0;
        let failed = held.as_deref().cloned().flatten();
        let fault = failed.or_else(|| self.look.fault(survey));
        let lost = || {
            let (redirected, established) = self.look.counted().ok()?;
            self.arrivals
                .observe(redirected, established, Instant::now())
        };
        health.set(&self.look.spec.name, fault.or_else(lost), "again");
    }
}

/// Comparison of the connections that the kernel programs have redirected with those that reached the
/// listener. Programs of another attachment may refuse or divert them in between, unseen by ours.
#[derive(Debug, Default)]
struct Arrivals {
    established: u64,
    redirected: u64,
    /// Number of redirected connections when one was last established, or none had been lost for
    /// [`QUIET`].
    base: Option<u64>,
    /// Time of the last redirected connection.
    last: Option<Instant>,
    /// Whether enough were missing at the last check: they may have been on their way.
    suspected: bool,
}

impl Arrivals {
    /// Takes both numbers at `now`. Returns the fault when no connection arrives.
    fn observe(&mut self, redirected: u64, established: u64, now: Instant) -> Option<String> {
        let last = match self.last {
            Some(last) if redirected == self.redirected => last,
            _ => *self.last.insert(now),
        };
        let is_quiet = now.saturating_duration_since(last) >= QUIET;
        let base = match self.base {
            Some(base) if established == self.established && !is_quiet => base,
            _ => *self.base.insert(redirected),
        };
        (self.established, self.redirected) = (established, redirected);
        let lost = redirected.saturating_sub(base);
        let suspected = std::mem::replace(&mut self.suspected, lost >= LOST);
        (suspected && self.suspected).then(|| {
            format!(
                "{lost} connections were redirected and none of them arrived: other programs in this \
                 cgroup refuse or divert them (`cpc redirect list`, `bpftool cgroup tree`)"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_never_arrive_are_noticed_and_so_is_the_next_that_does() {
        let (mut arrivals, now) = (Arrivals::default(), Instant::now());
        assert_eq!(
            arrivals.observe(100, 90, now),
            None,
            "those before the start do not count"
        );
        assert_eq!(arrivals.observe(104, 90, now), None);
        assert_eq!(arrivals.observe(104, 90, now), None, "few");
        assert_eq!(
            arrivals.observe(105, 90, now),
            None,
            "on their way, perhaps"
        );
        let why = arrivals.observe(105, 90, now).unwrap();
        assert!(why.starts_with("5 connections were redirected"), "{why}");
        assert!(arrivals.observe(120, 90, now).is_some());
        assert_eq!(arrivals.observe(121, 91, now), None);
        assert_eq!(arrivals.observe(121, 91, now), None);
    }

    #[test]
    fn what_was_lost_is_over_once_nothing_is_lost_any_more() {
        let (mut arrivals, start) = (Arrivals::default(), Instant::now());
        let mut lost = |redirected, after| {
            let observed = arrivals.observe(redirected, 90, start + after);
            observed.is_some()
        };
        let second = Duration::from_secs(1);
        assert!(!lost(100, Duration::ZERO));
        assert!(!lost(105, second));
        assert!(lost(105, QUIET));
        assert!(lost(106, QUIET + second), "one more");
        assert!(lost(106, 2 * QUIET));
        assert!(!lost(106, 2 * QUIET + second), "quiet for long enough");
        assert!(!lost(106, 2 * QUIET + 3 * second));
        assert!(!lost(111, 3 * QUIET));
        assert!(lost(111, 3 * QUIET + second), "again");
    }

    #[test]
    fn a_follower_that_attaches_is_left_alone_but_not_for_ever() {
        let place = tempfile::tempdir().unwrap();
        let config = r#"{"name": "x", "cgroup": "/nowhere", "capture": [{"cidr": "10.0.0.0/8"}]}"#;
        let config = serde_json::from_str(config).unwrap();
        let spec = super::super::spec(&config, &"cluster.local".parse().unwrap());
        let look = Look::new(&Redirect::new(place.path()), &spec, &[], false);
        let (health, link_error) = (Health::default(), LinkError::default());
        health.add("x");
        let attachments = [(look, link_error.clone())];
        let mut watch = Watch::new(health.clone(), attachments.into_iter());
        let mut said = || {
            watch.look(false);
            health.check().unwrap_err()
        };
        let attaching = link_error.lock().unwrap();
        for _ in 0..PATIENCE {
            assert!(said().contains("not looked at yet"));
        }
        assert!(said().contains("/nowhere is not there"));
        drop(attaching);
        *link_error.lock().unwrap() = Some("no link".into());
        assert!(said().contains("no link"));
    }

    #[test]
    fn one_missing_attachment_is_enough_not_to_be_ready() {
        let health = Health::default();
        assert_eq!(health.check(), Ok(()), "none is configured");
        health.add("a");
        health.add("b");
        assert!(health.check().is_err(), "before anybody looked");
        health.set("a", None, "");
        health.set("b", Some("gone".to_owned()), "");
        assert_eq!(
            health.check(),
            Err("redirect b is not in place: gone".to_owned())
        );
        health.set("b", None, "");
        health.set("c", Some("nobody's".to_owned()), "");
        assert_eq!(health.check(), Ok(()));
        assert_eq!(health.all().len(), 2);
    }
}
