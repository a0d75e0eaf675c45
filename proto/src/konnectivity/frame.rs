//! gRPC's framing: before each message a flag, which is 0, and its length in four bytes,
//! big-endian.
//!
//! The decoder refuses a message over [`MAX_MESSAGE`] when it reads the length. It stores at most
//! one message, and only one that arrived in pieces; any other payload stays in the buffer that
//! received it.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use thiserror::Error;

use super::Packet;
use super::generated::{self as wire, PacketType};

/// Maximum length of a message, in bytes, without its frame: the default of grpc-go.
pub const MAX_MESSAGE: usize = 4 << 20;

/// The most bytes of a connection that we put in one packet.
pub const MAX_DATA: usize = 32 << 10;

/// Flag and length.
const HEADER: usize = 5;

/// Keys of the fields in front of a DATA packet's payload: number and wire type.
const TYPE: u8 = 1 << 3;
const DATA: u8 = 4 << 3 | LENGTH_DELIMITED;
const CONNECT_ID: u8 = 1 << 3;
const PAYLOAD: u8 = 3 << 3 | LENGTH_DELIMITED;
const LENGTH_DELIMITED: u8 = 2;

/// Reason why a stream of packets can't be read further.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The message is too long.
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong(u32),
    /// The flag is set.
    #[error("a message is compressed, and no compression was agreed on")]
    Compressed,
    /// The message is not a packet.
    #[error("a packet could not be read: {0}")]
    Malformed(prost::DecodeError),
    /// The payload is missing, or another type's.
    #[error("a packet of type {0} came without its payload")]
    Payload(&'static str),
}

impl From<prost::DecodeError> for DecodeError {
    fn from(why: prost::DecodeError) -> Self {
        Self::Malformed(why)
    }
}

pub(super) fn frame(packet: &wire::Packet) -> Bytes {
    let length = packet.encoded_len();
    let mut out = BytesMut::with_capacity(HEADER + length);
    put_header(&mut out, length);
    packet.encode_raw(&mut out);
    out.freeze()
}

fn put_header(out: &mut BytesMut, length: usize) {
    out.put_u8(0);
    // What is sent is far below MAX_MESSAGE.
    out.put_u32(length as u32);
}

/// Returns everything of a DATA packet before its payload of `length` bytes (from 1 to
/// [`MAX_DATA`]), so that the payload need not be copied.
#[must_use]
pub fn data_head(connect_id: i64, length: usize) -> Bytes {
    let id = connect_id as u64;
    let id_size = if id == 0 {
        0
    } else {
        1 + encoded_len_varint(id)
    };
    let data = id_size + 1 + encoded_len_varint(length as u64) + length;
    let packet = 3 + encoded_len_varint(data as u64) + data;
    let mut out = BytesMut::with_capacity(HEADER + packet - length);
    put_header(&mut out, packet);
    out.put_slice(&[TYPE, PacketType::Data as u8, DATA]);
    encode_varint(data as u64, &mut out);
    if id != 0 {
        out.put_u8(CONNECT_ID);
        encode_varint(id, &mut out);
    }
    out.put_u8(PAYLOAD);
    encode_varint(length as u64, &mut out);
    out.freeze()
}

/// Cuts a stream of bytes into packets.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Head of an incomplete message.
    partial: BytesMut,
}

impl Decoder {
    /// Takes the next packet from the head of `input`, together with the incomplete rest of earlier
    /// calls. `None`: `input` is used up and more bytes are needed.
    ///
    /// # Errors
    /// [`DecodeError`]. The stream can't be read further.
    pub fn decode(&mut self, input: &mut Bytes) -> Result<Option<Packet>, DecodeError> {
        if self.partial.is_empty()
            && let Missing::Nothing { length } = missing(input)?
        {
            let mut message = input.split_to(HEADER + length);
            return Packet::read(message.split_off(HEADER)).map(Some);
        }
        loop {
            match missing(&self.partial)? {
                Missing::Nothing { .. } => {
                    let mut message = self.partial.split();
                    return Packet::read(message.split_off(HEADER).freeze()).map(Some);
                }
                Missing::Bytes(_) if input.is_empty() => return Ok(None),
                Missing::Bytes(count) => {
                    let taken = input.split_to(count.min(input.len()));
                    self.partial.extend_from_slice(&taken);
                }
            }
        }
    }

    /// Bytes of memory that the head of an incomplete message takes.
    #[must_use]
    pub fn held(&self) -> usize {
        match self.partial.is_empty() {
            true => 0,
            false => self.partial.capacity(),
        }
    }

    /// Whether the stream may end here: not within a message.
    #[must_use]
    pub fn is_at_border(&self) -> bool {
        self.partial.is_empty()
    }
}

enum Missing {
    /// The message, of this length, is complete.
    Nothing { length: usize },
    /// At least this number of bytes is missing, and the decoder may take no more.
    Bytes(usize),
}

fn missing(head: &[u8]) -> Result<Missing, DecodeError> {
    let Some((&[flag, ref length @ ..], rest)) = head.split_first_chunk::<HEADER>() else {
        return Ok(Missing::Bytes(HEADER - head.len()));
    };
    if flag != 0 {
        return Err(DecodeError::Compressed);
    }
    let length = length
        .iter()
        .fold(0, |sum, &byte| sum << 8 | u32::from(byte));
    if length as usize > MAX_MESSAGE {
        return Err(DecodeError::TooLong(length));
    }
    let length = length as usize;
    Ok(match length.saturating_sub(rest.len()) {
        0 => Missing::Nothing { length },
        count => Missing::Bytes(count),
    })
}

#[cfg(test)]
mod tests;
