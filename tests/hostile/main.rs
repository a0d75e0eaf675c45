//! Programs that mean harm, one a misdeed, for the laboratory.
//!
//! ```text
//! lab-hostile MISDEED SERVER [FOLDER]
//! ```
//!
//! It acts from the namespace that it is started in, on `SERVER`, with the certificate
//! `FOLDER/agent.crt` where the misdeed takes one. Each is bounded in count and in time ([`WHILE`]),
//! whatever the server does, and ends with a JSON object that says how much of what it did, and how
//! it was answered. What it must not have managed is for [`tunnel_tests::hostile`] to say.

mod agent;
mod frontend;
mod http2;
mod impostor;
mod leaky;
mod loris;
mod peer;
mod replay;
mod storm;
mod tally;
mod withholds;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, bail};
use tally::Tally;
use tokio::runtime::Builder;
use tokio::task::LocalSet;

use crate::peer::Credentials;

/// Maximum duration of a misdeed.
const WHILE: Duration = Duration::from_secs(4);
/// Duration of a misdeed that must outlast the server's own timeouts.
const LONG: Duration = Duration::from_secs(18);
/// Time for the end of a connection.
const FAREWELL: Duration = Duration::from_millis(100);
/// Time after which the program ends in any case.
const END: Duration = Duration::from_secs(30);

/// Target of a misdeed, with its credentials.
pub(crate) struct Aim {
    pub(crate) server: SocketAddr,
    /// Rest of the command line: the folder of a certificate, or sockets.
    pub(crate) rest: Vec<PathBuf>,
    pub(crate) tally: Tally,
}

impl Aim {
    /// Returns the stolen certificate.
    pub(crate) fn credentials(&self) -> Result<Credentials> {
        let folder = self.rest.first().context("which certificate?")?;
        Credentials::read(folder, "agent")
    }
}

fn main() -> Result<()> {
    thread::spawn(|| {
        thread::sleep(END);
        eprintln!("still not at an end");
        std::process::exit(2);
    });
    tunnel_tests::lab::usage::allow_many_files()?;
    let mut arguments = env::args().skip(1);
    let (Some(misdeed), Some(server)) = (arguments.next(), arguments.next()) else {
        bail!("arguments: MISDEED SERVER [FOLDER]");
    };
    let aim = Aim {
        server: server.parse().context(server)?,
        rest: arguments.map(PathBuf::from).collect(),
        tally: Tally::default(),
    };
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let work = async {
        match misdeed.as_str() {
            "claims" => agent::claims(&aim).await,
            "garbage" => agent::garbage(&aim).await,
            "deaf" => agent::deaf(&aim).await,
            "opens" => agent::opens(&aim).await,
            "pours" => agent::pours(&aim).await,
            "withholds" => withholds::withholds(&aim).await,
            "drains" => agent::drains(&aim).await,
            "replay" => replay::replay(&aim).await,
            "storm" => storm::storm(&aim, Some(&aim.credentials()?)).await,
            "strangers" => storm::storm(&aim, None).await,
            "half-handshakes" => storm::half(&aim).await,
            "impostor" => impostor::impostor(&aim).await,
            "frontend" => frontend::frontend(&aim),
            "slow-loris" => loris::slow_loris(&aim),
            "http2" => http2::floods(&aim),
            other => bail!("no misdeed is called {other}"),
        }
    };
    runtime.block_on(LocalSet::new().run_until(async {
        work.await?;
        // What was closed says so before the process ends.
        tokio::time::sleep(FAREWELL).await;
        anyhow::Ok(())
    }))?;
    println!("{}", aim.tally.json()?);
    // Whatever is still open ends with the process.
    std::process::exit(0)
}
