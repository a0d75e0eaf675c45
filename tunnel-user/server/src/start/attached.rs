//! The second stage: the redirect is in place, and the capabilities for it are gone.

use std::pin::Pin;

use cpc_datapath::Engines;
use cpc_host::privileges::finish;
use cpc_observe::metrics::ours;
use cpc_redirect::Redirect;

use super::prepared::Prepared;
use crate::attachments::{self, Accepting, Attachments, kernel_routes};
use crate::control::Publish;
use crate::error::ServerError;
use crate::privileges::kept;

/// A server whose captures are in force. Its sockets queue connections until it serves.
pub(crate) struct Attached {
    pub(super) prepared: Prepared,
    pub(super) attachments: Attachments,
    /// Listeners of the attachments.
    pub(super) accepting: Vec<Accepting>,
    pub(super) engines: Engines,
    /// Writes routes to the kernel.
    pub(super) publish: Publish,
    /// Passes on what the kernel programs log.
    pub(super) kernel_log: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Attached {
    /// Puts the redirect in place, and gives back the capabilities that only this stage needs.
    ///
    /// # Errors
    /// [`ServerError`] naming the attachment, or the capability that can't be given back.
    pub(crate) fn new(mut prepared: Prepared) -> Result<Self, ServerError> {
        let config = &prepared.config;
        let own = &prepared.identity.trust_domain;
        let inherited = &mut prepared.inherited;
        let (mut attachments, accepting) = Attachments::attach(&config.redirect, own, inherited)?;
        inherited.report_leftovers();
        let engines = Engines::choose(config.datapath.engine, config.shards);
        engines.register(ours(&mut prepared.registry));
        let publish: Publish = if config.redirect.attachments.is_empty() {
            Box::new(|_| {})
        } else {
            kernel_routes(Redirect::new(&config.redirect.pin).routes()?)
        };
        let kernel_log = attachments::kernel_log(&config.redirect);
        // What starts from here, threads among it, has what is left.
        let (keeps, why) = kept(config, attachments.ours());
        finish(keeps, why)?;
        attachments.follow()?;
        Ok(Self {
            prepared,
            attachments,
            accepting,
            engines,
            publish,
            kernel_log: Box::pin(kernel_log),
        })
    }
}
