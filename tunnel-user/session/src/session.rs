//! Both directions of a session at one end: ends, the loss of a tunnel, and the resumption.

use std::time::Instant;

use bytes::Bytes;
use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::handover;
use tunnel_proto::resumption::{Confirmation, SessionId, Status};

use super::inbound::Inbound;
use super::outbound::Outbound;
use super::saved::InvalidState;
use super::violation::Violation;
use cpc_datapath::stream::Held;

/// Whether sessions outlive a tunnel that ended for `reason`.
pub fn survives(reason: CloseReason) -> bool {
    match reason.class() {
        CloseClass::Reset => true,
        CloseClass::Session => {
            matches!(reason, CloseReason::Replaced | CloseReason::HandedOver)
        }
        // The process at the other end is leaving.
        CloseClass::Drained
        | CloseClass::Finished
        | CloseClass::NotDialled
        | CloseClass::DialFailed => false,
    }
}

/// Agreement of the two ends that the session outlives its tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nothing is kept: the session ends with its tunnel.
    Plain,
    /// This end keeps bytes, and has told the other one; it does not know whether that one does.
    Offered,
    /// Both ends keep bytes.
    Held,
}

/// Duty of an end after a message of the other one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Number of kept bytes to release.
    pub release: u64,
    /// Whether to reset the local socket, and the reason.
    pub reset: Option<CloseReason>,
}

/// Outcome of a resumption on another tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// The tunnel carries the session from now on, were it only for the last confirmation. Holds the number
    /// of kept bytes to release; the next byte to send follows them.
    Continues(u64),
    /// Nothing is left to do: the session is over, in order or by the reset that both ends know of.
    Over,
    /// The session can't go on: reset the local socket.
    Lost(CloseReason),
}

/// One end of a session.
#[derive(Clone, Debug)]
pub struct Session {
    id: SessionId,
    hold: Hold,
    /// Direction from the local socket.
    pub outbound: Outbound,
    /// Direction to the local socket.
    pub inbound: Inbound,
    abort: Option<Abort>,
    /// Whether the other end has said that it is settled.
    is_peer_settled: bool,
    /// Whether the other end has said that it survives the loss of the tunnel.
    is_peer_safe: bool,
    /// Time at which the tunnel was lost, while there is none.
    detached: Option<Instant>,
    /// State that the other end was told last on the present tunnel.
    told: Option<Confirmation>,
}

/// Progress of giving the session up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abort {
    /// By this end; the other one may not know.
    Begun(CloseReason),
    /// By either end, and both know, or will be told by the next confirmation.
    Agreed,
}

impl Session {
    /// Creates an end without bytes, on a tunnel. It is plain.
    pub fn new(id: SessionId) -> Self {
        Self {
            id,
            hold: Hold::Plain,
            outbound: Outbound::default(),
            inbound: Inbound::default(),
            abort: None,
            is_peer_settled: false,
            is_peer_safe: false,
            detached: None,
            told: None,
        }
    }

    /// Returns the name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Returns the agreement with the other end.
    pub fn hold(&self) -> Hold {
        self.hold
    }

    /// Offers the other end of a plain session to hold it: keeps all bytes from now on, and confirms.
    pub fn offer(&mut self) {
        if self.hold == Hold::Plain && self.abort.is_none() && !self.is_over() {
            self.hold = Hold::Offered;
            self.outbound.keep();
        }
    }

    /// Notes that the other end, on the present tunnel, does not know the session. It has ended a plain one in
    /// order, and this end goes on as a plain one: the stream tells how it ends.
    pub fn unknown_to_peer(&mut self) -> Effect {
        self.hold = Hold::Plain;
        let release = self.outbound.keep_nothing();
        Effect {
            release,
            reset: None,
        }
    }

    /// Notes that the other end has reset the stream, on the present tunnel.
    pub fn reset_by_peer(&mut self, reason: CloseReason) -> Effect {
        self.agree(reason)
    }

    /// Whether the direction to the other end is over. Of a plain session the transport decides.
    pub fn is_outbound_over(&self) -> bool {
        self.outbound.is_done() || self.hold == Hold::Plain && self.outbound.is_acknowledged()
    }

    /// Returns the time at which the tunnel was lost, while there is none.
    pub fn detached(&self) -> Option<Instant> {
        self.detached
    }

