//! Permits for what is under way on a link.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::limits::Limit;
use crate::routes::LinkInfo;
use cpc_config::server::LimitsConfig;

/// Counts a stream on its link until it is dropped. Dereferences to the link.
#[derive(Debug)]
pub(crate) struct StreamPermit(Arc<LinkInfo>);

impl StreamPermit {
    /// Counts a stream that continues a connection: the connection was admitted before.
    pub(crate) fn new(link: &Arc<LinkInfo>) -> Self {
        link.streams.fetch_add(1, Ordering::Relaxed);
        Self(link.clone())
    }
}

/// Counts a dial without an answer on its link until it is dropped.
pub(super) struct AnswerPermit(Arc<LinkInfo>);

/// Counts a stream on `link`, and that its agent has not answered the dial.
///
/// # Errors
/// The limit that the link has reached.
pub(super) fn acquire(
    link: &Arc<LinkInfo>,
    limits: &LimitsConfig,
) -> Result<(StreamPermit, AnswerPermit), Limit> {
    let is_over = |count: i64, most| usize::try_from(count).is_ok_and(|count| count >= most);
    // A permit that is not returned takes its count back.
    let streams = link.streams.fetch_add(1, Ordering::Relaxed);
    let stream = StreamPermit(link.clone());
    let dials = link.unanswered.fetch_add(1, Ordering::Relaxed);
    let answer = AnswerPermit(link.clone());
    if is_over(streams, limits.connections_per_tunnel) {
        Err(Limit::ConnectionsPerTunnel)
    } else if is_over(dials, limits.dials_per_tunnel) {
        Err(Limit::DialsPerTunnel)
    } else {
        Ok((stream, answer))
    }
}

impl Deref for StreamPermit {
    type Target = LinkInfo;

    fn deref(&self) -> &LinkInfo {
        &self.0
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for AnswerPermit {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}
