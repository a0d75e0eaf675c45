//! `cpc pki`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Subcommand;
use rustls::pki_types::CertificateDer;

use cpc_identity::issue::{Authority, Request, serial_of};
use cpc_identity::join::issue_records::Holder;
use cpc_identity::join::{IssueLog, IssueLogError};
use cpc_identity::validity::validity;
use cpc_identity::{KeyHash, Role, TrustDomain, pem};

const DAY: Duration = Duration::from_secs(86_400);

/// Create a cluster CA and issue certificates
///
/// An identity is the one URI in a certificate: spiffe://TRUST-DOMAIN/server|agent|client/NAME.
/// The command creates keys with mode 0600 and overwrites no file. The file issued.json
/// beside the CA lists the certificates of agents: servers that issue from the CA (`join`) read it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a CA: ca.crt and ca.key
    Init {
        /// Directory for the CA
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Trust domain that the CA vouches for, which is also the tenant
        #[arg(long, value_name = "NAME", default_value = "cluster.local")]
        trust_domain: TrustDomain,
        #[command(flatten)]
        validity: Validity,
    },
    /// Issue a server's certificate: server.crt and server.key
    Server {
        /// The server's id
        #[arg(long)]
        id: String,
        /// A DNS name that TLS clients of a frontend check; may be repeated
        #[arg(long)]
        dns: Vec<String>,
        /// An address that TLS clients of a frontend check; may be repeated
        #[arg(long)]
        ip: Vec<IpAddr>,
        #[command(flatten)]
        common: Common,
    },
    /// Issue an agent's certificate: agent.crt and agent.key
    Agent {
        /// The node's name
        #[arg(long)]
        node: String,
        /// An address of the node, which the agent may serve; may be repeated
        #[arg(long)]
        ip: Vec<IpAddr>,
        #[command(flatten)]
        common: Common,
    },
    /// Issue a certificate for HTTP CONNECT over TCP: client.crt and client.key
    Client {
        /// The program's name, such as kube-apiserver
        #[arg(long)]
        name: String,
        #[command(flatten)]
        common: Common,
    },
    /// Sign another CA of the same trust domain, so that agents accept it from their servers
    ///
    /// Writes one file for `tls.ca`: the certificates of both CAs, and the other one's signed by this
    /// one. See docs/joining.md, "Another CA".
    CrossSign {
        /// Directory of the CA that agents trust now
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Certificate of the next CA
        #[arg(long, value_name = "FILE")]
        ca: PathBuf,
        /// File for the certificates
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Directory of the CA
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Directory for certificate, key and a copy of ca.crt
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    validity: Validity,
}

#[derive(Debug, clap::Args)]
struct Validity {
    /// Validity in days, up to 100 years
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_525))]
    days: u32,
    /// End of the validity, such as 2027-01-01T00:00:00Z
    #[arg(long, value_name = "TIME", conflicts_with = "days", value_parser = humantime::parse_rfc3339)]
    not_after: Option<SystemTime>,
}

impl Validity {
    fn end(&self) -> SystemTime {
        let days = self.days * DAY;
        self.not_after.unwrap_or_else(|| SystemTime::now() + days)
    }
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (common, role, name, dns, addresses) = match self.command {
            Command::Init {
                dir,
                trust_domain,
                validity,
            } => {
                Authority::create(&dir, &trust_domain, validity.end())?;
                println!("CA of {trust_domain} in {}", dir.display());
                return Ok(());
            }
            Command::CrossSign { dir, ca, out } => {
                let authority = Authority::open(&dir)?;
                let signed = authority.cross_sign_into(&ca, &out)?;
                println!("{} vouches for {signed}: {}", dir.display(), out.display());
                return Ok(());
            }
            Command::Server {
                id,
                dns,
                ip,
                common,
            } => (common, Role::Server, id, dns, ip),
            Command::Agent { node, ip, common } => (common, Role::Agent, node, Vec::new(), ip),
            Command::Client { name, common } => {
                (common, Role::Client, name, Vec::new(), Vec::new())
            }
        };
        let not_after = common.validity.end();
        let request = Request {
            role,
            name,
            dns,
            addresses,
            not_after,
        };
        let authority = Authority::open(&common.dir)?;
        if let Some(text) = pem::exposure(&common.dir.join("ca.key")) {
            eprintln!("warning: {text}");
        }
        // A CA and what it issues on the same day end within moments of each other.
        if not_after > authority.not_after() + DAY {
            let end = humantime::format_rfc3339_seconds(authority.not_after());
            eprintln!("warning: its CA ends at {end}, and the certificate with it");
        }
        let credential = authority.make(&request)?;
        let output = credential.output_directory(&common.out)?;
        if role == Role::Agent {
            // Before the certificate is used: a server that issues from this CA has to know it.
            record(&common.dir, &request, credential.certificate())?;
        }
        credential.save(&output)?;
        println!("{} in {}", credential.identity, common.out.display());
        Ok(())
    }
}

/// Records the holder of a name and addresses, for servers that issue from the same CA.
fn record(
    ca: &std::path::Path,
    request: &Request,
    certificate: &CertificateDer<'_>,
) -> anyhow::Result<()> {
    let holder = Holder {
        addresses: request.addresses.iter().map(IpAddr::to_canonical).collect(),
        key: KeyHash::of(certificate)?.to_string(),
        serial: serial_of(certificate),
        since: SystemTime::now(),
        until: validity(certificate).map_or(request.not_after, |(_, until)| until),
        token: "pki".into(),
    };
    IssueLog::of_ca(ca).change(|records| {
        records.record(&request.name, holder);
        Ok::<_, IssueLogError>(())
    })?;
    Ok(())
}
