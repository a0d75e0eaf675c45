//! The connector as it is installed: with keepers, and a NAT router between server and agent.

use anyhow::Result;

use super::{Running, Start};
use crate::bench::load::Dial;
use crate::bench::scene::local;
use crate::keeper::{self, Keeper};
use crate::lab::{Lab, Programs};

/// Number of workers: one agent holds fewer connections than a server.
const WORKERS: u8 = 2;

/// A laboratory and the keepers of its server and agent.
#[derive(Debug)]
pub struct Installed {
    /// Keepers; they end before the laboratory.
    _keepers: [Keeper; 2],
    /// The laboratory.
    pub lab: Lab,
}

pub(super) fn start(place: &Start<'_>) -> Result<Running> {
    let programs = Programs {
        cpc: place.programs.cpc.clone(),
        target: place.programs.target.with_file_name("lab-target"),
    };
    let (lab, keepers) = keeper::lab(programs, WORKERS)?;
    let mut running = Running::new(Dial::Tcp(local(0)));
    // Its clients are those of the laboratory.
    running.dials.clear();
    running.installed = Some(Installed {
        _keepers: keepers,
        lab,
    });
    Ok(running)
}
