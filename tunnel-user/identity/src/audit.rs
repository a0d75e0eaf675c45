//! Audit records of certificates that came into force or went.

use std::error::Error;

use super::anchors::Anchor;
use super::material::{Change, MaterialError};
use cpc_observe::audit::events::{self, changed};

/// Records a reload of certificates: its outcome, and the added and removed CAs.
pub fn certificates(outcome: Result<&Change, &MaterialError>) {
    changed("certificates", outcome.map(drop).map_err(|it| it as _));
    let Ok(change) = outcome else {
        return;
    };
    for (event, cas) in [("ca_added", &change.added), ("ca_removed", &change.removed)] {
        for (domain, ca) in cas {
            let until = ca.validity().1;
            events::ca_changed(event, domain, ca.subject(), &ca.key(), until);
        }
    }
}

/// Records that a server offered a CA that no trusted one vouches for.
pub fn ca_refused(server: &str, ca: &Anchor, why: &(dyn Error + 'static)) {
    events::ca_refused(server, ca.subject(), &ca.key(), why);
}

/// Records a reload of the revocation list, and its outcome.
pub fn revocations(outcome: Result<(), &MaterialError>) {
    changed("list of revoked peers", outcome.map_err(|it| it as _));
}
