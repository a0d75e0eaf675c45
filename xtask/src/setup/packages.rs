//! The distribution's packages.
//!
//! The steps look for programs and not for packages, so that a machine of another distribution
//! needs no package names to be ready.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Report;
use crate::sh;

/// A program and the Debian package that brings it.
#[derive(Clone, Copy)]
pub(super) struct Package<'a> {
    /// Name or path of the program; empty where the package brings none.
    pub(super) program: &'a str,
    /// Name of the package.
    pub(super) name: &'a str,
    /// Purpose of the program, for the person at the terminal.
    pub(super) why: &'a str,
}

impl<'a> Package<'a> {
    /// Returns a package that is installed by its name alone.
    pub(super) const fn named(name: &'a str, why: &'a str) -> Self {
        Self {
            program: "",
            name,
            why,
        }
    }
}

const NGINX: Package<'_> = Package {
    program: "nginx",
    name: "nginx",
    why: "stands in for the kubelet's TLS server",
};
const CURL: Package<'_> = Package {
    program: "curl",
    name: "curl",
    why: "stands in for kube-apiserver",
};

const OPENSSL: Package<'_> = Package {
    program: "openssl",
    name: "openssl",
    why: "makes the kubelet's certificates",
};

/// Packages of the demonstration without root.
pub(super) const LOOPBACK: &[Package<'_>] = &[NGINX, CURL, OPENSSL];

/// Packages of the laboratory.
pub(super) const LABORATORY: &[Package<'_>] = &[
    Package {
        program: "ip",
        name: "iproute2",
        why: "makes network namespaces",
    },
    Package {
        program: "nft",
        name: "nftables",
        why: "is the NAT router's rule set",
    },
    Package {
        program: "conntrack",
        name: "conntrack",
        why: "drops the NAT's mappings",
    },
    Package {
        program: "socat",
        name: "socat",
        why: "is a client that half-closes",
    },
    Package {
        program: "bpftool",
        name: "bpftool",
        why: "shows what the verifier left of a program",
    },
    Package {
        program: "c++",
        name: "g++",
        why: "compiles what is not Rust: libFuzzer, bpf-linker",
    },
    Package {
        program: "sshd",
        name: "openssh-server",
        why: "is a program with long connections",
    },
    Package {
        program: "ssh",
        name: "openssh-client",
        why: "is its client",
    },
    Package {
        program: "strace",
        name: "strace",
        why: "kills a process at a chosen system call",
    },
    NGINX,
    CURL,
    OPENSSL,
];

/// Packages of virtual machines, which are only unpacked.
pub(super) const VIRTUAL_MACHINE: &[Package<'_>] = &[
    Package {
        program: "mmdebstrap",
        name: "mmdebstrap",
        why: "makes a root file system",
    },
    Package {
        program: "mke2fs",
        name: "e2fsprogs",
        why: "makes a disk of it",
    },
    Package {
        program: "depmod",
        name: "kmod",
        why: "knows which driver needs which",
    },
    Package {
        program: "xz",
        name: "xz-utils",
        why: "unpacks drivers",
    },
    Package {
        program: "strip",
        name: "binutils",
        why: "makes the tests smaller",
    },
];

/// Installs those of `packages` whose program is missing.
pub(super) fn ensure(packages: &[Package<'_>], report: &mut Report) -> Result<()> {
    let (present, missing): (Vec<_>, Vec<_>) = packages
        .iter()
        .partition(|package| sh::find(package.program).is_some());
    report
        .present
        .extend(present.iter().map(|package| program_name(package)));
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)?;
    if let Some(package) = missing
        .iter()
        .find(|package| sh::find(package.program).is_none())
    {
        bail!(
            "package {} is installed, and yet there is no {}",
            package.name,
            package.program
        );
    }
    report
        .installed
        .extend(missing.iter().map(|package| program_name(package)));
    Ok(())
}

/// Installs `packages` with apt-get, or prints why it can't, and the remedy.
pub(super) fn install(packages: &[Package<'_>]) -> Result<()> {
    for package in packages {
        eprintln!("    missing: {:<24} {}", package.name, package.why);
    }
    let names: Vec<_> = packages.iter().map(|package| package.name).collect();
    let by_hand = format!(
        "apt-get install -y --no-install-recommends {}",
        names.join(" ")
    );
    if sh::find("apt-get").is_none() {
        let programs: Vec<_> = packages.iter().map(program_name).collect();
        bail!(
            "there is no apt-get here: install {} with your package manager (Debian's names: {})",
            programs.join(", "),
            names.join(", ")
        );
    }
    let Some(administrator) = administrator() else {
        bail!("installing needs root: run `sudo {by_hand}`, then this again");
    };
    sh::run(administrator().args(["apt-get", "-qq", "update"]))?;
    let services = [(NGINX.name, "nginx"), ("openssh-server", "ssh")];
    let mut apt = administrator();
    // RUNLEVEL=1 keeps init scripts from starting what is installed.
    apt.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"]);
    apt.args(["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "install", "-y"]);
    apt.arg("--no-install-recommends").args(&names);
    sh::run(&mut apt).with_context(|| format!("try by hand: `{by_hand}`"))?;
    let new = services.iter().filter(|(name, _)| names.contains(name));
    if Path::new("/run/systemd/system").exists() {
        // The packages start servers; the laboratory only wants the programs.
        for (_, service) in new {
            sh::run(administrator().args(["systemctl", "disable", "--now", service]))?;
        }
    }
    Ok(())
}

/// Whether the distribution has these packages and this user may install them.
pub(super) fn offered(packages: &[Package<'_>]) -> bool {
    let Some(administrator) = administrator() else {
        return false;
    };
    sh::find("apt-get").is_some()
        && sh::succeeds(administrator().args(["apt-get", "-qq", "update"]))
        && packages
            .iter()
            .all(|it| sh::succeeds(Command::new("apt-cache").args(["show", it.name])))
}

/// Returns the start of a command that runs as root, if this user may without a password; variables
/// and the program follow.
fn administrator() -> Option<fn() -> Command> {
    if nix::unistd::geteuid().is_root() {
        Some(|| Command::new("env"))
    } else if sh::succeeds(Command::new("sudo").args(["-n", "true"])) {
        Some(|| {
            let mut sudo = Command::new("sudo");
            sudo.args(["-n", "env"]);
            sudo
        })
    } else {
        None
    }
}

fn program_name(package: &Package<'_>) -> String {
    let name = Path::new(package.program)
        .file_name()
        .and_then(|name| name.to_str());
    name.filter(|name| !name.is_empty())
        .unwrap_or(package.name)
        .to_owned()
}
