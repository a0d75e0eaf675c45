//! Framing: each message is preceded by its length, a QUIC variable-length integer.
//!
//! A length over [`MAX_FRAME`] is refused when it is read, before a byte of the message is stored.
//! The decoder keeps at most one message.

use bytes::{Bytes, BytesMut};
use prost::Message;
use thiserror::Error;

use super::Envelope;
use crate::varint::VarInt;

/// The longest message, in bytes, without its length.
pub const MAX_FRAME: usize = 64 * 1024;

/// Failure to frame or read a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The message is too long.
    #[error("a control message of {0} bytes is over the limit of {MAX_FRAME}")]
    TooLong(u64),
    /// The message is not protobuf.
    #[error("a control message could not be read: {0}")]
    Malformed(prost::DecodeError),
}

impl From<prost::DecodeError> for FrameError {
    fn from(why: prost::DecodeError) -> Self {
        Self::Malformed(why)
    }
}

/// Returns a message with its length in front.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode(envelope: &Envelope) -> Result<Bytes, FrameError> {
    let length = envelope.encoded_len();
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length as u64));
    }
    let mut out = BytesMut::with_capacity(4 + length);
    // MAX_FRAME fits in 32 bits.
    VarInt::from(length as u32).encode(&mut out);
    envelope.encode_raw(&mut out);
    Ok(out.freeze())
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    /// The head of the next message: a part of its length, or its length and a part of its body.
    partial: BytesMut,
}

impl FrameDecoder {
    /// Takes the next message from the head of `input`, together with the incomplete rest of
    /// earlier calls. `None`: `input` is used up and more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]. The stream can't be read further: the borders of messages are lost.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Envelope>, FrameError> {
        loop {
            match missing(&self.partial)? {
                Missing::Nothing { header } => {
                    let frame = self.partial.split();
                    return Ok(Some(Envelope::decode(&frame[header..])?));
                }
                Missing::Bytes(count) => {
                    let count = count.min(input.len());
                    let Some(taken) = input.split_off(..count).filter(|taken| !taken.is_empty())
                    else {
                        return Ok(None);
                    };
                    self.partial.extend_from_slice(taken);
                }
            }
        }
    }
}

enum Missing {
    /// The message is complete behind `header` bytes of length.
    Nothing { header: usize },
    /// At least this number of bytes is missing, and the decoder may take no more.
    Bytes(usize),
}

fn missing(partial: &[u8]) -> Result<Missing, FrameError> {
    let Some((length, header)) = VarInt::decode(partial) else {
        return Ok(Missing::Bytes(1));
    };
    let length = length.into_inner();
    if length > MAX_FRAME as u64 {
        return Err(FrameError::TooLong(length));
    }
    Ok(match header + length as usize - partial.len() {
        0 => Missing::Nothing { header },
        count => Missing::Bytes(count),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::envelope::Message as Control;
    use crate::control::{Drain, Hello, Offer, Ping, VERSION};

    fn ping(seq: u64) -> Envelope {
        Envelope {
            message: Some(Control::Ping(Ping { seq })),
        }
    }

    /// Decodes everything in `input`, in pieces that end at `cuts`.
    fn decode_all(input: &[u8], cuts: &[usize]) -> Result<Vec<Envelope>, FrameError> {
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(input.len());
        let mut decoder = FrameDecoder::default();
        let mut envelopes = Vec::new();
        let mut start = 0;
        for end in cuts {
            let mut piece = &input[start..end];
            while let Some(envelope) = decoder.decode(&mut piece)? {
                envelopes.push(envelope);
            }
            assert!(piece.is_empty());
            start = end;
        }
        Ok(envelopes)
    }

    /// These bytes are the protocol: a release that writes others can't talk to this one.
    #[test]
    fn the_wire_does_not_change() {
        assert_eq!(
            encode(&ping(7)).unwrap(),
            b"\x04\x2a\x02\x08\x07".as_slice()
        );
        let hello = Control::Hello(Hello {
            version: Some(VERSION),
            agent_id: "w1".to_owned(),
            instance_id: b"0123456789abcdef".to_vec(),
            node: "n1".to_owned(),
            software_version: "0.1.0".to_owned(),
            features: vec!["f".to_owned()],
            offer: Some(Offer {
                addresses: vec!["10.0.0.1".to_owned()],
                cidrs: vec!["10.1.0.0/16".to_owned()],
                names: vec!["*.svc".to_owned()],
                default_route: true,
            }),
            predecessor: Vec::new(),
            incarnation: 0,
        });
        assert_eq!(
            encode(&Envelope { message: Some(hello) }).unwrap(),
            b"\x40\x4c\x0a\x4a\x0a\x02\x08\x01\x12\x02w1\x1a\x100123456789abcdef\x22\x02n1\
              \x2a\x050.1.0\x32\x01f\x3a\x20\x0a\x0810.0.0.1\x12\x0b10.1.0.0/16\x1a\x05*.svc\x20\x01"
                .as_slice()
        );
        let drain = Control::Drain(Drain {
            deadline_ms: 30_000,
            reason: 0x401,
        });
        assert_eq!(
            encode(&Envelope {
                message: Some(drain)
            })
            .unwrap(),
            b"\x09\x3a\x07\x08\xb0\xea\x01\x10\x81\x08".as_slice()
        );
    }

    #[test]
    fn a_length_over_the_limit_is_refused_at_once() {
        let mut decoder = FrameDecoder::default();
        let mut input: &[u8] = &[0x80, 0x01, 0x00, 0x01, 0xff];
        assert_eq!(decoder.decode(&mut input), Err(FrameError::TooLong(65_537)));
        assert_eq!(input, [0xff], "nothing of the body was taken");

        let mut longest = vec![0x80, 0x01, 0x00, 0x00];
        // Field 15, unknown, with 65,532 bytes.
        longest.extend([0x7a, 0xfc, 0xff, 0x03]);
        longest.resize(4 + MAX_FRAME, 0);
        assert_eq!(decode_all(&longest, &[]), Ok(vec![Envelope::default()]));
    }

    #[test]
    fn a_message_over_the_limit_is_not_encoded() {
        let hello = Hello {
            node: "n".repeat(MAX_FRAME),
            ..Hello::default()
        };
        let envelope = Envelope {
            message: Some(Control::Hello(hello)),
        };
        assert!(matches!(encode(&envelope), Err(FrameError::TooLong(_))));
    }

    #[test]
    fn unknown_fields_and_messages_are_ignored() {
        // A Ping with an unknown field 2 behind it, an unknown message 100, an empty envelope.
        let input = b"\x07\x2a\x05\x08\x07\x12\x01x\x05\xa2\x06\x02\x08\x01\x00";
        let expected = vec![ping(7), Envelope::default(), Envelope::default()];
        assert_eq!(decode_all(input, &[]), Ok(expected));
    }

    proptest! {
        #[test]
        fn round_trip_in_any_pieces(seqs: Vec<u64>, cuts: Vec<usize>) {
            let envelopes: Vec<_> = seqs.into_iter().map(ping).collect();
            let frames = envelopes.iter().map(|envelope| encode(envelope).unwrap());
            let input: Vec<u8> = frames.flatten().collect();
            prop_assert_eq!(decode_all(&input, &cuts), Ok(envelopes));
        }

        #[test]
        fn any_bytes(input: Vec<u8>, cuts: Vec<usize>) {
            prop_assert_eq!(decode_all(&input, &cuts), decode_all(&input, &[]));
        }
    }
}
