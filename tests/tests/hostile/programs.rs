//! Hostile programs, one after the other, beside a pair that must not notice.

use anyhow::Result;
use tunnel_tests::lab::{self, Programs};

/// None gains anything, each is named where an administrator looks, the server's memory is bounded,
/// and the pair loses nothing. What the pair noticed is printed.
#[test]
fn hostile_programs_gain_nothing_and_harm_nobody() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let programs = Programs::of_this_test()?;
    let hostile = programs.cpc.with_file_name("examples/lab-hostile");
    let rows = tunnel_tests::hostile::run(programs, &hostile)?;
    println!("{}", tunnel_tests::hostile::table(&rows));
    for row in &rows[1..] {
        println!("{}: {}", row.title, row.sentence());
    }
    Ok(())
}
