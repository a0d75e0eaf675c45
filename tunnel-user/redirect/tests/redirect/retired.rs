//! Checks that an attach or a detach removes what earlier versions pinned.

use std::{fs::File, path::PathBuf};

use aya::{
    EbpfLoader,
    maps::MapData,
    programs::{
        SockOps,
        links::{CgroupAttachMode, FdLink},
        loaded_links,
    },
};
use cpc_redirect::object;

use super::*;

/// The maps of the shortcut, which all attachments shared.
const MAPS: [&str; 5] = [
    "SHORTCUT_READ",
    "SHORTCUT_READERS",
    "SHORTCUT_TAKEN",
    "SHORTCUT_WRITERS",
    "SHORTCUT_WRITTEN",
];

impl Attached {
    fn map(&self, name: &str) -> PathBuf {
        self.lab.pin().join("maps-v2").join(name)
    }

    fn shortcut_of(&self, attachment: &str) -> PathBuf {
        let links = self.lab.pin().join("links").join(attachment);
        links.join("shortcut_begin")
    }

    /// Returns the number of the shortcut's maps that are pinned.
    fn retired_maps(&self) -> usize {
        MAPS.iter().filter(|name| self.map(name).exists()).count()
    }

    fn pin_retired_maps(&self) {
        for name in MAPS {
            let any = MapData::from_pin(self.map("COUNTERS")).unwrap();
            any.pin(self.map(name)).unwrap();
        }
    }

    /// Pins a program as the shortcut's of an attachment was: on the same hook of the same cgroup.
    /// Returns its number.
    fn pin_retired_link(&self, attachment: &str) -> u32 {
        let mut ebpf = EbpfLoader::new().btf(None).load(object().unwrap()).unwrap();
        let program: &mut SockOps = { ebpf.program_mut(Hook::Established.name()) }
            .unwrap()
            .try_into()
            .unwrap();
        program.load().unwrap();
        let cgroup = File::open(&self.spec.cgroup).unwrap();
        // Links share a cgroup in any case, and take no flag.
        let link = program.attach(cgroup, CgroupAttachMode::Single).unwrap();
        let link: FdLink = program.take_link(link).unwrap().try_into().unwrap();
        link.pin(self.shortcut_of(attachment)).unwrap();
        program.info().unwrap().id()
    }
}

/// Waits until the kernel has no link of a program.
fn is_unlinked(program: u32) -> bool {
    let linked = || { loaded_links().flatten() }.any(|link| link.program_id() == program);
    (0..1000).any(|_| {
        !linked() || {
            thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

#[test]
fn a_retired_program_goes_with_the_next_attach() {
    let Some(it) = Attached::new() else { return };
    let namespace = Netns::new().unwrap();
    let mut other = it.spec.clone();
    other.name = "other".to_owned();
    other.netns = Some(namespace.path());
    it.redirect.attach(&other).unwrap();
    it.pin_retired_maps();
    let ours = it.pin_retired_link(&it.spec.name);
    let theirs = it.pin_retired_link(&other.name);
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    let differs = it.redirect.compare(&it.spec).unwrap();
    assert_eq!(differs, ["shortcut (removed)"]);

    it.redirect.attach(&it.spec).unwrap();
    assert!(is_unlinked(ours));
    assert!(!it.shortcut_of("test").exists());
    assert!(it.redirect.compare(&it.spec).unwrap().is_empty());
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
    // The maps are the other one's, too.
    assert!(it.shortcut_of("other").exists());
    assert_eq!(it.retired_maps(), MAPS.len());
    it.redirect.remove_retired_maps().unwrap();
    assert_eq!(it.retired_maps(), MAPS.len());

    assert!(it.redirect.detach("other").unwrap());
    assert!(is_unlinked(theirs));
    assert!(!it.shortcut_of("other").exists());
    assert_eq!(it.retired_maps(), 0);
    assert_eq!(ask(&it.client, at(V4)).unwrap(), at(V4).to_string());
}

/// An earlier version left its maps when it detached.
#[test]
fn retired_maps_go_where_nothing_is_attached() {
    let Some(it) = Attached::new() else { return };
    assert!(it.redirect.detach("test").unwrap());
    it.pin_retired_maps();
    assert!(!it.redirect.detach("test").unwrap());
    assert_eq!(it.retired_maps(), 0);
    it.pin_retired_maps();
    it.redirect.remove_retired_maps().unwrap();
    assert_eq!(it.retired_maps(), 0);
    it.pin_retired_maps();
    it.redirect.attach(&it.spec).unwrap();
    assert_eq!(it.retired_maps(), 0);
}
