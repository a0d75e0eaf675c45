//! Building `cpc` and the laboratory's own programs.

use anyhow::Result;
use tunnel_tests::lab::Programs;

use crate::workspace::{self, PROFILE};
use crate::{ebpf, sh};

/// Builds them with the kernel programs that were built last, and says where they are.
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
