//! Permitted dependencies between crates: arrows run one way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// All crates, each with the crates of this project that it may depend on: the table in ARCHITECTURE.md.
const PERMITTED: [(&str, &[&str]); 22] = [
    ("tunnel-proto", &[]),
    ("tunnel-ebpf-common", &[]),
    ("tunnel-ebpf", &["tunnel-ebpf-common"]),
    ("tunnel-fake-kubernetes", &[]),
    ("tunnel-tests", &[]),
    ("xtask", &["tunnel-tests"]),
    ("cpc-host", &[]),
    ("cpc-keeper", &["cpc-host", "tunnel-proto"]),
    ("cpc-config", &["cpc-host", "tunnel-proto"]),
    ("cpc-observe", &["cpc-config", "cpc-host", "tunnel-proto"]),
    ("cpc-kubernetes", &["cpc-config", "cpc-host", "cpc-observe"]),
    (
        "cpc-identity",
        &[
            "cpc-config",
            "cpc-host",
            "cpc-kubernetes",
            "cpc-observe",
            "tunnel-proto",
        ],
    ),
    ("cpc-redirect", &["cpc-host", "tunnel-ebpf-common"]),
    (
        "cpc-datapath",
        &[
            "cpc-config",
            "cpc-host",
            "cpc-keeper",
            "cpc-observe",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-handover",
        &[
            "cpc-datapath",
            "cpc-host",
            "cpc-keeper",
            "cpc-observe",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-transport",
        &[
            "cpc-config",
            "cpc-datapath",
            "cpc-host",
            "cpc-identity",
            "cpc-observe",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-session",
        &[
            "cpc-datapath",
            "cpc-observe",
            "cpc-transport",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-agent",
        &[
            "cpc-config",
            "cpc-datapath",
            "cpc-handover",
            "cpc-host",
            "cpc-identity",
            "cpc-keeper",
            "cpc-observe",
            "cpc-session",
            "cpc-transport",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-server",
        &[
            "cpc-config",
            "cpc-datapath",
            "cpc-handover",
            "cpc-host",
            "cpc-identity",
            "cpc-keeper",
            "cpc-kubernetes",
            "cpc-observe",
            "cpc-redirect",
            "cpc-session",
            "cpc-transport",
            "tunnel-proto",
        ],
    ),
    (
        "cpc-konnectivity",
        &[
            "cpc-agent",
            "cpc-config",
            "cpc-datapath",
            "cpc-host",
            "cpc-identity",
            "cpc-kubernetes",
            "cpc-observe",
            "cpc-server",
            "cpc-transport",
            "tunnel-proto",
        ],
    ),
    (
        "cpc",
        &[
            "cpc-agent",
            "cpc-config",
            "cpc-handover",
            "cpc-host",
            "cpc-identity",
            "cpc-keeper",
            "cpc-konnectivity",
            "cpc-observe",
            "cpc-redirect",
            "cpc-server",
            "tunnel-proto",
        ],
    ),
    (
        "tunnel-simulation",
        &[
            "cpc-agent",
            "cpc-config",
            "cpc-host",
            "cpc-identity",
            "cpc-observe",
            "cpc-server",
        ],
    ),
];

/// Libraries for tests, on which no crate of a release depends.
const FOR_TESTS: [&str; 4] = [
    "criterion",
    "proptest",
    "tunnel-fake-kubernetes",
    "tunnel-simulation",
];

/// Libraries that one crate alone may name.
const ALONE: [(&str, &str); 6] = [
    ("aya", "cpc-redirect"),
    ("aya-log", "cpc-redirect"),
    ("kube", "cpc-kubernetes"),
    ("k8s-openapi", "cpc-kubernetes"),
    ("h2", "cpc-konnectivity"),
    ("quinn-proto", "cpc-transport"),
];

/// Crates that may name any library: the kernel programs with their types, and tools for tests.
const UNCHECKED: [&str; 5] = [
    "tunnel-ebpf",
    "tunnel-ebpf-common",
    "tunnel-fake-kubernetes",
    "tunnel-tests",
    "xtask",
];

/// Reads what each crate depends on, but for tests, from cargo.
fn dependencies() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let cargo = option_env!("CARGO").unwrap_or("cargo");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root)
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo metadata: {errors}");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    let name = |of: &Value| of["name"].as_str().map(str::to_owned).context("no name");
    let each = packages.iter().map(|package| {
        let all = package["dependencies"].as_array().context("no list")?;
        let used = all.iter().filter(|it| it["kind"] != "dev");
        Ok((name(package)?, used.map(name).collect::<Result<_>>()?))
    });
    each.collect()
}

#[test]
fn crates_depend_on_what_they_may() -> Result<()> {
    let dependencies = dependencies()?;
    let is_own = |name: &str| dependencies.contains_key(name);
    for (name, permitted) in PERMITTED {
        let uses = dependencies
            .get(name)
            .with_context(|| format!("no {name}"))?;
        for used in uses.iter().filter(|used| is_own(used)) {
            ensure!(permitted.contains(&used.as_str()), "{name} uses {used}");
        }
    }
    let unknown = dependencies.keys().find(|name| permitted(name).is_none());
    ensure!(unknown.is_none(), "{unknown:?} is not in the table");
    Ok(())
}

#[test]
fn one_crate_alone_names_a_library() -> Result<()> {
    for (name, uses) in dependencies()? {
        if !UNCHECKED.contains(&name.as_str()) {
            for (library, owner) in ALONE {
                let named = uses.contains(library);
                ensure!(!named || name == owner, "{name} uses {library}");
            }
            for library in FOR_TESTS {
                ensure!(!uses.contains(library), "{name} uses {library}");
            }
        }
    }
    Ok(())
}

/// Folders whose code names no foreign protocol: an extension brings it.
const FENCED: [&str; 1] = ["tunnel-user/agent/src"];

#[test]
fn an_extension_alone_names_a_foreign_protocol() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders: Vec<_> = FENCED.iter().map(|folder| root.join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
            let path = entry?.path();
            // Tests may need a foreign kind.
            let is_test = path.ends_with("tests.rs") || path.ends_with("model.rs");
            if path.is_dir() {
                folders.push(path);
            } else if !is_test {
                let text = fs::read_to_string(&path)?.to_lowercase();
                let named = text.contains("konnectivity");
                ensure!(!named, "{} names Konnectivity", path.display());
            }
        }
    }
    Ok(())
}

fn permitted(name: &str) -> Option<&'static [&'static str]> {
    let entry = PERMITTED.iter().find(|(of, _)| *of == name);
    entry.map(|(_, permitted)| *permitted)
}
