//! The answer of an agent to a dial request, ahead of the data on a receiving half.

use tunnel_proto::preface::DialResponse;

use cpc_datapath::stream::RecvHalf;
use cpc_transport::tunnel::HeadError;

/// Answer of an agent, or the end of the stream before it.
pub type Answer = Result<DialResponse, HeadError>;

/// A receiving half on which the agent's answer comes first.
pub trait Answered: RecvHalf {
    /// Waits for the answer. Later data can then be received. Cancelling may lose the answer: give up the
    /// dial then.
    ///
    /// # Errors
    /// [`HeadError`].
    fn answer(&mut self) -> impl Future<Output = Answer>;
}
