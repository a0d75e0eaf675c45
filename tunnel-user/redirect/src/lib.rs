//! The redirect: sockets of a cgroup that connect to a captured address come to our listener.
//!
//! The only module that names aya. It loads the kernel programs, pins their maps and links under
//! one directory of a BPF file system, and writes captures, routes and heartbeats.
//!
//! ```text
//! PIN/maps-v2/NAME           maps, shared by all attachments; the number is the schema
//! PIN/links/ATTACHMENT/HOOK  what holds the programs in their cgroup
//! PIN/links/ATTACHMENT/cgroup  the number of that cgroup
//! ```
//!
//! Earlier versions pinned more, which goes when an attachment is attached again or detached (`retired`).
//!
//! Invariants:
//! * What is pinned outlives this process: while the connector is away, captured connections are
//!   refused (or pass, where the attachment fails open); none slips through meanwhile.
//! * The capture set comes from configuration alone. Routes never widen it.
//! * Every change of captures, routes or programs shows each connect(2) the old state or the new
//!   one, never a mixture and never a gap.
//! * One connector at a time owns a pin directory; the command line may look and change beside
//!   it (changes are serialised by a lock on the directory).
//!
//! Accepting connections, and what a missing origin means for them, is the frontend's business.

mod addresses;
mod attachment;
mod capture;
mod counters;
mod error;
mod flows;
mod follow;
mod heartbeat;
mod hook;
mod link;
mod listener;
mod log;
mod maps;
mod netns;
mod object;
mod pin;
mod prefix;
mod program;
mod retired;
mod routes;
mod settings;
mod spec;
mod status;
mod survey;

pub use addresses::AddressWatch;
pub use attachment::{Attachment, Linked};
pub use counters::{Count, Counters};
pub use error::RedirectError;
pub use flows::{Flows, MAX_WAIT, Origin};
pub use follow::{Follower, Presence};
pub use heartbeat::Heartbeat;
pub use hook::Hook;
pub use listener::listen;
pub use netns::{cookie, within};
pub use object::object;
pub use program::Refusal;
pub use routes::Routes;
pub use settings::CAPTURE_SET;
pub use spec::{AttachmentSpec, FailMode, Rule, check_name, tenant_number};
pub use status::{LinkState, Status};
pub use survey::FoundAttachment;
pub use tunnel_ebpf_common::{Counter, HEARTBEAT_STALE_NS, Verdict};

use std::path::PathBuf;

use nix::unistd::Gid;
use pin::Pin;

use cpc_host::kernel;

/// A pin directory and everything below it.
#[derive(Clone, Debug)]
pub struct Redirect {
    pin: Pin,
    refusal: Option<Refusal>,
}

impl Redirect {
    /// Names the pin directory, without touching it.
    ///
    /// The directory, or its nearest existing ancestor, must be on a BPF file system.
    pub fn new(pin: impl Into<PathBuf>) -> Self {
        Self {
            pin: Pin::new(pin.into()),
            refusal: None,
        }
    }

    /// Sets the kind of refusal, instead of the best one that the kernel has.
    #[must_use]
    pub fn refusing_by(mut self, refusal: Refusal) -> Self {
        self.refusal = Some(refusal);
        self
    }

    /// Lets the members of a group do the work of a server that did not attach: read the settings,
    /// write heartbeats and routes, take flows. In force for an attachment with [`Self::prepare`].
    ///
    /// Members can neither change the capture set nor detach the programs.
    #[must_use]
    pub fn shared_with(mut self, group: Option<Gid>) -> Self {
        self.pin = self.pin.shared_with(group);
        self
    }

