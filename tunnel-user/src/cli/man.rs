//! `cpc completions` and `cpc man`.

use std::io;
use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

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
    /// Where they are put, such as /usr/local/share/man/man1
    dir: PathBuf,
}

impl ManArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| clap_mangen::generate_to(super::Cli::command(), &self.dir))
            .with_context(|| self.dir.display().to_string())
    }
}