    /// Whether the session was given up.
    pub fn is_aborted(&self) -> bool {
        self.abort.is_some()
    }

    /// Gives the session up. The caller resets the local socket and releases all kept bytes. The first
    /// reason counts.
    pub fn abort(&mut self, reason: CloseReason) {
        self.abort.get_or_insert(Abort::Begun(reason));
        self.outbound.abandon();
    }

    /// Gives the session up as the other end knows. A socket that is not reset yet is, for `reason`.
    fn agree(&mut self, reason: CloseReason) -> Effect {
        let reset = self.abort.is_none().then_some(reason);
        self.abort = Some(Abort::Agreed);
        let release = self.outbound.abandon();
        Effect { release, reset }
    }

    /// Whether both directions have ended and the other end has confirmed everything.
    pub fn is_settled(&self) -> bool {
        self.is_outbound_over() && self.inbound.is_done()
    }

    /// Whether the end needs to remember nothing more, once its last confirmation is sent.
    pub fn is_over(&self) -> bool {
        match self.abort {
            Some(Abort::Agreed) => true,
            // Of a plain session the end of the stream tells the other end.
            Some(Abort::Begun(_)) => self.hold == Hold::Plain,
            None => self.is_settled() && (self.is_peer_settled || self.hold == Hold::Plain),
        }
    }

    fn state(&self) -> Confirmation {
        let status = match self.abort {
            Some(Abort::Begun(reason)) => Status::Aborted(reason),
            Some(Abort::Agreed) => Status::Acknowledged,
            None if self.is_settled() => Status::Settled,
            None => Status::Open,
        };
        Confirmation {
            accepted: self.inbound.accepted(),
            status,
            is_safe: self.is_safe(),
        }
    }

    /// Returns the confirmation that the other end lacks, if any. It counts as told.
    pub fn confirmation(&mut self) -> Option<Confirmation> {
        let state = self.state();
        let is_carried = self.hold != Hold::Plain && self.detached.is_none();
        let is_news = is_carried && self.told != Some(state);
        is_news.then(|| self.tell())
    }

    /// Returns the state for a message to the other end, and notes that the message has it.
    pub fn tell(&mut self) -> Confirmation {
        let state = self.state();
        self.told = Some(state);
        state
    }

    /// Takes in a confirmation of the present tunnel. Those that an earlier tunnel still delivers must not
    /// come here: they are older than the resumption.
    ///
    /// # Errors
    /// [`Violation`]; the caller then [aborts](Self::abort).
    pub fn confirmed(&mut self, peer: &Confirmation) -> Result<Effect, Violation> {
        if self.hold != Hold::Held {
            self.hold = Hold::Held;
            self.outbound.keep();
        }
        self.is_peer_safe = peer.is_safe;
        match peer.status {
            Status::Aborted(reason) => return Ok(self.agree(reason)),
            Status::Acknowledged => {
                // Without an abort of ours the peer breaks the protocol: the session is lost all the same.
                let effect = self.agree(CloseReason::PeerReset);
                self.told = Some(self.state());
                return Ok(effect);
            }
            Status::Open | Status::Settled => {}
        }
        if self.abort.is_some() {
            return Ok(Effect::default());
        }
        let release = self.outbound.confirm(&peer.accepted)?;
        if peer.status == Status::Settled {
            if !self.outbound.is_done() {
                return Err(Violation::NotSettled);
            }
            self.is_peer_settled = true;
        }
        Ok(Effect {
            release,
            reset: None,
        })
    }

    /// Returns the progress, if both ends hold the session and it was not given up.
    pub fn progress(&self) -> Option<Held> {
        if self.hold != Hold::Held || self.abort.is_some() {
            return None;
        }
        let taken = self.outbound.taken();
        let confirmed = match self.outbound.is_done() {
            true => taken,
            false => self.outbound.confirmed(),
        };
        Some(Held {
            id: self.id,
            taken,
            confirmed,
            written: self.inbound.accepted().written,
        })
    }

    /// Whether the session survives the loss of its tunnel.
    pub fn is_safe(&self) -> bool {
        self.abort.is_none() && self.hold == Hold::Held && self.outbound.is_safe()
    }

    /// Whether the other end has said that it survives the loss of the tunnel too.
    pub fn is_peer_safe(&self) -> bool {
        self.is_peer_safe
    }

