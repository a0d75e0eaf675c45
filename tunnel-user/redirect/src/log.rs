//! The log of the kernel programs.

use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Hook, RedirectError,
    link::Link,
    pin::{Pin, failed},
};

/// Opens the log; the returned future forwards it without end. See [`super::Redirect::forward_log`].
pub(super) fn forward(
    pin: &Pin,
    name: &str,
) -> Result<impl Future<Output = Result<(), RedirectError>> + Send + use<>, RedirectError> {
    let path = pin.link(name, Hook::Connect4);
    let link = Link::open(&path).map_err(|error| failed(&path, error))?;
    let link = link.ok_or_else(|| RedirectError::NotAttached(name.to_owned()))?;
    let program = link.info().map_err(|error| failed(&path, error))?.program;

    // All programs write into one pinned ring, so that this one's is everybody's, and stays so
    // when the programs are replaced.
    let logger =
        EbpfLogger::init_from_id(program).map_err(|error| RedirectError::Log(Box::new(error)))?;
    Ok(async move {
        let io = |error: std::io::Error| RedirectError::Log(Box::new(error));
        // SAFETY: the logger owns its ring, whose descriptor stays the same and open until both go.
        let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .map_err(|error| io(error.into_parts().1))?;
        loop {
            let mut ready = logger.readable_mut().await.map_err(io)?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })
}
