//! Creation and removal of attachments.

use std::{io, os::fd::AsFd};

use super::{
    AttachmentSpec, Hook, RedirectError, Refusal,
    link::{Cgroup, Link, remove_pin},
    maps,
    pin::{Pin, failed},
    program::Programs,
    retired, settings,
};

/// Outcome of [`Attachment::link`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linked {
    /// The programs were not in this cgroup.
    Created,
    /// Earlier programs existed; new ones have replaced them.
    Replaced,
}

/// An attachment whose programs this process has loaded.
///
/// Dropping it changes nothing: its pins stay.
#[derive(Debug)]
pub struct Attachment {
    pin: Pin,
    id: u32,
    spec: AttachmentSpec,
    programs: Programs,
}

impl Attachment {
    pub(super) fn prepare(
        pin: &Pin,
        refusal: Option<Refusal>,
        spec: &AttachmentSpec,
    ) -> Result<Self, RedirectError> {
        spec.check()?;
        pin.create(&spec.name)?;
        let _lock = pin.lock()?;
        let id = settings::number(pin, &spec.name)?;
        let programs = Programs::load(pin, id, refusal)?;
        settings::write(pin, id, spec)?;
        pin.share(&spec.name)?;
        Ok(Self {
            pin: pin.clone(),
            id,
            spec: spec.clone(),
            programs,
        })
    }

    /// Returns the number in maps and metrics, which stays with the name for as long as that is
    /// attached.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns how callers see a refusal.
    pub fn refusal(&self) -> Refusal {
        self.programs.refusal()
    }

    /// Writes new settings (captures, listeners, fail mode, a recreated namespace) for running
    /// programs. A new cgroup counts from the next [`Self::link`].
    pub fn update(&mut self, spec: &AttachmentSpec) -> Result<(), RedirectError> {
        spec.check()?;
        if spec.name != self.spec.name {
            return Err(RedirectError::NotAttached(spec.name.clone()));
        }
        let _lock = self.pin.lock()?;
        settings::write(&self.pin, self.id, spec)?;
        self.spec = spec.clone();
        Ok(())
    }

    /// Reads the host's own addresses again, which are not captured. Returns whether the capture set
    /// changed.
    pub fn follow_addresses(&self) -> Result<bool, RedirectError> {
        let _lock = self.pin.lock()?;
        settings::write(&self.pin, self.id, &self.spec)
    }

    /// Puts the programs into the cgroup, each in one step in place of the old one, and pins the links.
    /// Takes well under a millisecond: the programs are in the kernel already.
    ///
    /// Links of a removed cgroup, or of one that the attachment no longer means, are dropped, and so
    /// are further links of an earlier version.
    pub fn link(&self) -> Result<Linked, RedirectError> {
        let _lock = self.pin.lock()?;
        let cgroup = Cgroup::open(&self.spec.cgroup).map_err(|source| RedirectError::Cgroup {
            path: self.spec.cgroup.clone(),
            source,
        })?;
        let mut linked = Linked::Replaced;
        for (hook, program) in self.programs.iter() {
            let pin = self.pin.link(&self.spec.name, hook);
            let put = || {
                let there = Link::open(&pin)?;
                if let Some(link) = there
                    && link.info()?.cgroup == cgroup.id()
                {
                    link.replace(program.as_fd())?;
                    return Ok(Linked::Replaced);
                }
                Link::create(program.as_fd(), &cgroup, hook)?.pin(&pin)?;
                Ok(Linked::Created)
            };
            let refused = |source: io::Error| RedirectError::Link {
                name: hook.name(),
                cgroup: self.spec.cgroup.clone(),
                source,
            };
            if put().map_err(refused)? == Linked::Created {
                linked = Linked::Created;
            }
        }
        retired::remove_link(&self.pin, &self.spec.name)?;
        retired::remove_maps(&self.pin)?;
        self.pin.remember_cgroup(&self.spec.name, cgroup.id())?;
        Ok(linked)
    }
}

/// Removes an attachment: its links first, then its settings.
pub(super) fn detach(pin: &Pin, name: &str) -> Result<bool, RedirectError> {
    if !pin.exists() {
        return Ok(false);
    }
    let _lock = pin.lock()?;
    let Some((id, _)) = maps::find(&maps::attachments(pin, super::link::Access::Read)?, name)?
    else {
        retired::remove_link(pin, name)?;
        retired::remove_maps(pin)?;
        return Ok(false);
    };
    for hook in Hook::ALL.into_iter().rev() {
        let link = pin.link(name, hook);
        remove_pin(&link).map_err(|error| failed(&link, error))?;
    }
    retired::remove_link(pin, name)?;
    // An attempt that broke off may have left a half-finished pin.
    let directory = pin.links(name);
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(&directory, error));
        }
        _ => {}
    }
    retired::remove_maps(pin)?;
    settings::remove(pin, id)?;
    Ok(true)
}
