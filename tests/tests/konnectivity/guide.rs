//! The files of the migration guide, word for word: a test that runs them fails when the guide no
//! longer works.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const GUIDE: &str = include_str!("../../../docs/migrate-from-konnectivity.md");

/// Folders of the guide for configuration, certificates, and a server's state.
const CONFIGURATION: &str = "/etc/cpc";
const STATE: &str = "/var/lib/cpc";

/// Writes the guide's configuration for `role` (`server` or `agent`) into `folder`, which has the
/// certificates. Gives the flags that the guide gives with it, as they are for `folder`.
pub(crate) fn configuration(role: &str, folder: &Path) -> Result<Vec<String>> {
    let start = format!("```yaml\n# {role}: ");
    let (_, block) = GUIDE
        .split_once(&start)
        .with_context(|| format!("the guide has no configuration of a {role}"))?;
    let (block, _) = block.split_once("```").context("a block has no end")?;
    let (flags, yaml) = block.split_once('\n').context("a block is empty")?;
    let here = folder.to_str().context("the folder's name is not UTF-8")?;
    // Nothing of a test belongs to the host's own folders.
    let state = format!("{here}/state-of-the-guide");
    let yaml = yaml.replace(STATE, &state);
    ensure!(
        role != "server" || yaml.contains(&state),
        "no {STATE} in:\n{yaml}"
    );
    let flags: Vec<_> = flags
        .split_whitespace()
        .map(|flag| flag.replace(CONFIGURATION, here))
        .collect();
    let file = flags
        .iter()
        .find_map(|flag| flag.strip_prefix("--cpc-config="))
        .context("no --cpc-config")?;
    let file = Path::new(file);
    ensure!(file.starts_with(folder), "{file:?} is not in {folder:?}");
    fs::write(file, yaml)?;
    Ok(flags)
}