    /// Notes the loss of the tunnel. A session that is not [safe](Self::is_safe) is given up with
    /// `reason`; returns whether it was.
    pub fn detach(&mut self, reason: CloseReason, now: Instant) -> bool {
        self.detached.get_or_insert(now);
        self.told = None;
        self.outbound.detach();
        if self.abort.is_some() || self.is_safe() {
            return false;
        }
        let is_outbound_over = self.outbound.is_done() || self.outbound.is_acknowledged();
        if self.hold == Hold::Offered && self.inbound.is_done() && is_outbound_over {
            // As a plain one it is over.
            self.hold = Hold::Plain;
            return false;
        }
        self.abort(reason);
        true
    }

    /// Prepares the session for another tunnel. Returns the state to tell there, and the number of
    /// received bytes to drop: the other end sends them again.
    pub fn resumption(&mut self) -> (Confirmation, u64) {
        self.outbound.detach();
        let drop = self.inbound.resume();
        (self.tell(), drop)
    }

    /// Continues on another tunnel, on which this end has told its [`resumption`](Self::resumption), and
    /// the other end is in `peer`'s state.
    ///
    /// # Errors
    /// [`Violation`]; the caller then [aborts](Self::abort).
    pub fn resume(&mut self, peer: Option<&Confirmation>) -> Result<Resumed, Violation> {
        let Some(peer) = peer else {
            return Ok(self.unknown());
        };
        self.detached = None;
        let Effect { release, reset } = self.confirmed(peer)?;
        if let Some(reason) = reset {
            return Ok(Resumed::Lost(reason));
        }
        if self.abort.is_none() && !self.outbound.is_safe() {
            return Err(Violation::NotKept);
        }
        self.outbound.resume();
        Ok(Resumed::Continues(release))
    }

    /// Returns the session, which has no tunnel and is held, for another process; `kept` are the kept bytes.
    pub(super) fn save(&self, kept: Bytes) -> handover::Session {
        handover::Session {
            id: Bytes::copy_from_slice(self.id.as_bytes()),
            outbound: Some(self.outbound.save(kept)),
            inbound: Some(self.inbound.save()),
            aborted: match self.abort {
                Some(Abort::Begun(reason)) => Some(reason as u32),
                Some(Abort::Agreed) | None => None,
            },
            is_abort_agreed: self.abort == Some(Abort::Agreed),
            is_peer_settled: self.is_peer_settled,
        }
    }

    /// Restores a session that another process has [saved](Self::save), and that has no tunnel since
    /// `detached`.
    ///
    /// # Errors
    /// [`InvalidState`].
    pub(super) fn restore(
        saved: &handover::Session,
        detached: Instant,
    ) -> Result<Self, InvalidState> {
        let id = <[u8; 16]>::try_from(&saved.id[..]).map_err(|_| InvalidState("name"))?;
        let outbound = saved.outbound.as_ref().ok_or(InvalidState("direction"))?;
        let inbound = saved.inbound.as_ref().ok_or(InvalidState("direction"))?;
        let begun = |code: u32| {
            // A reason of a later release.
            let reason = CloseReason::from_code(code.into()).unwrap_or(CloseReason::PeerReset);
            Abort::Begun(reason)
        };
        Ok(Self {
            id: SessionId::new(id),
            hold: Hold::Held,
            outbound: Outbound::restore(outbound)?,
            inbound: Inbound::restore(inbound)?,
            abort: match saved.is_abort_agreed {
                true => Some(Abort::Agreed),
                false => saved.aborted.map(begun),
            },
            is_peer_settled: saved.is_peer_settled,
            is_peer_safe: false,
            detached: Some(detached),
            told: None,
        })
    }

    /// Decides about a session that the other end does not know: it has forgotten the session, or lost
    /// it with its process.
    fn unknown(&mut self) -> Resumed {
        if self.abort.is_some() {
            self.abort = Some(Abort::Agreed);
            return Resumed::Over;
        }
        if self.is_settled() {
            self.is_peer_settled = true;
            return Resumed::Over;
        }
        self.agree(CloseReason::LinkLost);
        Resumed::Lost(CloseReason::LinkLost)
    }
}

#[cfg(test)]
mod tests;
