use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use super::*;

/// A user without privileges: `nobody`, or any other number.
const USER: u32 = 65_534;

/// Returns a directory that belongs to [`USER`], inside one that does not; `None`, with a note,
/// unless root runs the test.
fn users() -> Option<(TempDir, PathBuf)> {
    if !geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs tests as root");
        println!("skipped: only root can be led elsewhere");
        return None;
    }
    let place = tempfile::tempdir().unwrap();
    // Others may go through it.
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let directory = place.path().join("users");
    fs::create_dir(&directory).unwrap();
    chown(&directory, Some(USER), Some(USER)).unwrap();
    Some((place, directory))
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.mode() & 0o777)
}

#[test]
fn files_are_locked_made_replaced_and_removed() {
    let place = tempfile::tempdir().unwrap();
    let below = place.path().join("a/b");
    let directory = Directory::create(&below, 0o700).unwrap();
    assert_eq!(fs::metadata(&below).unwrap().mode() & 0o777, 0o700);
    drop(directory.lock("lock").unwrap());
    drop(directory.lock("lock").unwrap());
    directory.replace("x", b"1", 0o644).unwrap();
    directory.replace("x", b"2", 0o600).unwrap();
    assert_eq!(directory.read("x").unwrap(), b"2");
    assert_eq!(owner(&below.join("x")).1, 0o600);
    let error = directory.create_new("x", b"3", 0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert!(directory.has("x") && !directory.has("y"));
    directory.remove("x").unwrap();
    for (open, text) in [(true, "1"), (true, "2"), (false, "3")] {
        let file = match open {
            true => directory.open_to_append("log", 0o640),
            false => directory.open_to_write("log", 0o600),
        };
        file.unwrap().write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(directory.read("log").unwrap(), b"32");
    assert_eq!(directory.size("log").unwrap(), 2);
    assert_eq!(owner(&below.join("log")).1, 0o640);
    let mut names = directory.names().unwrap();
    names.sort();
    assert_eq!(names, ["lock", "log"]);
    directory.rename("log", "x").unwrap();
    directory.remove("x").unwrap();
    let missing = directory.read("x").unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    assert_eq!(fs::read_dir(&below).unwrap().count(), 1);
    let (of, name) = (Directory::of(&below.join("lock")).unwrap().0, "lock");
    assert!(of.has(name));
}

#[test]
fn a_link_in_the_directory_is_never_followed() {
    let place = tempfile::tempdir().unwrap();
    let victim = place.path().join("victim");
    fs::write(&victim, "as it was").unwrap();
    let directory = Directory::create(&place.path().join("d"), 0o700).unwrap();
    for name in ["lock", "file"] {
        symlink(&victim, place.path().join("d").join(name)).unwrap();
    }
    nix::unistd::mkfifo(&place.path().join("d/pipe"), Mode::S_IRWXU).unwrap();
    for name in ["lock", "file", "pipe"] {
        let error = directory.lock(name).unwrap_err().to_string();
        assert!(
            error.contains(name) && error.contains("remove it"),
            "{error}"
        );
        assert!(directory.read(name).is_err(), "{name}");
        assert!(directory.size(name).is_err(), "{name}");
        assert!(directory.open_to_append(name, 0o600).is_err(), "{name}");
    }
    assert!(directory.create_new("lock", b"x", 0o600).is_err());
    directory.replace("file", b"new", 0o600).unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"as it was");
    assert_eq!(directory.read("file").unwrap(), b"new");
}

/// Root's new files belong to the owner of the directory; older files, and files elsewhere, keep their
/// owner.
#[test]
fn root_is_led_nowhere_by_a_directorys_owner() {
    let Some((place, path)) = users() else {
        return;
    };
    let victim = place.path().join("victim");
    fs::write(&victim, "root's").unwrap();
    fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
    symlink(&victim, path.join("lock")).unwrap();
    fs::hard_link(&victim, path.join("hard")).unwrap();
    let directory = Directory::create(&path.join("below"), 0o700).unwrap();
    directory.replace("x", b"1", 0o600).unwrap();
    drop(directory.lock("lock").unwrap());
    for name in ["below", "below/x", "below/lock"] {
        assert_eq!(owner(&path.join(name)).0, USER, "{name}");
    }
    let directory = Directory::open(&path).unwrap();
    assert!(directory.lock("lock").is_err());
    drop(directory.lock("hard").unwrap());
    let error = directory.open_to_append("hard", 0o600).unwrap_err();
    assert!(error.to_string().contains("another hard link"), "{error}");
    assert!(directory.open_to_write("hard", 0o600).is_err());
    directory.replace("hard", b"another", 0o644).unwrap();
    assert_eq!(owner(&victim), (0, 0o600));
    assert_eq!(fs::read(&victim).unwrap(), b"root's");

    // A link on the way.
    let elsewhere = place.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, path.join("way")).unwrap();
    for way in ["way", "way/below"] {
        let error = Directory::create(&path.join(way), 0o700).unwrap_err();
        assert!(error.to_string().contains("does not follow"), "{error}");
    }
    symlink("/root", place.path().join("planted")).unwrap();
    std::os::unix::fs::lchown(place.path().join("planted"), Some(USER), None).unwrap();
    assert!(Directory::open(&place.path().join("planted")).is_err());
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[test]
fn links_of_roots_own_are_followed() {
    let Some((place, path)) = users() else {
        return;
    };
    symlink("users", place.path().join("relative")).unwrap();
    symlink(&path, place.path().join("absolute")).unwrap();
    for link in ["relative", "absolute", "users/../relative"] {
        let directory = Directory::create(&place.path().join(link), 0o700).unwrap();
        directory.replace("x", link.as_bytes(), 0o600).unwrap();
        assert_eq!(fs::read(path.join("x")).unwrap(), link.as_bytes());
    }
}

/// A truncated key would obstruct the next attempt, and pass for a key.
#[test]
fn a_file_that_does_not_fit_is_not_left_there() {
    if !geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs tests as root");
        println!("skipped: only root can mount a file system that is small");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    // A thread's own mounts end with it.
    let tried = std::thread::scope(|scope| {
        let small = scope.spawn(|| {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let (none, size) = (MsFlags::empty(), Some("size=64k"));
            mount(None::<&str>, place.path(), Some("tmpfs"), none, size).unwrap();
            let directory = Directory::open(place.path()).unwrap();
            let failed = directory.create_new("x", &[0; 1 << 20], 0o600);
            (failed.unwrap_err().kind(), directory.has("x"))
        });
        small.join().unwrap()
    });
    assert_eq!(tried, (io::ErrorKind::StorageFull, false));
}
