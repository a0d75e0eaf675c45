//! Builds `cpc` and the programs of the laboratory.

use anyhow::Result;
use tunnel_tests::lab::Programs;

use crate::workspace::{self, PROFILE};
use crate::{ebpf, sh};

/// Builds the programs with the kernel programs of the last build, and returns their paths.
pub(crate) fn build() -> Result<Programs> {
    sh::heading("Programs");
    if let Some(object) = ebpf::missing() {
        eprintln!(
            "    without the redirect: {} is not there",
            object.display()
        );
    }
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--profile", PROFILE]);
    sh::run(cargo.args(["--package", "cpc", "--package", "tunnel-tests", "--bins"]))?;
    Ok(Programs::in_folder(&workspace::target().join(PROFILE)))
}
