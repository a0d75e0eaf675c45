//! `cpc completions` and `cpc man`.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::Context;
use clap::CommandFactory;

use cpc_host::directory::Directory;

/// Write completions for a shell to standard output
///
/// For bash: cpc completions bash > /etc/bash_completion.d/cpc
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

impl CompletionsArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "cpc", &mut script);
        io::Write::write_all(&mut io::stdout(), &script)?;
        Ok(())
    }
}

/// Write a manual page for each subcommand into a directory
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Directory for the pages, such as /usr/local/share/man/man1
    dir: PathBuf,
}

impl ManArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let pages = tempfile::tempdir()?;
        clap_mangen::generate_to(super::Cli::command(), pages.path())?;
        put(pages.path(), &self.dir).with_context(|| self.dir.display().to_string())
    }
}

/// Writes a file. Root may write into a directory of another owner, whose links it does not follow.
fn put(pages: &Path, directory: &Path) -> io::Result<()> {
    let directory = Directory::create(directory, 0o755)?;
    for page in fs::read_dir(pages)? {
        let page = page?;
        if let Some(name) = page.file_name().to_str() {
            directory.replace(name, &fs::read(page.path())?, 0o644)?;
        }
    }
    Ok(())
}