    /// Compares the attached settings with `spec`, for a process that may not attach. Returns the
    /// harmless differences, for people.
    ///
    /// # Errors
    /// The attachment does not exist, or differs so that it would not work.
    pub fn compare(&self, spec: &AttachmentSpec) -> Result<Vec<&'static str>, RedirectError> {
        spec.check()?;
        settings::compare(&self.pin, spec)
    }

    /// Returns the number of the cgroup that the attachment of this name was last attached to.
    pub fn cgroup(&self, name: &str) -> Option<u64> {
        self.pin.remembered_cgroup(name)
    }

    /// Configures and attaches: [`Self::prepare`], then [`Attachment::link`].
    ///
    /// Idempotent. The first call creates and pins; a later one, of this process or the next, replaces
    /// the old programs, each in one step.
    pub fn attach(&self, spec: &AttachmentSpec) -> Result<Attachment, RedirectError> {
        let attachment = self.prepare(spec)?;
        attachment.link()?;
        Ok(attachment)
    }

    /// Loads the programs and writes the settings, but attaches nothing: the cgroup need not exist yet.
    /// Attached programs see the new settings at once.
    ///
    /// # Errors
    /// The faults of the spec, and refusals of the kernel; loading takes CAP_BPF and CAP_NET_ADMIN.
    pub fn prepare(&self, spec: &AttachmentSpec) -> Result<Attachment, RedirectError> {
        let prepared = Attachment::prepare(&self.pin, self.refusal, spec);
        prepared.map_err(|error| match error {
            RedirectError::Load { .. }
            | RedirectError::Prepare(_)
            | RedirectError::Netns { .. }
                if !kernel::is_since((5, 15)) =>
            {
                RedirectError::OldKernel {
                    release: kernel::release(),
                    source: Box::new(error),
                }
            }
            error => error,
        })
    }

    /// Detaches and removes the attachment of this name. Open connections go on; new ones take the
    /// ordinary route. Returns false when there was none.
    pub fn detach(&self, name: &str) -> Result<bool, RedirectError> {
        attachment::detach(&self.pin, name)
    }

    /// Removes the maps that earlier versions pinned and this one does not use, unless an attachment of
    /// theirs does. Attaching and detaching do so too.
    ///
    /// # Errors
    /// The error of removing one.
    pub fn remove_retired_maps(&self) -> Result<(), RedirectError> {
        if !self.pin.exists() {
            return Ok(());
        }
        let _lock = self.pin.lock()?;
        retired::remove_maps(&self.pin)
    }

    /// Returns every visible attachment of this program: those on this BPF file system, in any pin
    /// directory, and with CAP_SYS_ADMIN all others.
    pub fn survey(&self) -> Vec<FoundAttachment> {
        survey::all(&self.pin)
    }

    /// Returns other attachments that decide over the connections of `spec`, which is attached. Those
    /// that are `configured` beside it are excepted. Notes the result for [`Self::verify`].
    ///
    /// # Errors
    /// `spec` is not attached, or the note can't be written.
    pub fn rivals(
        &self,
        spec: &AttachmentSpec,
        configured: &[&str],
    ) -> Result<Vec<FoundAttachment>, RedirectError> {
        let rivals = survey::rivals(&self.pin, spec, configured)?;
        let text: Vec<_> = rivals.iter().map(ToString::to_string).collect();
        let text = (!text.is_empty()).then(|| text.join(", "));
        // What a process with CAP_SYS_ADMIN has found, one without can't see again.
        let noted = self.pin.remembered_rivals(&spec.name);
        if text.is_some() || survey::sees_all() || !noted.is_some_and(|it| survey::is_hidden(&it)) {
            self.pin.remember_rivals(&spec.name, text.as_deref())?;
        }
        Ok(rivals)
    }

    /// Detaches all attachments of [`Self::survey`], and removes their pins.
    ///
    /// # Errors
    /// The error of removing one; those before it are gone.
    pub fn detach_all(&self) -> Result<Vec<FoundAttachment>, RedirectError> {
        survey::detach_all(&self.pin)
    }

    /// Checks that the attachment of this name is in the cgroup with the number `cgroup`, whole and
    /// alone. Takes no capability.
    ///
    /// # Errors
    /// [`RedirectError::NotAttached`], [`RedirectError::Incomplete`], [`RedirectError::OtherCgroup`] or
    /// [`RedirectError::Rivals`].
    pub fn verify(&self, name: &str, cgroup: u64) -> Result<(), RedirectError> {
        status::verify(&self.pin, name, cgroup)
    }

    /// Opens the flows of an attachment, for the accepting side.
    pub fn flows(&self, name: &str) -> Result<Flows, RedirectError> {
        Flows::open(&self.pin, name)
    }

    /// Opens the heartbeat of an attachment.
    pub fn heartbeat(&self, name: &str) -> Result<Heartbeat, RedirectError> {
        Heartbeat::open(&self.pin, name)
    }

    /// Opens the routes of all tenants.
    pub fn routes(&self) -> Result<Routes, RedirectError> {
        Routes::open(&self.pin)
    }

    /// Opens the counters of the programs.
    pub fn counters(&self) -> Result<Counters, RedirectError> {
        Counters::open(&self.pin)
    }

    /// Returns the status of every attachment, by name. Empty when none was ever attached.
    pub fn status(&self) -> Result<Vec<Status>, RedirectError> {
        status::read(&self.pin)
    }

    /// Opens the log of the programs (each refusal, level DEBUG). The returned future forwards it to
    /// the `log` crate, without end.
    ///
    /// Opening takes CAP_SYS_ADMIN, forwarding a tokio runtime with I/O. All attachments share one log:
    /// run one of these per pin directory.
    ///
    /// # Errors
    /// No attachment of this name has its programs attached, or the capability is missing.
    pub fn forward_log(
        &self,
        name: &str,
    ) -> Result<impl Future<Output = Result<(), RedirectError>> + Send + use<>, RedirectError> {
        log::forward(&self.pin, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_can_move_to_the_thread_that_needs_them() {
        fn is_send<T: Send>() {}
        is_send::<Attachment>();
        is_send::<Counters>();
        is_send::<Flows>();
        is_send::<Heartbeat>();
        is_send::<Routes>();
    }
}
