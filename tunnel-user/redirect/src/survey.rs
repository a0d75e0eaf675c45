//! A search for attachments of this program, of any process: a stale one refuses every captured
//! connection, and its neighbours notice only that no connection arrives.
//!
//! Any process that may open the pins finds those on the same BPF file system. Those pinned elsewhere,
//! or not at all, are found among the kernel's links, which takes CAP_SYS_ADMIN.

use std::{
    collections::HashSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aya::{maps::MapInfo, programs::loaded_programs};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};
use serde::Serialize;

use super::{
    AttachmentSpec, Hook, RedirectError,
    link::{Link, remove_pin},
    maps,
    pin::{Pin, failed},
    retired, spec,
};

/// Name of an attachment that no pin here names.
const UNPINNED: &str = "an attachment that is not pinned on this BPF file system";

/// Maximum depth below the root of a BPF file system at which pin directories are searched.
const MAX_DEPTH: usize = 4;

/// Directory below a pin directory with the links of all its attachments.
const LINKS: &str = "links";

/// Maximum number of cgroups below an attachment's that are compared with those of others.
const MAX_CGROUPS: usize = 50_000;

/// One attachment of this program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundAttachment {
    /// Pin directory; `None` when it is pinned on another file system, or not at all.
    pub pin: Option<PathBuf>,
    /// Name, where it is pinned.
    pub name: Option<String>,
    /// Number of the cgroup; `None` when that was removed.
    pub cgroup: Option<u64>,
    /// Numbers of the programs.
    pub programs: Vec<u32>,
    /// Cookies of the possible network namespaces; `None` when they can't be read.
    #[serde(skip)]
    netns: Option<Vec<u64>>,
}

impl FoundAttachment {
    /// Returns the command that removes it, in backquotes.
    pub fn remedy(&self) -> String {
        match (&self.name, &self.pin) {
            (Some(name), Some(pin)) => {
                format!("`cpc redirect detach --pin {} {name}`", pin.display())
            }
            // Its name does not distinguish it from the others.
            _ => "`cpc redirect detach --all`, by a process with CAP_SYS_ADMIN,".to_owned(),
        }
    }
}

impl fmt::Display for FoundAttachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, &self.pin) {
            (Some(name), Some(pin)) => {
                write!(f, "attachment {name} pinned below {}", pin.display())
            }
            _ => f.write_str(UNPINNED),
        }?;
        write!(f, " (programs {:?})", self.programs)
    }
}

/// Whether this process may see links that are not pinned here.
pub(super) fn sees_all() -> bool {
    Link::all().is_ok()
}

/// Whether this note of rivals names one that only such a process can see.
pub(super) fn is_hidden(note: &str) -> bool {
    note.contains(UNPINNED)
}

/// Returns every attachment on the BPF file system of `pin` and, where this process may see them, in
/// the kernel.
pub(super) fn all(pin: &Pin) -> Vec<FoundAttachment> {
    let mut found = pinned(pin);
    let known: HashSet<u32> = found.iter().flat_map(|it| &it.programs).copied().collect();
    found.extend(unpinned(&known));
    found
}

/// Returns other attachments that decide over the same connections as that of `spec`: in the same
/// network namespace, on its cgroup, above or below it. Those that are `configured` in the same pin
/// directory are excepted.
pub(super) fn rivals(
    pin: &Pin,
    spec: &AttachmentSpec,
    configured: &[&str],
) -> Result<Vec<FoundAttachment>, RedirectError> {
    let (_, own) = maps::attached(pin, &spec.name)?;
    let mut others = all(pin);
    others.retain(|it| {
        let is_configured = it.pin.as_deref() == Some(pin.path())
            && it.name.as_deref().is_some_and(|n| configured.contains(&n));
        let elsewhere = it
            .netns
            .as_ref()
            .is_some_and(|all| !all.contains(&own.netns));
        !is_configured && !elsewhere && it.cgroup.is_some()
    });
    if !others.is_empty() {
        let related = related(&spec.cgroup);
        others.retain(|it| it.cgroup.is_some_and(|id| related.contains(&id)));
    }
    Ok(others)
}

