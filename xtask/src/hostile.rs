//! `cargo xtask lab hostile`: hostile programs beside a pair that must not notice, and
//! docs/hostile-peers.md, which says what the pair noticed.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use tunnel_tests::hostile::{Row, run, table};

use crate::bench::machine::Machine;
use crate::setup::{self, Purpose};
use crate::workspace::{self, AS_ROOT, PROFILE};
use crate::{ebpf, programs, sh};

const HEAD: &str = "# Hostile peers

What a well-behaved pair notices of others that mean harm. One server with every port that there is, worker 1 with its
agent; worker 2's certificate is in the wrong hands. Each misdeed is a program of its own (`tests/hostile`), in a network
namespace of the laboratory, bounded in count and in time. Beside it four clients ask worker 1 without a pause, two through
the redirect and two through HTTP CONNECT, a connection for each request; and one long stream through the redirect goes
there and back, 16 KiB at a time. Every answer and every byte is checked, and that each request ran once.

```sh
sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask lab hostile     # writes this page; --json prints it instead
cargo xtask test hostile_programs                              # the same, as a test
```

The run fails when a request of the pair fails, a byte of the long stream is lost, a misdeed gains anything (a route that is
not its own, a connection to what must not be dialled, an agent that believes a foreign server), log and audit do not name
it, or the server's memory grows by over 256 MiB. How fast the pair was is told, not judged: all of them share the machine's
processors, and a misdeed takes what it can get of them. Compare with the first row.

";

/// Options of `cargo xtask lab hostile`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the rows as JSON, and write no page.
    #[arg(long)]
    json: bool,
}

/// Builds, does, and tells.
pub(crate) fn hostile(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the laboratory needs root: run `{AS_ROOT} lab hostile`");
    }
    setup::ensure(Purpose::Test)?;
    ebpf::build()?;
    let programs = programs::build()?;
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--profile", PROFILE, "--package", "tunnel-tests"]);
    sh::run(cargo.args(["--example", "lab-hostile"]))?;
    sh::heading("Hostile peers");
    let machine = Machine::look(false);
    let program = programs.cpc.with_file_name("examples/lab-hostile");
    let rows = run(programs, &program)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!("{}", table(&rows));
    let page = write(&rows, &machine)?;
    eprintln!("    written to {}", page.display());
    Ok(())
}

fn write(rows: &[Row], machine: &Machine) -> Result<PathBuf> {
    let mut text = format!("{HEAD}{}\n\n{}", machine.sentence(), table(rows));
    text.push_str("\n## What each came to\n\nAs the program itself counted.\n\n");
    for row in rows.iter().filter(|row| !row.came_to.is_empty()) {
        writeln!(text, "* {}. {}", row.title, row.sentence())?;
    }
    let page = workspace::root().join("docs/hostile-peers.md");
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    Ok(page)
}
