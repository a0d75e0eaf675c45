//! What is served, for the kernel to serve or refuse.

use ipnet::IpNet;
use tunnel_ebpf_common::Verdict;

use super::{
    RedirectError,
    maps::{self, failed},
    pin::Pin,
    prefix::{self, Key, Table},
};

/// The routes of all tenants. They turn captured destinations between *serve* and *refuse* and
/// capture nothing by themselves. They survive this process.
#[derive(Debug)]
pub struct Routes {
    trie: maps::RouteTrie,
    /// What the trie holds; unknown at first and after an error.
    installed: Option<Table<u32>>,
}

impl Routes {
    pub(super) fn open(pin: &Pin) -> Result<Self, RedirectError> {
        Ok(Self {
            trie: maps::routes(pin)?,
            installed: None,
        })
    }

    /// Replaces all routes, of every tenant; the longest prefix decides. What does not change is
    /// not touched, and each address goes from its old verdict to its new one without a gap. Of
    /// two verdicts for one prefix the last counts.
    ///
    /// # Errors
    ///
    /// When the kernel's table is full: old and new routes have to fit, 65,536 together.
    pub fn replace(&mut self, routes: &[(u32, IpNet, Verdict)]) -> Result<(), RedirectError> {
        let new: Table<u32> = routes
            .iter()
            .map(|(tenant, cidr, verdict)| (Key::new(*tenant, *cidr), *verdict as u32))
            .collect();
        let old = match self.installed.take() {
            Some(installed) => installed,
            None => prefix::read(&self.trie, None).map_err(failed("ROUTES"))?,
        };
        prefix::apply(&mut self.trie, &prefix::plan(&old, &new)).map_err(failed("ROUTES"))?;
        self.installed = Some(new);
        Ok(())
    }
}
