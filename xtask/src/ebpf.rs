//! Builds the kernel programs.
//!
//! They need a compiler with a `core` for `bpfel-unknown-none`, which a stable toolchain does not
//! have. Two are known: rustup's nightly with the `rust-src` component, which builds `core` on the
//! way (the usual one), and Debian's compiler with its package of a ready-made `core`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{sh, workspace};

const TARGET: &str = "bpfel-unknown-none";
const PACKAGE: &str = "tunnel-ebpf";
/// The binary of that package.
const BINARY: &str = "cpc-redirect";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Asks the `clippy-driver` beside it, which belongs to the same compiler.
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";

/// A compiler that can build for [`TARGET`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// `rustup run nightly`, building `core` from the component `rust-src`.
    Nightly,
    /// `/usr/bin/rustc` with Debian's prebuilt `core`.
    Debian,
}

impl Toolchain {
    /// Returns the installed compiler; nightly comes first, because it is the usual one.
    pub(crate) fn installed() -> Option<Self> {
        if nightly_has_source() {
            Some(Self::Nightly)
        } else if Path::new(DEBIAN_CORE).is_dir() && Path::new(DEBIAN_RUSTC).exists() {
            Some(Self::Debian)
        } else {
            None
        }
    }

    /// Returns the name for people.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc with its ready-made core for BPF",
        }
    }

    /// Returns the major version of its LLVM: bpf-linker must not be older.
    pub(crate) fn llvm_major(self) -> Result<u32> {
        let mut rustc = match self {
            Self::Nightly => rustup_nightly("rustc"),
            Self::Debian => Command::new(DEBIAN_RUSTC),
        };
        let version = sh::output(rustc.arg("-vV"))?;
        version
            .lines()
            .find_map(|line| {
                line.strip_prefix("LLVM version: ")?
                    .split('.')
                    .next()?
                    .parse()
                    .ok()
            })
            .with_context(|| format!("`rustc -vV` names no LLVM version:\n{version}"))
    }

    /// Returns `cargo SUBCOMMAND` for the kernel programs with this compiler.
    fn cargo(self, subcommand: &str, linker: &Path) -> Command {
        let mut cargo = match self {
            Self::Nightly => {
                let mut cargo = rustup_nightly("cargo");
                cargo.args([subcommand, "-Zbuild-std=core"]);
                cargo
            }
            Self::Debian => {
                let mut cargo = if subcommand == "clippy" {
                    Command::new(DEBIAN_CLIPPY)
                } else {
                    workspace::cargo()
                };
                // Only aya-ebpf may use unstable features, as its nightly users allow it to.
                cargo
                    .arg(subcommand)
                    .env("RUSTC", DEBIAN_RUSTC)
                    .env("RUSTC_BOOTSTRAP", "aya_ebpf");
                cargo
            }
        };
        // Debug information becomes BTF, which the loader and `bpftool` read.
        let flags = [
            format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
        ];
        cargo
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .args([
                "--package",
                PACKAGE,
                "--bins",
                "--release",
                "--target",
                TARGET,
            ])
            .current_dir(workspace::root());
        cargo
    }

    /// Returns `cargo clippy` for the kernel programs, if this compiler has it.
    pub(crate) fn clippy(self, linker: &Path) -> Option<Command> {
        match self {
            Self::Nightly => Some(self.cargo("clippy", linker)),
            Self::Debian => Path::new(DEBIAN_CLIPPY)
                .exists()
                .then(|| self.cargo("clippy", linker)),
        }
    }
}

/// Returns the compiler and the linker, or the command that installs them.
pub(crate) fn tools() -> Result<(Toolchain, PathBuf)> {
    let Some(toolchain) = Toolchain::installed() else {
        bail!("no compiler for {TARGET} is installed; `cargo xtask setup` installs one");
    };
    let Some(linker) = sh::find("bpf-linker") else {
        bail!("bpf-linker is not installed; `cargo xtask setup` installs it");
    };
    Ok((toolchain, linker))
}

/// Returns the path of the object, from which the user-space build takes it.
fn object() -> PathBuf {
    workspace::root().join(format!("target/bpf/{BINARY}.o"))
}

/// Returns the path of the object if it is not built yet.
pub(crate) fn missing() -> Option<PathBuf> {
    Some(object()).filter(|object| !object.exists())
}

/// Builds the kernel programs and puts the object at [`object`].
pub(crate) fn build() -> Result<()> {
    sh::heading("Kernel programs");
    let (toolchain, linker) = tools()?;
    eprintln!("    with {}", toolchain.describe());
    sh::run(&mut toolchain.cargo("build", &linker))?;

    let built = workspace::target()
        .join(TARGET)
        .join("release")
        .join(BINARY);
    let code = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let object = object();
    install(&code, &object)?;
    eprintln!(
        "    {} ({} KiB)",
        object.display(),
        code.len().div_ceil(1024)
    );
    Ok(())
}

/// Puts `code` at `object` in one step. An unchanged file keeps its time stamp, so that the
/// user-space build stays fresh.
fn install(code: &[u8], object: &Path) -> Result<()> {
    if fs::read(object).is_ok_and(|before| before == code) {
        return Ok(());
    }
    let new = object.with_extension("new");
    let folder = object.parent().unwrap_or(object);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&new, code))
        .and_then(|()| fs::rename(&new, object))
        .with_context(|| format!("cannot write {}", object.display()))
}

/// Returns `rustup run nightly PROGRAM` without the variables of the toolchain that runs this task.
pub(crate) fn rustup_nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    command
}

fn nightly_has_source() -> bool {
    let Some(sysroot) = nightly_sysroot() else {
        return false;
    };
    sysroot
        .join("lib/rustlib/src/rust/library/core/Cargo.toml")
        .exists()
}

/// Asks rustup's folders instead of rustc: that takes no time, and `setup` asks each time.
fn nightly_sysroot() -> Option<PathBuf> {
    let home = std::env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".rustup")))?;
    // A dated nightly ("nightly-2026-01-01-x86_64-..") is not what `rustup run nightly` runs.
    let name = format!("nightly-{}-", std::env::consts::ARCH);
    let folders = fs::read_dir(home.join("toolchains")).ok()?;
    folders
        .filter_map(Result::ok)
        .find(|folder| folder.file_name().to_string_lossy().starts_with(&name))
        .map(|folder| folder.path())
}
