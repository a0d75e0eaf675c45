//! Pages of the programs, and the limits that they show.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, bail, ensure};

use super::{KEPT, LOST_TUNNEL, MS, SECOND, World};
use crate::interpose::kernel;
use crate::topology;

impl World {
    /// Fetches a page of a program at `address` of `host`.
    ///
    /// # Errors
    /// No page comes within a second.
    pub fn fetch(&mut self, host: usize, address: SocketAddrV4, path: &str) -> Result<String> {
        let fd = kernel(|kernel| {
            kernel.enter(host);
            let fd = kernel.tcp_socket();
            let _ = kernel.connect(fd, address);
            fd
        });
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let (mut left, mut page) = (request.as_bytes(), Vec::new());
        for _ in 0..1000 {
            if let Ok(sent) = kernel(|kernel| kernel.send(fd, left)) {
                left = &left[sent..];
            }
            match kernel(|kernel| kernel.recv(fd, 1 << 16)) {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => page.extend(bytes),
                Err(libc::EAGAIN) => self.run_until(self.now() + MS)?,
                Err(error) => bail!("{address}{path} at host {host}: errno {error}"),
            }
        }
        let _ = kernel(|kernel| kernel.close(fd));
        Ok(String::from_utf8_lossy(&page).into_owned())
    }

    /// Checks that programs without connections hold nothing for them.
    ///
    /// # Errors
    /// A limit of which something is used.
    pub fn check_limits(&mut self) -> Result<()> {
        let mut pages = Vec::new();
        for program in &self.servers {
            pages.push((program.name.clone(), program.host, topology::SERVER_ADMIN));
        }
        for program in &self.agents {
            for run in &program.runs {
                let address = topology::agent_admin(run.number);
                pages.push((program.name.clone(), program.host, address));
            }
        }
        for (at, (name, host, address)) in pages.into_iter().enumerate() {
            let page = self.fetch(host, address, "/metrics")?;
            let is_server = at < self.servers.len();
            ensure!(used(&page, "connections")? == 0, "{name}: {page}");
            let held = used(&page, "stalled_bytes")?;
            ensure!(held <= KEPT, "{name} holds {held} bytes for nothing");
            if is_server {
                ensure!(used(&page, "dials")? == 0, "{name}: {page}");
                let tunnels = used(&page, "agents")?;
                self.check_tunnels(&name, (host, address), tunnels)?;
            }
        }
        Ok(())
    }

    /// Checks that a server with `tunnels` tunnels has those of all agents, and loses what is beyond them.
    fn check_tunnels(
        &mut self,
        name: &str,
        (host, address): (usize, SocketAddrV4),
        mut tunnels: u64,
    ) -> Result<()> {
        let wanted = self.topology.tunnels() as u64;
        let deadline = self.now() + LOST_TUNNEL;
        while tunnels > wanted && self.now() < deadline {
            self.run_until(self.now() + SECOND)?;
            tunnels = used(&self.fetch(host, address, "/metrics")?, "agents")?;
        }
        ensure!(
            tunnels == wanted,
            "{name} has {tunnels} tunnels, not {wanted}"
        );
        Ok(())
    }
}

/// Reads the use of a limit from a page of metrics.
fn used(page: &str, limit: &str) -> Result<u64> {
    let name = format!("limit_used{{limit=\"{limit}\"}} ");
    let (_, value) = page
        .split_once(&name)
        .with_context(|| format!("no {name}in {page}"))?;
    Ok(value.lines().next().unwrap_or_default().parse()?)
}
