//! Removal of the pins of earlier versions for the shortcut past TCP on loopback (docs/adr/0031).
//!
//! The shortcut's program is linked to the cgroup beside the others, and checks a flag of the
//! attachment that is no longer set. The shortcut's maps lie among the others, which have kept their
//! layout: hence no new schema.

use super::{
    RedirectError,
    link::{Link, remove_pin},
    pin::{Pin, failed},
};

/// Name of the pin of the program's link, beside those of an attachment's hooks.
const LINK: &str = "shortcut_begin";

/// Names of the maps, which all attachments shared.
const MAPS: [&str; 5] = [
    "SHORTCUT_READ",
    "SHORTCUT_READERS",
    "SHORTCUT_TAKEN",
    "SHORTCUT_WRITERS",
    "SHORTCUT_WRITTEN",
];

/// Whether an attachment still has the program.
pub(super) fn is_attached(pin: &Pin, attachment: &str) -> bool {
    pin.links(attachment).join(LINK).exists()
}

/// Detaches the program from an attachment's cgroup. Connections that it had noted go on.
pub(super) fn remove_link(pin: &Pin, attachment: &str) -> Result<(), RedirectError> {
    let path = pin.links(attachment).join(LINK);
    // At once: the kernel lets go of an unpinned link only after a while. It does so in any case.
    if let Ok(Some(link)) = Link::open(&path) {
        let _ = link.detach();
    }
    remove_pin(&path).map_err(|error| failed(&path, error))
}

/// Removes the pins of the maps, unless an attachment still has the program.
///
/// A server of an earlier version that has them open keeps them for as long as it runs.
pub(super) fn remove_maps(pin: &Pin) -> Result<(), RedirectError> {
    if pin
        .all_links()
        .iter()
        .any(|links| links.join(LINK).exists())
    {
        return Ok(());
    }
    for name in MAPS {
        let path = pin.map(name);
        remove_pin(&path).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}
