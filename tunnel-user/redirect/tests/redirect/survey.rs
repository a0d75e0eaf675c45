//! Attachments of other processes: the survey finds and names them, and a command removes them.

use std::os::unix::fs::MetadataExt;

use super::*;

impl Attached {
    fn verify(&self) -> Result<(), RedirectError> {
        let cgroup = std::fs::metadata(&self.spec.cgroup).unwrap().ino();
        self.redirect.verify(&self.spec.name, cgroup)
    }

    /// Waits until the kernel knows the listeners of the connector.
    fn wait_for_a_beat(&self) {
        let beats = || {
            self.redirect.status().unwrap()[0]
                .heartbeat_age_ms
                .is_some()
        };
        while !beats() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns the names of the attachments that decide over the same connections.
    fn rivals(&self) -> Vec<String> {
        let rivals = self.redirect.rivals(&self.spec, &[&self.spec.name]);
        let mut names: Vec<_> = { rivals.unwrap().into_iter() }
            .map(|it| it.name.unwrap_or_else(|| "?".to_owned()))
            .collect();
        names.sort();
        names
    }
}

#[test]
fn an_attachment_that_nobody_owns_is_found_and_taken_away() {
    let Some(it) = Attached::with_errno() else {
        return;
    };
    it.verify().unwrap();
    assert!(it.rivals().is_empty());

    // Another pin directory, another cgroup above or below, and one in another namespace.
    let elsewhere = Redirect::new(it.lab.pin().with_file_name("other"));
    let mut stale = it.spec.clone();
    let below = it.lab.cgroup.path().join("below");
    std::fs::create_dir(&below).unwrap();
    for (name, cgroup) in [("same", it.lab.cgroup.path()), ("below", &below)] {
        stale.name = name.to_owned();
        stale.cgroup = cgroup.to_owned();
        elsewhere.attach(&stale).unwrap();
    }
    let other = Netns::new().unwrap();
    stale.name = "namespace".to_owned();
    stale.netns = Some(other.path());
    elsewhere.attach(&stale).unwrap();
    let mut renamed = it.spec.clone();
    renamed.name = "renamed".to_owned();
    it.redirect.attach(&renamed).unwrap();

    assert_eq!(it.rivals(), ["below", "renamed", "same"]);
    let error = it.verify().unwrap_err();
    assert!(matches!(error, RedirectError::Rivals(_)), "{error}");
    assert!(
        error.to_string().contains("attachment same pinned below"),
        "{error}"
    );
    // As many are configured beside it.
    let configured = it.redirect.rivals(&it.spec, &["test", "renamed"]).unwrap();
    assert_eq!(configured.len(), 2, "{configured:?}");
    // Those that were there before ours refuse what ours would serve, and ours does not notice but by
    // what never arrives.
    assert!(it.redirect.detach("renamed").unwrap() && it.redirect.detach("test").unwrap());
    it.redirect.attach(&it.spec).unwrap();
    it.wait_for_a_beat();
    let (redirected, established) = (Counter::Redirected, Counter::Established);
    for sent in 1..=5 {
        assert_eq!(errno(&it.client, at(V4)), libc::ECONNREFUSED);
        assert_eq!((it.count(redirected), it.count(established)), (sent, 0));
    }

    assert!(elsewhere.detach("same").unwrap() && elsewhere.detach("below").unwrap());
    assert!(it.rivals().is_empty());
    it.verify().unwrap();
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());

    // Everything on this file system goes, and nothing is left of it.
    let taken = it.redirect.detach_all().unwrap();
    let mut names: Vec<_> = taken.iter().filter_map(|it| it.name.as_deref()).collect();
    names.sort_unstable();
    assert_eq!(names, ["namespace", "test"]);
    assert!(!it.lab.pin().exists() && !it.lab.pin().with_file_name("other").exists());
    assert_eq!(ask(&it.client, at(V4)).unwrap(), "decoy");
    assert!(matches!(it.verify(), Err(RedirectError::NotAttached(_))));
}

#[test]
fn what_is_missing_of_an_attachment_is_named() {
    let Some(it) = Attached::new() else { return };
    let other = it.redirect.verify(&it.spec.name, 1).unwrap_err();
    assert!(other.to_string().contains("in another cgroup"), "{other}");
    let pin = it.lab.pin().join("links/test").join(Hook::Connect4.name());
    std::fs::remove_file(pin).unwrap();
    let error = it.verify().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the program connect4 is missing"),
        "{error}"
    );
    it.redirect.attach(&it.spec).unwrap();
    it.verify().unwrap();
}
