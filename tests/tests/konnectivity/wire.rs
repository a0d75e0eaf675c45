//! Konnectivity's messages, written down by hand: the connector's own are generated from its
//! description of them, and a mistake in that must not be made here as well.

use prost::{Enumeration, Message, Oneof};

/// Methods of an agent, and of a frontend.
pub(crate) const CONNECT: &str = "/AgentService/Connect";
pub(crate) const PROXY: &str = "/ProxyService/Proxy";

/// Message of every stream, in both directions.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Packet {
    #[prost(enumeration = "Type", tag = "1")]
    pub(crate) r#type: i32,
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub(crate) payload: Option<Payload>,
}

/// The numbers of the types and of the payloads do not line up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub(crate) enum Type {
    DialRequest = 0,
    DialResponse = 1,
    CloseRequest = 2,
    CloseResponse = 3,
    Data = 4,
    CloseDial = 5,
    Drain = 6,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Payload {
    #[prost(message, tag = "2")]
    DialRequest(DialRequest),
    #[prost(message, tag = "3")]
    DialResponse(DialResponse),
    #[prost(message, tag = "4")]
    Data(Data),
    #[prost(message, tag = "5")]
    CloseRequest(CloseRequest),
    #[prost(message, tag = "6")]
    CloseResponse(CloseResponse),
    #[prost(message, tag = "7")]
    CloseDial(CloseDial),
    #[prost(message, tag = "8")]
    Drain(Drain),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DialRequest {
    #[prost(string, tag = "1")]
    pub(crate) protocol: String,
    #[prost(string, tag = "2")]
    pub(crate) address: String,
    #[prost(int64, tag = "3")]
    pub(crate) random: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct DialResponse {
    #[prost(string, tag = "1")]
    pub(crate) error: String,
    #[prost(int64, tag = "2")]
    pub(crate) connect_id: i64,
    #[prost(int64, tag = "3")]
    pub(crate) random: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Data {
    #[prost(int64, tag = "1")]
    pub(crate) connect_id: i64,
    #[prost(string, tag = "2")]
    pub(crate) error: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) data: bytes::Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct CloseRequest {
    #[prost(int64, tag = "1")]
    pub(crate) connect_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct CloseResponse {
    #[prost(string, tag = "1")]
    pub(crate) error: String,
    #[prost(int64, tag = "2")]
    pub(crate) connect_id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct CloseDial {
    #[prost(int64, tag = "1")]
    pub(crate) random: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Drain {}

impl Packet {
    /// Returns its payload, if it fits the type: any other payload is a mistake of the sender's.
    pub(crate) fn content(&self) -> Option<&Payload> {
        let payload = self.payload.as_ref()?;
        (self.r#type == payload.fitting() as i32).then_some(payload)
    }
}

impl Payload {
    fn fitting(&self) -> Type {
        match self {
            Self::DialRequest(_) => Type::DialRequest,
            Self::DialResponse(_) => Type::DialResponse,
            Self::Data(_) => Type::Data,
            Self::CloseRequest(_) => Type::CloseRequest,
            Self::CloseResponse(_) => Type::CloseResponse,
            Self::CloseDial(_) => Type::CloseDial,
            Self::Drain(_) => Type::Drain,
        }
    }
}

impl From<Payload> for Packet {
    fn from(payload: Payload) -> Self {
        Self {
            r#type: payload.fitting() as i32,
            payload: Some(payload),
        }
    }
}

/// A request for a TCP connection.
pub(crate) fn dial(address: impl ToString, random: i64) -> Packet {
    let (protocol, address) = ("tcp".to_owned(), address.to_string());
    Payload::DialRequest(DialRequest {
        protocol,
        address,
        random,
    })
    .into()
}

pub(crate) fn dialled(connect_id: i64, random: i64) -> Packet {
    let error = String::new();
    Payload::DialResponse(DialResponse {
        error,
        connect_id,
        random,
    })
    .into()
}

pub(crate) fn dial_failed(error: impl ToString, random: i64) -> Packet {
    Payload::DialResponse(DialResponse {
        error: error.to_string(),
        connect_id: 0,
        random,
    })
    .into()
}

pub(crate) fn data(connect_id: i64, data: impl Into<bytes::Bytes>) -> Packet {
    Payload::Data(Data {
        connect_id,
        error: String::new(),
        data: data.into(),
    })
    .into()
}

pub(crate) fn close(connect_id: i64) -> Packet {
    Payload::CloseRequest(CloseRequest { connect_id }).into()
}

pub(crate) fn closed(connect_id: i64, error: impl ToString) -> Packet {
    let error = error.to_string();
    Payload::CloseResponse(CloseResponse { error, connect_id }).into()
}

pub(crate) fn close_dial(random: i64) -> Packet {
    Payload::CloseDial(CloseDial { random }).into()
}

pub(crate) fn drain() -> Packet {
    Payload::Drain(Drain {}).into()
}

/// The bytes that the facts prescribe: what these structures encode to is what the peer reads.
#[test]
fn packets_are_encoded_as_the_peer_encodes_them() {
    let cases: [(Packet, &[u8]); 7] = [
        // The type 0 is the default of proto3, and so absent.
        (dial("a:1", 5), b"\x12\x0c\x0a\x03tcp\x12\x03a:1\x18\x05"),
        (dialled(3, 300), b"\x08\x01\x1a\x05\x10\x03\x18\xac\x02"),
        (data(3, "hi"), b"\x08\x04\x22\x06\x08\x03\x1a\x02hi"),
        (close(3), b"\x08\x02\x2a\x02\x08\x03"),
        (closed(3, "e"), b"\x08\x03\x32\x05\x0a\x01e\x10\x03"),
        (close_dial(9), b"\x08\x05\x3a\x02\x08\x09"),
        (drain(), b"\x08\x06\x42\x00"),
    ];
    for (packet, bytes) in cases {
        assert_eq!(packet.encode_to_vec(), bytes, "{packet:?}");
        assert_eq!(Packet::decode(bytes), Ok(packet));
    }
}
