//! Counts what is under way on a link.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::limits::Limit;
use crate::routes::LinkInfo;
use cpc_config::server::LimitsConfig;

/// Counts a stream on its link until it is dropped.
#[derive(Debug)]
pub(crate) struct OnLink(Arc<LinkInfo>);

impl OnLink {
    /// Counts one, and that its agent has not answered yet.
    ///
    /// # Errors
    /// The bound that lets no more on this link.
    pub(super) fn new(
        link: &Arc<LinkInfo>,
        limits: &LimitsConfig,
    ) -> Result<(Self, Unanswered), Limit> {
        let is_over = |count: i64, most| usize::try_from(count).is_ok_and(|count| count >= most);
        // Dropped, they count no more.
        let streams = link.streams.fetch_add(1, Ordering::Relaxed);
        let on_link = Self(link.clone());
        let dials = link.unanswered.fetch_add(1, Ordering::Relaxed);
        let unanswered = Unanswered(link.clone());
        if is_over(streams, limits.connections_per_tunnel) {
            Err(Limit::ConnectionsPerTunnel)
        } else if is_over(dials, limits.dials_per_tunnel) {
            Err(Limit::DialsPerTunnel)
        } else {
            Ok((on_link, unanswered))
        }
    }
}

/// A dial that counts on its link until it is dropped.
pub(super) struct Unanswered(Arc<LinkInfo>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::ops::Deref for OnLink {
    type Target = LinkInfo;

    fn deref(&self) -> &LinkInfo {
        &self.0
    }
}

impl Drop for OnLink {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
