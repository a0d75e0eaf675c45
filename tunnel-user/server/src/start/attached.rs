//! The second stage: the redirect is in place, and the capabilities for it are gone.

use std::pin::Pin;

use cpc_config::server::RedirectConfig;
use cpc_datapath::Engines;
use cpc_datapath::shard::Shards;
use cpc_host::privileges::finish;
use cpc_observe::metrics::ours;
use cpc_redirect::Redirect;

use super::prepared::Prepared;
use crate::attachments::{self, Accepting, Attachments, kernel_routes};
use crate::control::Publish;
use crate::embedding::Capture;
use crate::error::ServerError;
use crate::privileges::kept;

/// A server whose captures are in force. Its sockets queue connections until it serves.
pub(crate) struct Attached {
    pub(super) prepared: Prepared,
    pub(super) attachments: Attachments,
    /// Listeners of the attachments.
    pub(super) accepting: Vec<Accepting>,
    /// Shards, none of which is started.
    pub(super) shards: Shards,
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
            Box::new(|_, _| {})
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
            shards: Shards::new(engines),
            publish,
            kernel_log: Box::pin(kernel_log),
        })
    }

    /// Attaches nothing: a program that embeds the server leads the connections of `captures` to it, and
    /// all shards run on the current thread.
    ///
    /// # Errors
    /// [`ServerError`] naming the attachment whose listener can't be opened.
    pub(crate) fn embedded(
        mut prepared: Prepared,
        captures: Vec<Capture>,
    ) -> Result<Self, ServerError> {
        let own = &prepared.identity.trust_domain;
        let inherited = &mut prepared.inherited;
        let nothing = RedirectConfig::default();
        let (attachments, _) = Attachments::attach(&nothing, own, inherited)?;
        let accepting = captures.into_iter().map(|capture| {
            let Capture {
                attachment,
                origins,
            } = capture;
            Accepting::embedded(&attachment, own, origins)
        });
        let accepting = accepting.collect::<Result<_, _>>()?;
        Ok(Self {
            prepared,
            attachments,
            accepting,
            shards: Shards::on_this_thread(),
            publish: Box::new(|_, _| {}),
            kernel_log: Box::pin(std::future::pending()),
        })
    }
}
