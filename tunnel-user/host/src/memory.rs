//! The memory that this process may use for data of peers.

use std::fs;
use std::path::Path;

/// Mount points of control groups (version 2 alone, version 2 beside version 1, version 1), each with
/// the file that holds the memory limit of a group.
const GROUPS: [(&str, &str); 3] = [
    ("/sys/fs/cgroup", "memory.max"),
    ("/sys/fs/cgroup/unified", "memory.max"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
];

/// Returns a quarter of the memory that this process may use, at most `max` bytes.
pub fn share(max: u64) -> u64 {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let bounds = paths.flat_map(|path| GROUPS.map(|group| bound_of(group, path)));
    let bounds = bounds.flatten().chain([machine()]);
    bounds.map(|bytes| bytes / 4).fold(max, u64::min)
}

/// Returns the lowest limit of a group and its ancestors, in bytes, if any has one.
fn bound_of((root, file): (&str, &str), path: &str) -> Option<u64> {
    let root = Path::new(root);
    let group = root.join(path.trim_start_matches('/'));
    let groups = group
        .ancestors()
        .take_while(|group| group.starts_with(root));
    let bounds = groups.filter_map(|group| fs::read_to_string(group.join(file)).ok());
    bounds.filter_map(|bound| bound.trim().parse().ok()).min()
}

/// Returns the machine's memory in bytes (sysinfo(2)). A unit with `ProcSubset=pid` has no
/// `/proc/meminfo`.
fn machine() -> u64 {
    let known = rustix::system::sysinfo();
    known.totalram.saturating_mul(known.mem_unit.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_that_of_the_narrowest_group() {
        assert_eq!(share(1000), 1000);
        assert!(share(u64::MAX) <= machine() / 4);
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let root = root.path().to_str().unwrap();
        let bound = |path| bound_of((root, "memory.max"), path);
        assert_eq!(bound("/a/b"), None);
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(inner.parent().unwrap().join("memory.max"), "4096\n").unwrap();
        assert_eq!(bound("/a/b"), Some(4096));
        fs::write(inner.join("memory.max"), "1024\n").unwrap();
        assert_eq!(
            (bound("/a/b"), bound("/a"), bound("/")),
            (Some(1024), Some(4096), None)
        );
    }

    #[test]
    fn the_machines_memory_is_all_that_a_container_may_see_of_it() {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|it| it.strip_prefix("MemTotal:"));
        let kibibytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
        assert!(machine() >> 10 >= kibibytes.parse().unwrap());
        assert!(machine() < 1 << 50, "in bytes");
    }
}
