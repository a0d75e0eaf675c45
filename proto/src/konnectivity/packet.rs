//! The packets of a stream, in checked form.

use bytes::{Bytes, BytesMut};
use prost::Message;

use super::frame::{DecodeError, MAX_MESSAGE, data_head, frame};
use super::generated as wire;
use super::generated::PacketType;
use super::generated::packet::Payload;

/// Size below which a payload is copied out of its receive buffer: a byte that waits to be written
/// must not hold the whole buffer.
const COPY_BELOW: usize = 2 << 10;

/// One message of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// DIAL_REQ: connect me to this.
    DialRequest {
        /// The network, "tcp" as a rule.
        protocol: String,
        /// Destination, as host:port.
        address: String,
        /// Names the dial until it is answered.
        random: i64,
    },
    /// DIAL_RSP: the answer.
    DialResponse {
        /// Error text; empty for an established connection.
        error: String,
        /// Names the connection; 0 where there is none.
        connect_id: i64,
        /// The number in the request.
        random: i64,
    },
    /// DATA: bytes of a connection.
    Data {
        /// Connect id; 0 means none.
        connect_id: i64,
        /// The bytes.
        data: Bytes,
    },
    /// CLOSE_REQ: the connection is to end.
    CloseRequest {
        /// Connect id.
        connect_id: i64,
    },
    /// CLOSE_RSP: the connection has ended.
    CloseResponse {
        /// Error text; empty in an orderly close.
        error: String,
        /// Connect id.
        connect_id: i64,
    },
    /// DIAL_CLS: the server cancels the dial.
    CloseDial {
        /// The number in its request.
        random: i64,
    },
    /// DRAIN: new connections had better go to another agent.
    Drain,
    /// A type that this release does not know, to be ignored.
    Unknown(i32),
}

impl Packet {
    /// Returns the bytes of the packet, with its gRPC frame.
    #[must_use]
    pub fn frame(&self) -> Bytes {
        if let Self::Data { connect_id, data } = self {
            let head = data_head(*connect_id, data.len());
            let mut out = BytesMut::with_capacity(head.len() + data.len());
            out.extend_from_slice(&head);
            out.extend_from_slice(data);
            return out.freeze();
        }
        frame(&self.to_wire())
    }

    fn to_wire(&self) -> wire::Packet {
        let (r#type, payload) = match self.clone() {
            Self::DialRequest {
                protocol,
                address,
                random,
            } => (
                PacketType::DialReq as i32,
                Some(Payload::DialRequest(wire::DialRequest {
                    protocol,
                    address,
                    random,
                })),
            ),
            Self::DialResponse {
                error,
                connect_id,
                random,
            } => (
                PacketType::DialRsp as i32,
                Some(Payload::DialResponse(wire::DialResponse {
                    error,
                    connect_id,
                    random,
                })),
            ),
            Self::Data { connect_id, data } => (
                PacketType::Data as i32,
                Some(Payload::Data(wire::Data {
                    connect_id,
                    error: String::new(),
                    data,
                })),
            ),
            Self::CloseRequest { connect_id } => (
                PacketType::CloseReq as i32,
                Some(Payload::CloseRequest(wire::CloseRequest { connect_id })),
            ),
            Self::CloseResponse { error, connect_id } => (
                PacketType::CloseRsp as i32,
                Some(Payload::CloseResponse(wire::CloseResponse {
                    error,
                    connect_id,
                })),
            ),
            Self::CloseDial { random } => (
                PacketType::DialCls as i32,
                Some(Payload::CloseDial(wire::CloseDial { random })),
            ),
            Self::Drain => (
                PacketType::Drain as i32,
                Some(Payload::Drain(wire::Drain {})),
            ),
            Self::Unknown(r#type) => (r#type, None),
        };
        wire::Packet { r#type, payload }
    }

    /// Reads a message without its frame.
    pub(super) fn read(message: Bytes) -> Result<Self, DecodeError> {
        debug_assert!(message.len() <= MAX_MESSAGE);
        let wire::Packet { r#type, payload } = wire::Packet::decode(message)?;
        let Ok(known) = PacketType::try_from(r#type) else {
            return Ok(Self::Unknown(r#type));
        };
        match (known, payload) {
            (PacketType::DialReq, Some(Payload::DialRequest(request))) => Ok(Self::DialRequest {
                protocol: request.protocol,
                address: request.address,
                random: request.random,
            }),
            (PacketType::DialRsp, Some(Payload::DialResponse(response))) => {
                Ok(Self::DialResponse {
                    error: response.error,
                    connect_id: response.connect_id,
                    random: response.random,
                })
            }
            (PacketType::Data, Some(Payload::Data(data))) => Ok(Self::Data {
                connect_id: data.connect_id,
                data: owned(data.data),
            }),
            (PacketType::CloseReq, Some(Payload::CloseRequest(request))) => {
                Ok(Self::CloseRequest {
                    connect_id: request.connect_id,
                })
            }
            (PacketType::CloseRsp, Some(Payload::CloseResponse(response))) => {
                Ok(Self::CloseResponse {
                    error: response.error,
                    connect_id: response.connect_id,
                })
            }
            (PacketType::DialCls, Some(Payload::CloseDial(close))) => Ok(Self::CloseDial {
                random: close.random,
            }),
            (PacketType::Drain, Some(Payload::Drain(_)) | None) => Ok(Self::Drain),
            (known, _) => Err(DecodeError::Payload(known.as_str_name())),
        }
    }
}

fn owned(data: Bytes) -> Bytes {
    if data.len() < COPY_BELOW {
        Bytes::copy_from_slice(&data)
    } else {
        data
    }
}