/// Detaches every attachment and removes its pins. Connections take the ordinary route from then on.
pub(super) fn detach_all(pin: &Pin) -> Result<Vec<FoundAttachment>, RedirectError> {
    let found = all(pin);
    let mut directories: Vec<_> = found.iter().filter_map(|it| it.pin.clone()).collect();
    directories.sort();
    directories.dedup();
    for directory in directories {
        let pin = Pin::new(directory);
        let lock = pin.lock()?;
        for name in names(&pin.path().join(LINKS)) {
            for hook in Hook::ALL.into_iter().rev() {
                let path = pin.link(&name, hook);
                // At once: the kernel lets go of an unpinned link only after a while.
                if let Ok(Some(link)) = Link::open(&path) {
                    let _ = link.detach();
                }
                remove_pin(&path).map_err(|error| failed(&path, error))?;
            }
            retired::remove_link(&pin, &name)?;
        }
        for name in names(pin.path()).iter().filter(|name| is_ours(name)) {
            let path = pin.path().join(name);
            fs::remove_dir_all(&path).map_err(|error| failed(&path, error))?;
        }
        drop(lock);
        // Something of another program's may lie there too.
        let _ = fs::remove_dir(pin.path());
    }
    let unpinned: HashSet<u32> = { found.iter().filter(|it| it.pin.is_none()) }
        .flat_map(|it| &it.programs)
        .copied()
        .collect();
    if !unpinned.is_empty() {
        for link in Link::all().unwrap_or_default() {
            if link.info().is_ok_and(|it| unpinned.contains(&it.program)) {
                link.detach().map_err(|error| failed(pin.path(), error))?;
            }
        }
    }
    Ok(found)
}

/// Returns the content of pin directories.
fn pinned(pin: &Pin) -> Vec<FoundAttachment> {
    let mut directories = Vec::new();
    if let Some(root) = root(pin.path()) {
        pin_directories(&root, MAX_DEPTH, &mut directories);
    }
    let attachments = directories.iter().flat_map(|directory| {
        let names = names(&directory.join(LINKS)).into_iter();
        names.filter_map(|name| one(directory, name))
    });
    attachments.collect()
}

fn one(directory: &Path, name: String) -> Option<FoundAttachment> {
    let pin = Pin::new(directory.to_owned());
    let links = Hook::ALL.map(|hook| Link::open(&pin.link(&name, hook)).ok().flatten());
    let infos: Vec<_> = { links.iter().flatten() }
        .filter_map(|link| link.info().ok())
        .collect();
    if infos.is_empty() {
        return None;
    }
    Some(FoundAttachment {
        netns: namespaces(directory, &name),
        pin: Some(directory.to_owned()),
        name: Some(name),
        cgroup: infos.iter().map(|info| info.cgroup).find(|id| *id != 0),
        programs: infos.iter().map(|info| info.program).collect(),
    })
}

/// Returns the namespaces of an attachment, from the maps of every schema there.
fn namespaces(directory: &Path, name: &str) -> Option<Vec<u64>> {
    let mut cookies = Vec::new();
    for maps in names(directory) {
        if !is_maps(&maps) {
            continue;
        }
        let attachments = maps::attachments_at(&directory.join(maps).join("ATTACHMENTS"))?;
        let entries = attachments.iter().flatten().map(|(_, entry)| entry);
        let own = entries.filter(|entry| spec::unpadded(&entry.name) == name);
        cookies.extend(own.map(|entry| entry.netns));
    }
    (!cookies.is_empty()).then_some(cookies)
}

