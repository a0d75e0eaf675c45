//! The disks of the machine: an initial RAM disk, a root file system, and the payload.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Release;
use super::archive::{Archive, Unpacked};
use crate::sh;

/// Packages of the laboratory, the units and their checks.
const PACKAGES: [&str; 21] = [
    "bpftool",
    "conntrack",
    "curl",
    "dbus",
    "ethtool",
    "iproute2",
    "iptables",
    "kmod",
    "libcap2-bin",
    "nftables",
    "nginx-light",
    "openssh-client",
    "openssh-server",
    "openssl",
    "procps",
    "python3-minimal",
    "socat",
    "strace",
    "systemd",
    "systemd-sysv",
    "udev",
];

/// Drivers of the boot disks.
const DRIVERS: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// Bytes of the root file system, sparse.
const ROOT: &str = "6G";

/// Process 1 of the RAM disk.
const INIT: &str = include_str!("guest/init");

/// Returns the root file system of a release, which is created once.
pub(super) fn root(archive: &Archive, release: Release, folder: &Path) -> Result<PathBuf> {
    let disk = folder.join(format!("{}.ext4", release.name()));
    let made_of = folder.join(format!("{}.packages", release.name()));
    let packages = PACKAGES.join("\n");
    if disk.exists() && fs::read_to_string(&made_of).is_ok_and(|it| it == packages) {
        return Ok(disk);
    }
    let tree = folder.join(format!("{}.tree", release.name()));
    remove(&tree)?;
    archive.tree("minbase", release, &PACKAGES, &tree)?;
    // Not one of the host's.
    fs::write(tree.join("etc/hostname"), "vm\n")?;
    remove(&tree.join("etc/resolv.conf"))?;
    ext4(&tree, ROOT, &disk)?;
    remove(&tree)?;
    fs::write(made_of, packages)?;
    Ok(disk)
}

/// Returns the RAM disk: busybox and the drivers, in the order of their dependencies.
pub(super) fn initrd(archive: &Archive, kernel: &Unpacked, work: &Path) -> Result<PathBuf> {
    let tree = work.join("initrd.tree");
    remove(&tree)?;
    for folder in ["bin", "dev", "proc", "sysroot", "drivers"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    let unpacked = work.join("busybox");
    if !unpacked.exists() {
        archive.extract("busybox-static", &unpacked)?;
    }
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|it| unpacked.join(it));
    let busybox = busybox
        .iter()
        .find(|it| it.exists())
        .context("no busybox")?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    let mut order = BTreeSet::new();
    let mut list = String::new();
    for driver in DRIVERS {
        for file in files_of(kernel, driver)? {
            let name = file.file_name().context("no name")?.to_string_lossy();
            let plain = name.trim_end_matches(".xz").to_owned();
            if !order.insert(plain.clone()) {
                continue;
            }
            let to = tree.join("drivers").join(&plain);
            if plain == name {
                fs::copy(&file, &to)?;
            } else {
                let mut xz = Command::new("xz");
                xz.arg("-dc").arg(&file).stdout(fs::File::create(&to)?);
                sh::run(&mut xz)?;
            }
            list.push_str(&format!("/drivers/{plain}\n"));
        }
    }
    fs::write(tree.join("drivers.order"), list)?;
    let init = tree.join("init");
    fs::write(&init, INIT)?;
    sh::run(Command::new("chmod").arg("755").arg(init))?;
    let initrd = work.join("initrd");
    let mut cpio = Command::new("sh");
    cpio.args(["-c", "find . | ./bin/busybox cpio -o -H newc"]);
    cpio.current_dir(&tree).stdout(fs::File::create(&initrd)?);
    sh::run(cpio.stderr(Stdio::null()))?;
    Ok(initrd)
}

/// Returns the files of a driver, behind those that it needs; none where it is built in.
fn files_of(kernel: &Unpacked, driver: &str) -> Result<Vec<PathBuf>> {
    let mut modprobe = Command::new("modprobe");
    // modprobe(8) looks into DIR/lib/modules.
    modprobe.arg("-d").arg(&kernel.base);
    modprobe.args(["-S", &kernel.version, "--show-depends", driver]);
    let lines = sh::output(&mut modprobe)?;
    let files = lines
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "));
    Ok(files.map(|file| PathBuf::from(file.trim())).collect())
}

/// Returns the second disk: the payload, and the kernel's modules.
pub(super) fn payload(tree: &Path, kernel: &Unpacked, work: &Path) -> Result<PathBuf> {
    let modules = tree.join("modules");
    remove(&modules)?;
    fs::create_dir_all(&modules)?;
    let from = kernel.base.join("lib/modules").join(&kernel.version);
    sh::run(Command::new("cp").arg("-a").arg(from).arg(&modules))?;
    let disk = work.join("payload.ext4");
    ext4(tree, "3G", &disk)?;
    Ok(disk)
}

fn ext4(tree: &Path, bytes: &str, disk: &Path) -> Result<()> {
    remove(disk)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-m", "0", "-d"]).arg(tree);
    sh::run(mke2fs.arg(disk).arg(bytes))
}

pub(super) fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    if let Err(error) = result {
        bail!("cannot remove {}: {error}", path.display());
    }
    Ok(())
}
