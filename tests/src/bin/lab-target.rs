//! The plain servers on a worker of the laboratory: see [`tunnel_tests::target`].
//!
//! `lab-target [ADDRESS]`

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let address = std::env::args().nth(1).map(|text| text.parse()).transpose();
    // A thousand connections should not end at the soft limit.
    tunnel_tests::lab::usage::allow_many_files()?;
    tunnel_tests::target::serve_all(address.context("the argument is no IP address")?)?;
    Ok(())
}
