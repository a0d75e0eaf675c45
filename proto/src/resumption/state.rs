//! State of one end of a session, in the form that its peer receives.

use bytes::{BufMut, BytesMut};

use crate::close::CloseReason;
use crate::varint::VarInt;

/// Progress of the direction towards an end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Number of bytes that the kernel of the end has accepted, below 2^62.
    pub written: u64,
    /// Whether the end of file has been passed on behind all bytes.
    pub is_finished: bool,
    /// Whether the local socket takes no more bytes, while the other direction goes on.
    pub is_refused: bool,
}

/// Progress of an end with the session as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// At least one direction goes on.
    #[default]
    Open,
    /// The end needs nothing more of the other one: both directions have ended, and the other end has
    /// confirmed everything.
    Settled,
    /// The end gave the session up. It remembers the session until the other end knows.
    Aborted(CloseReason),
    /// The end learned that the other one gave up, and has reset its socket.
    Acknowledged,
}

/// The state of one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Confirmation {
    /// Progress of the direction towards this end.
    pub accepted: Accepted,
    /// Progress of the whole.
    pub status: Status,
    /// Whether the end can send everything again that the other one has not accepted: it survives the loss of
    /// the tunnel.
    pub is_safe: bool,
}

const FINISHED: u8 = 1;
const REFUSED: u8 = 2;
const STATUS_SHIFT: u8 = 2;
const STATUS: u8 = 3;
const SAFE: u8 = 16;

impl Confirmation {
    /// Appends the confirmation.
    pub(crate) fn encode(&self, out: &mut BytesMut) {
        let Self {
            accepted,
            status,
            is_safe,
        } = self;
        // No connection carries 2^62 bytes.
        let written = VarInt::try_from(accepted.written).unwrap_or(VarInt::MAX);
        written.encode(out);
        let status_code = match status {
            Status::Open => 0,
            Status::Settled => 1,
            Status::Aborted(_) => 2,
            Status::Acknowledged => 3,
        };
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        out.put_u8(
            flag(accepted.is_finished, FINISHED)
                | flag(accepted.is_refused, REFUSED)
                | flag(*is_safe, SAFE)
                | status_code << STATUS_SHIFT,
        );
        if let Status::Aborted(reason) = status {
            VarInt::from(*reason).encode(out);
        }
    }

    /// Reads a confirmation from the head of `buf`, and returns it with the number of its bytes. A reason
    /// that this release does not know is read as [`CloseReason::PeerReset`].
    ///
    /// # Errors
    /// The flags, where they have bits that this release does not know.
    pub(crate) fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, u8> {
        let Some((written, mut size)) = VarInt::decode(buf) else {
            return Ok(None);
        };
        let Some(&flags) = buf.get(size) else {
            return Ok(None);
        };
        size += 1;
        if flags > SAFE | (SAFE - 1) {
            return Err(flags);
        }
        let status = match flags >> STATUS_SHIFT & STATUS {
            0 => Status::Open,
            1 => Status::Settled,
            2 => {
                let Some((code, code_size)) = VarInt::decode(&buf[size..]) else {
                    return Ok(None);
                };
                size += code_size;
                let reason = CloseReason::from_code(code.into_inner());
                Status::Aborted(reason.unwrap_or(CloseReason::PeerReset))
            }
            _ => Status::Acknowledged,
        };
        let accepted = Accepted {
            written: written.into_inner(),
            is_finished: flags & FINISHED != 0,
            is_refused: flags & REFUSED != 0,
        };
        let confirmation = Self {
            accepted,
            status,
            is_safe: flags & SAFE != 0,
        };
        Ok(Some((confirmation, size)))
    }
}