/// Returns links of our programs that are not among the `known` ones.
fn unpinned(known: &HashSet<u32>) -> Vec<FoundAttachment> {
    let Ok(links) = Link::all() else {
        return Vec::new();
    };
    let mut infos: Vec<_> = links.iter().filter_map(|link| link.info().ok()).collect();
    infos.retain(|info| !known.contains(&info.program));
    if infos.is_empty() {
        return Vec::new();
    }
    let mut found: Vec<FoundAttachment> = Vec::new();
    for program in loaded_programs().flatten() {
        let is_hook = |name| Hook::ALL.iter().any(|hook| hook.name() == name);
        if !program.name_as_str().is_some_and(is_hook) {
            continue;
        }
        let maps = program.map_ids().ok().flatten().unwrap_or_default();
        let maps: Vec<_> = { maps.iter() }
            .filter_map(|id| MapInfo::from_id(*id).ok())
            .collect();
        let uses = |name| maps.iter().find(|map| map.name_as_str() == Some(name));
        if uses("ORIGINS").is_none() {
            continue;
        }
        let attachments = uses("ATTACHMENTS").and_then(|map| maps::attachments_of(map.id()));
        let netns: Option<Vec<_>> = attachments.map(|attachments| {
            let entries = attachments.iter().flatten();
            entries.map(|(_, entry)| entry.netns).collect()
        });
        for info in infos.iter().filter(|info| info.program == program.id()) {
            let cgroup = Some(info.cgroup).filter(|id| *id != 0);
            match found.iter_mut().find(|it| it.cgroup == cgroup) {
                Some(other) => {
                    other.programs.push(info.program);
                    // Programs that do not read ATTACHMENTS say nothing of the namespace.
                    if other.netns.is_none() {
                        other.netns.clone_from(&netns);
                    }
                }
                None => found.push(FoundAttachment {
                    pin: None,
                    name: None,
                    cgroup,
                    programs: vec![info.program],
                    netns: netns.clone(),
                }),
            }
        }
    }
    found
}

/// Returns the mount point of the BPF file system that `path` is on, or would be.
fn root(path: &Path) -> Option<PathBuf> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|it| it.filesystem_type() == BPF_FS_MAGIC);
    let existing = path.ancestors().find(|path| path.exists())?;
    let on_it = existing.ancestors().take_while(|path| is_bpffs(path));
    on_it.last().map(Path::to_owned)
}

/// Finds directories that hold maps and links as ours do. Other directories may be called `links`, too.
fn pin_directories(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let names = names(directory);
    if names.iter().any(|name| name == LINKS) && names.iter().any(|name| is_maps(name)) {
        found.push(directory.to_owned());
    } else if depth > 0 {
        for name in names {
            pin_directories(&directory.join(name), depth - 1, found);
        }
    }
}

fn is_maps(name: &str) -> bool {
    name.starts_with("maps-v")
}

fn is_ours(name: &str) -> bool {
    name == LINKS || is_maps(name)
}

/// Returns the names of the directories in a directory; none when it can't be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut names: Vec<_> = directories
        .filter_map(|it| it.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Returns the numbers of a cgroup, of those above it, and of those below it.
fn related(cgroup: &Path) -> HashSet<u64> {
    let is_cgroup =
        |path: &Path| statfs(path).is_ok_and(|it| it.filesystem_type() == CGROUP2_SUPER_MAGIC);
    let above = cgroup.ancestors().take_while(|path| is_cgroup(path));
    let mut numbers: HashSet<_> = above.filter_map(|path| number(path).ok()).collect();
    let mut below = vec![cgroup.to_owned()];
    while let Some(directory) = below.pop() {
        for name in names(&directory) {
            let child = directory.join(name);
            if numbers.len() < MAX_CGROUPS && number(&child).is_ok_and(|id| numbers.insert(id)) {
                below.push(child);
            }
        }
    }
    numbers
}

fn number(cgroup: &Path) -> io::Result<u64> {
    Ok(fs::metadata(cgroup)?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_found_where_there_is_no_bpf_file_system() {
        let elsewhere = tempfile::tempdir().unwrap();
        for made in ["cpc/links/test", "cpc/maps-v1"] {
            fs::create_dir_all(elsewhere.path().join(made)).unwrap();
        }
        assert!(pinned(&Pin::new(elsewhere.path().join("cpc"))).is_empty());
    }

    #[test]
    fn pin_directories_are_known_by_their_links() {
        let root = tempfile::tempdir().unwrap();
        let ours = [
            "cpc/links/a",
            "cpc/maps-v2",
            "other/deep/links/b",
            "other/deep/maps-v1",
        ];
        let others = ["cilium/links/cgroup", "cilium/maps", "empty"];
        for made in ours.into_iter().chain(others) {
            fs::create_dir_all(root.path().join(made)).unwrap();
        }
        let mut found = Vec::new();
        pin_directories(root.path(), MAX_DEPTH, &mut found);
        assert_eq!(
            found,
            [root.path().join("cpc"), root.path().join("other/deep")]
        );
        found.clear();
        pin_directories(root.path(), 0, &mut found);
        assert!(found.is_empty());
    }
}
