//! Permitted dependencies between crates: arrows run one way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The crates below `tunnel-user/`, each before those that may depend on it.
const ORDER: [&str; 11] = [
    "cpc-host",
    "cpc-config",
    "cpc-observe",
    "cpc-kubernetes",
    "cpc-identity",
    "cpc-redirect",
    "cpc-datapath",
    "cpc-transport",
    "cpc-agent",
    "cpc-server",
    "cpc",
];

/// Libraries that one crate alone may name.
const ALONE: [(&str, &str); 6] = [
    ("aya", "cpc-redirect"),
    ("aya-log", "cpc-redirect"),
    ("kube", "cpc-kubernetes"),
    ("k8s-openapi", "cpc-kubernetes"),
    ("h2", "cpc-transport"),
    ("quinn-proto", "cpc-transport"),
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
fn crates_depend_downwards() -> Result<()> {
    let dependencies = dependencies()?;
    let place = |name: &str| ORDER.iter().position(|it| *it == name);
    for (name, uses) in &dependencies {
        let own = place(name);
        ensure!(
            own.is_some() || !name.starts_with("cpc"),
            "{name} has no place in the order"
        );
        for used in uses {
            let Some(below) = place(used) else { continue };
            ensure!(own.is_some_and(|own| below < own), "{name} uses {used}");
        }
    }
    let server = &dependencies["cpc-server"];
    ensure!(!server.contains("cpc-agent"), "the halves know each other");
    Ok(())
}

#[test]
fn one_crate_alone_names_a_library() -> Result<()> {
    for (name, uses) in dependencies()? {
        if is_ours(&name) {
            for (library, owner) in ALONE {
                let named = uses.contains(library);
                ensure!(!named || name == owner, "{name} uses {library}");
            }
        }
    }
    Ok(())
}

fn is_ours(name: &str) -> bool {
    ORDER.contains(&name)
}
