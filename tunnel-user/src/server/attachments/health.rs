//! Whether each attachment is in place: what readiness, metrics and the log say of it.
//!
//! A [`Follower`](crate::redirect::Follower) tells of its cgroup, [`Watch`] looks at the kernel every
//! two seconds. What they find is one state, and each change of it one line of the log.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::redirect::{AttachmentSpec, Counter, Redirect, RedirectError};
use crate::report::report;

/// How often the kernel is looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// Every how many looks those for other attachments are among them: they read the BPF file system.
const SURVEY: u32 = 5;

/// Connections in a row that are redirected and do not arrive, before they count as lost.
const LOST: u64 = 5;

/// What keeps each attachment from being in place, if something does.
#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Health(Arc<Mutex<BTreeMap<String, Option<String>>>>);

impl Health {
    /// Adds an attachment of which nothing is known yet.
    pub(super) fn add(&self, name: &str) {
        let unknown = Some("it was not looked at yet".to_owned());
        self.lock().insert(name.to_owned(), unknown);
    }

    /// Takes in what was found. `detail` is for the line that says it is in place.
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

    /// Each attachment, and why it is not in place.
    pub(in crate::server) fn all(&self) -> Vec<(String, Option<String>)> {
        let all = self.lock();
        all.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// Fails while an attachment is not in place.
    ///
    /// # Errors
    /// The first such attachment and why.
    pub(in crate::server) fn check(&self) -> Result<(), String> {
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

/// Looks at one attachment.
pub(super) struct Look {
    redirect: Redirect,
    spec: AttachmentSpec,
    /// Names of all attachments that are configured.
    configured: Vec<String>,
    /// Whether this process attached, and may look for others.
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

    /// Why the attachment is not in place.
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

/// Looks at every attachment, again and again.
pub(super) struct Watch {
    pub(super) health: Health,
    /// Each with the error with which its cgroup was attached to last, if with one.
    pub(super) attachments: Vec<(Look, LinkError)>,
}

/// What linking failed with last: the follower writes it.
pub(super) type LinkError = Arc<Mutex<Option<String>>>;

impl Watch {
    pub(super) async fn run(self) {
        let mut tick = tokio::time::interval(INTERVAL);
        let mut arrivals: Vec<_> = self
            .attachments
            .iter()
            .map(|_| Arrivals::default())
            .collect();
        for turn in 1_u32.. {
            tick.tick().await;
            for ((look, link_error), arrivals) in self.attachments.iter().zip(&mut arrivals) {
                // Held so that the follower does not attach in between.
                let link_error = link_error.lock().unwrap_or_else(PoisonError::into_inner);
                let fault = { link_error.clone() }.or_else(|| look.fault(turn % SURVEY == 0));
                let lost = || {
                    let (redirected, established) = look.counted().ok()?;
                    arrivals.observe(redirected, established)
                };
                self.health
                    .set(&look.spec.name, fault.or_else(lost), "again");
            }
        }
    }
}

/// Compares connections that the kernel programs have redirected with those that reached the listener.
/// Programs of another attachment may refuse or divert them in between, unseen by ours.
#[derive(Debug, Default)]
struct Arrivals {
    established: u64,
    /// How many had been redirected when one was last established.
    redirected: Option<u64>,
    /// Whether enough were missing at the last look: they may have been on their way.
    suspected: bool,
}

impl Arrivals {
    /// Takes in how many there were of each. Says what is wrong when none arrives.
    fn observe(&mut self, redirected: u64, established: u64) -> Option<String> {
        let base = match self.redirected {
            Some(base) if established == self.established => base,
            _ => *self.redirected.insert(redirected),
        };
        self.established = established;
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
        let mut arrivals = Arrivals::default();
        assert_eq!(
            arrivals.observe(100, 90),
            None,
            "those before the start do not count"
        );
        assert_eq!(arrivals.observe(104, 90), None);
        assert_eq!(arrivals.observe(104, 90), None, "few");
        assert_eq!(arrivals.observe(105, 90), None, "on their way, perhaps");
        let why = arrivals.observe(105, 90).unwrap();
        assert!(why.starts_with("5 connections were redirected"), "{why}");
        assert!(arrivals.observe(120, 90).is_some());
        assert_eq!(arrivals.observe(121, 91), None);
        assert_eq!(arrivals.observe(121, 91), None);
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
