//! An agent that does what the test says, and no more than that.

use std::ops::{Deref, DerefMut};

use anyhow::{Result, bail};

use crate::script::{Reflex, Script};
use crate::wire::{self, DialRequest, Payload};

/// An agent's stream in a test's hands.
#[derive(Debug)]
pub(crate) struct ScriptAgent {
    pub(crate) script: Script,
    pub(crate) reflex: Reflex,
}

impl ScriptAgent {
    /// Takes a DIAL_REQ.
    pub(crate) fn dialled(&mut self) -> Result<DialRequest> {
        match self.payload()? {
            Payload::DialRequest(request) => Ok(request),
            other => bail!("{other:?} came, not a DIAL_REQ"),
        }
    }

    /// Takes a DIAL_REQ and says that it has succeeded, as connection `connect_id`.
    pub(crate) fn accept(&mut self, connect_id: i64) -> Result<DialRequest> {
        let request = self.dialled()?;
        self.answer(&request, connect_id)?;
        Ok(request)
    }

    /// Says that `request` has succeeded, as connection `connect_id`.
    pub(crate) fn answer(&self, request: &DialRequest, connect_id: i64) -> Result<()> {
        self.reflex.know(connect_id);
        self.send(wire::dialled(connect_id, request.random))
    }

    /// Takes CLOSE_REQ and answers it.
    pub(crate) fn close(&mut self, connect_id: i64) -> Result<()> {
        self.expect(wire::close(connect_id))?;
        self.send(wire::closed(connect_id, ""))
    }
}

impl Deref for ScriptAgent {
    type Target = Script;

    fn deref(&self) -> &Script {
        &self.script
    }
}

impl DerefMut for ScriptAgent {
    fn deref_mut(&mut self) -> &mut Script {
        &mut self.script
    }
}
