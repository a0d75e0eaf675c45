//! A release in target/dist: the program, its debug information, the lists of its components, and
//! the checksums of all of it.
//!
//! Two lists (SBOM, CycloneDX JSON) have the components of `cpc`, and of the kernel programs in it.
//! cargo-cyclonedx writes the lists, and each is compared with cargo's own account of the build: an
//! incomplete list is worse than none.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::setup::{self, Purpose};
use crate::{ebpf, sh, workspace};

/// List of the components of a build.
struct Sbom {
    /// The package, and its folder.
    package: &'static str,
    /// Target of the build; this machine when missing.
    target: Option<&'static str>,
    /// File name of cargo-cyclonedx, beside the package's manifest.
    written: &'static str,
    /// File name in a release.
    name: &'static str,
}

const SBOMS: [Sbom; 2] = [
    Sbom {
        package: "cpc",
        target: None,
        written: "cpc_bin.cdx.json",
        name: "cpc.cdx.json",
    },
    Sbom {
        package: "tunnel-ebpf",
        target: Some("bpfel-unknown-none"),
        written: "cpc-redirect_bin.cdx.json",
        name: "cpc-redirect.cdx.json",
    },
];

/// The program, which names its functions but not their lines.
const PROGRAM: &str = "cpc";

/// Debug information of `cpc`: debuggers and profilers find it by its name beside the program.
const DEBUG_INFO: &str = "cpc.debug";

/// Licences of the files in a release.
const LICENCES: [(&str, &str); 2] = [
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("tunnel-ebpf/LICENSE-GPL2", "LICENSE-GPL2"),
];

/// Builds the release.
pub(crate) fn run() -> Result<()> {
    setup::ensure(Purpose::Dist)?;
    ebpf::build()?;

    sh::heading("Program");
    let mut build = workspace::cargo();
    build.args(["build", "--locked", "--release"]);
    sh::run(build.args(["--package", "cpc"]))?;
    let dist = workspace::target().join("dist");
    if dist.exists() {
        fs::remove_dir_all(&dist)?;
    }
    fs::create_dir_all(&dist)?;
    copy(
        &workspace::target().join("release/cpc"),
        &dist.join(PROGRAM),
    )?;
    split_debug_info(&dist)?;
    for (from, name) in LICENCES {
        copy(&workspace::root().join(from), &dist.join(name))?;
    }

    sh::heading("Components");
    for sbom in &SBOMS {
        fs::write(dist.join(sbom.name), sbom.list()?)?;
    }

    sh::heading("Checksums");
    let mut names: Vec<_> = SBOMS.iter().map(|sbom| sbom.name).collect();
    names.extend([PROGRAM, DEBUG_INFO]);
    names.extend(LICENCES.map(|(_, name)| name));
    let sums = sh::output(Command::new("sha256sum").args(&names).current_dir(&dist))?;
    fs::write(dist.join("SHA256SUMS"), format!("{sums}\n"))?;
    eprintln!("{sums}\n    in {}", dist.display());
    Ok(())
}

/// Moves the debug information, which is most of the program's size, to a file of its own.
fn split_debug_info(dist: &Path) -> Result<()> {
    let objcopy = || {
        let mut objcopy = Command::new("objcopy");
        objcopy.current_dir(dist);
        objcopy
    };
    let keep = ["--only-keep-debug", "--compress-debug-sections"];
    sh::run(objcopy().args(keep).args([PROGRAM, DEBUG_INFO]))?;
    sh::run(objcopy().args([
        "--strip-debug",
        &format!("--add-gnu-debuglink={DEBUG_INFO}"),
        PROGRAM,
    ]))
}

impl Sbom {
    /// Returns the list, without the paths of this machine.
    fn list(&self) -> Result<String> {
        let manifest = format!("{}/Cargo.toml", self.package);
        let mut cyclonedx = workspace::cargo();
        cyclonedx.args(["cyclonedx", "--quiet", "--format", "json"]);
        cyclonedx.args(["--spec-version", "1.5", "--describe", "binaries"]);
        cyclonedx.args(["--manifest-path", &manifest]);
        cyclonedx.args(self.target.map(|target| format!("--target={target}")));
        // The same source has the same list.
        let mut git = Command::new("git");
        git.args(["log", "-1", "--format=%ct"])
            .current_dir(workspace::root());
        if let Ok(time) = sh::output(&mut git) {
            cyclonedx.env("SOURCE_DATE_EPOCH", time);
        }
        sh::run(&mut cyclonedx)?;
        let written = workspace::root().join(self.package).join(self.written);
        let text = fs::read_to_string(&written)
            .with_context(|| format!("cannot read {}", written.display()));
        clean_up()?;
        let text = text?.replace(
            &format!("file://{}", workspace::root().display()),
            "file://",
        );

        let missing = missing(&serde_json::from_str(&text)?, &self.built()?);
        ensure!(
            missing.is_empty(),
            "{} lacks packages of the build: {}",
            self.name,
            missing.join(", ")
        );
        Ok(text)
    }

    /// Returns the packages that cargo builds, as `name version`.
    fn built(&self) -> Result<Vec<String>> {
        let mut tree = workspace::cargo();
        tree.args(["tree", "--locked", "--package", self.package]);
        tree.args(["--edges", "normal,build", "--prefix", "none"]);
        tree.args(self.target.map(|target| format!("--target={target}")));
        let tree = sh::output(&mut tree)?;
        // The first is the package itself.
        let names = tree.lines().skip(1).filter_map(|line| {
            let (name, rest) = line.split_once(" v")?;
            let version = rest.split(' ').next()?;
            Some(format!("{name} {version}"))
        });
        Ok(names.collect())
    }
}

/// Removes the lists that were written beside the manifests of all packages.
fn clean_up() -> Result<()> {
    for package in fs::read_dir(workspace::root())? {
        let Ok(files) = fs::read_dir(package?.path()) else {
            continue;
        };
        for file in files {
            let path = file?.path();
            if path.to_string_lossy().ends_with(".cdx.json") {
                fs::remove_file(path)?;
            }
        }
    }
    Ok(())
}

/// Returns the built packages that are not in the list.
fn missing(sbom: &Value, built: &[String]) -> Vec<String> {
    let components = sbom["components"].as_array().into_iter().flatten();
    let listed: HashSet<_> = components
        .filter_map(|it| {
            Some(format!(
                "{} {}",
                it["name"].as_str()?,
                it["version"].as_str()?
            ))
        })
        .collect();
    let mut missing: Vec<_> = built
        .iter()
        .filter(|name| !listed.contains(*name))
        .cloned()
        .collect();
    missing.sort();
    missing.dedup();
    missing
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_that_leaves_something_out_is_noticed() {
        let sbom = json!({"components": [
            {"name": "bytes", "version": "1.0.0"},
            {"name": "tokio", "version": "1.2.3"},
        ]});
        let built = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert!(missing(&sbom, &built(&["tokio 1.2.3", "bytes 1.0.0"])).is_empty());
        let other = built(&["tokio 1.2.4", "bytes 1.0.0", "libc 0.2.1", "libc 0.2.1"]);
        assert_eq!(missing(&sbom, &other), ["libc 0.2.1", "tokio 1.2.4"]);
        assert_eq!(missing(&json!({}), &other[2..3]), ["libc 0.2.1"]);
    }
}
