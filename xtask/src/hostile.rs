//! `cargo xtask lab hostile`: hostile programs beside a pair that must not notice them, and
//! docs/hostile-peers.md with the effects on the pair.

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

The effects of hostile peers on a well-behaved pair: one server with every kind of port, and worker 1 with its agent. An
attacker has the certificate of worker 2. Each misdeed is a separate program (`tests/hostile`), in a network namespace of the
laboratory, with bounds on count and time. Beside it four clients send requests to worker 1 without a pause, two through the
redirect and two through HTTP CONNECT, with a connection for each request. One long stream through the redirect goes there
and back, 16 KiB at a time. The test checks every answer and every byte, and that each request ran once.

```sh
sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask lab hostile     # writes this page; --json prints it instead
cargo xtask test hostile_programs                              # the same, as a test
```

The run fails in four cases: a request of the pair fails or the long stream loses a byte; a misdeed gains something (another
agent's route, a connection to a forbidden destination, an agent that accepts a foreign server); log and audit do not name the
misdeed; the memory of the server grows by more than 256 MiB. The speed of the pair is recorded, without a threshold: all
programs share the processors of the machine, and a misdeed takes its part of them. Compare with the first row.

";

/// Options of `cargo xtask lab hostile`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the rows as JSON, and write no page.
    #[arg(long)]
    json: bool,
}

/// Builds the programs, runs them, and prints or writes the result.
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
    text.push_str("\n## Counts of each misdeed\n\nThe program itself counts.\n\n");
    for row in rows.iter().filter(|row| !row.came_to.is_empty()) {
        writeln!(text, "* {}. {}", row.title, row.sentence())?;
    }
    let page = workspace::root().join("docs/hostile-peers.md");
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
    Ok(page)
}
