//! The target of the benchmarks: see [`tunnel_tests::bench::target`].

use anyhow::Result;

fn main() -> Result<()> {
    tunnel_tests::lab::usage::allow_many_files()?;
    tunnel_tests::bench::target::serve()?;
    Ok(())
}
