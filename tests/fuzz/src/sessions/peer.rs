//! Messages of a peer, made of bytes.

use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::{Accepted, Confirmation, Status};
use tunnel_proto::varint::VarInt;

/// Makes a confirmation of `written` bytes.
pub fn confirmation(written: u64, flags: u8) -> Confirmation {
    let reasons = CloseReason::ALL;
    Confirmation {
        accepted: Accepted {
            // The highest number on the wire.
            written: written.min(VarInt::MAX.into_inner()),
            is_finished: flags & 1 != 0,
            is_refused: flags & 2 != 0,
        },
        status: match flags % 16 / 4 {
            0 => Status::Open,
            1 => Status::Settled,
            2 => Status::Aborted(reasons[usize::from(flags / 16) % reasons.len()]),
            _ => Status::Acknowledged,
        },
        is_safe: flags & 64 != 0,
    }
}
