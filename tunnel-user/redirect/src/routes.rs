//! Routes for the kernel, with the verdict to serve or to refuse.

use ipnet::IpNet;
use tunnel_ebpf_common::{MAX_ROUTES, Verdict};

use super::{
    RedirectError,
    maps::{self, failed},
    pin::Pin,
    prefix::{self, Key, Table},
};

/// Routes of all tenants. They switch captured destinations between *serve* and *refuse* and capture
/// nothing by themselves. They survive this process.
#[derive(Debug)]
pub struct Routes {
    trie: maps::RouteTrie,
    /// Content of the trie; unknown at first and after an error.
    installed: Option<Table<u32>>,
}

impl Routes {
    pub(super) fn open(pin: &Pin) -> Result<Self, RedirectError> {
        Ok(Self {
            trie: maps::routes(pin)?,
            installed: None,
        })
    }

    /// Replaces all routes, of every tenant; the longest prefix decides. Unchanged entries are not
    /// touched, and each address goes from its old verdict to its new one without a gap. Of two
    /// verdicts for one prefix the last counts. With `keeps_served` old routes that serve stay as they are.
    ///
    /// Where old and new routes do not fit into the kernel's table together, the old ones go first: an
    /// address that changes is then without a route for a moment, and refused.
    ///
    /// # Errors
    /// [`RedirectError::RoutesFull`] when the new ones alone do not fit: as many as fit are in force,
    /// and no others.
    pub fn replace(
        &mut self,
        routes: &[(u32, IpNet, Verdict)],
        keeps_served: bool,
    ) -> Result<(), RedirectError> {
        let mut new: Table<u32> = routes
            .iter()
            .map(|(tenant, cidr, verdict)| (Key::new(*tenant, *cidr), *verdict as u32))
            .collect();
        let old = match self.installed.take() {
            Some(installed) => installed,
            None => prefix::read(&self.trie, None).map_err(failed("ROUTES"))?,
        };
        if keeps_served {
            let served = old
                .iter()
                .filter(|(_, verdict)| **verdict == Verdict::Serve as u32);
            new.extend(served.map(|(key, verdict)| (*key, *verdict)));
        }
        let steps = prefix::plan_within(&old, &new, MAX_ROUTES as usize);
        let missing = prefix::apply_most(&mut self.trie, &steps).map_err(failed("ROUTES"))?;
        if missing > 0 {
            return Err(RedirectError::RoutesFull { missing });
        }
        self.installed = Some(new);
        Ok(())
    }
}
