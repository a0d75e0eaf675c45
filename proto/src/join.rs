//! Joining, without I/O: one request and one answer over TLS. The worker has checked the server by
//! the hash of the CA's key. The frames are those of the control stream.

use bytes::Bytes;

use crate::certificate::{Answer, Join, from_answer};
use crate::control::envelope::Message;
use crate::control::{Envelope, FrameDecoder, FrameError, encode};
use crate::session::{MessageError, SessionError};

/// Application protocol of the join listener (RFC 7301).
pub const ALPN: &[u8] = b"cpc-join/1";

/// Returns the request in the form of the wire.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn request(join: &Join) -> Result<Bytes, FrameError> {
    frame(Message::JoinRequest(join.into()))
}

/// Returns the answer in the form of the wire.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn answer(answer: &Answer) -> Result<Bytes, FrameError> {
    frame(Message::CertificateAnswer(answer.into()))
}

fn frame(message: Message) -> Result<Bytes, FrameError> {
    encode(&Envelope {
        message: Some(message),
    })
}

/// Assembler of the received bytes; holds one message at most.
#[derive(Debug, Default)]
pub struct Reader {
    frames: FrameDecoder,
}

impl Reader {
    /// Returns the request, once `bytes` has its end. Later bytes are ignored.
    ///
    /// # Errors
    /// [`SessionError`]: it is none.
    pub fn request(&mut self, bytes: &[u8]) -> Result<Option<Join>, SessionError> {
        self.message(bytes, "JoinRequest", |message| match message {
            Message::JoinRequest(join) => Some(Join::try_from(join)),
            _ => None,
        })
    }

    /// Returns the answer, once `bytes` has its end.
    ///
    /// # Errors
    /// [`SessionError`]: it is none.
    pub fn answer(&mut self, bytes: &[u8]) -> Result<Option<Answer>, SessionError> {
        self.message(bytes, "CertificateAnswer", |message| match message {
            Message::CertificateAnswer(answer) => Some(from_answer(answer)),
            _ => None,
        })
    }

    fn message<T>(
        &mut self,
        mut bytes: &[u8],
        name: &'static str,
        read: impl Fn(Message) -> Option<Result<T, MessageError>>,
    ) -> Result<Option<T>, SessionError> {
        while let Some(envelope) = self.frames.decode(&mut bytes)? {
            let Some(message) = envelope.message else {
                continue;
            };
            let found = crate::session::message_name(&message);
            let read = read(message).ok_or(SessionError::OutOfTurn(found))?;
            let invalid = |error| SessionError::Invalid {
                message: name,
                error,
            };
            return read.map(Some).map_err(invalid);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::{Issued, MAX_ADDRESSES, MAX_CERTIFICATES, MAX_CSR};
    use crate::control::{CertificateAnswer, JoinRequest, Ping};

    fn join() -> Join {
        Join {
            token: "id.secret".into(),
            node: "w1".into(),
            addresses: vec!["10.99.1.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            csr: vec![7; MAX_CSR],
        }
    }

    #[test]
    fn a_request_and_its_answer_arrive_in_pieces() {
        let wire = request(&join()).unwrap();
        let mut reader = Reader::default();
        for byte in &wire[..wire.len() - 1] {
            assert_eq!(reader.request(&[*byte]).unwrap(), None);
        }
        let last = &wire[wire.len() - 1..];
        assert_eq!(reader.request(last).unwrap(), Some(join()));

        let issued = Issued {
            chain: vec![vec![1; 700]],
            roots: vec![vec![2; 700], vec![3]],
        };
        for told in [Ok(issued), Err("no such token".into())] {
            let wire = answer(&told).unwrap();
            let read = Reader::default().answer(&wire).unwrap();
            assert_eq!(read, Some(told));
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let wire = |change: fn(&mut JoinRequest)| {
            let mut wire = JoinRequest::from(&join());
            change(&mut wire);
            frame(Message::JoinRequest(wire)).unwrap()
        };
        let wrong = [
            wire(|wire| wire.csr.push(0)),
            wire(|wire| wire.token = "x".repeat(20_000)),
            wire(|wire| wire.node = "w\n1".into()),
            wire(|wire| wire.addresses = vec!["::1".into(); MAX_ADDRESSES + 1]),
            wire(|wire| wire.addresses = vec!["w1".into()]),
        ];
        for wire in wrong {
            let error = Reader::default().request(&wire).unwrap_err();
            assert!(matches!(error, SessionError::Invalid { .. }), "{error}");
        }
        let ping = frame(Message::Ping(Ping { seq: 1 })).unwrap();
        let error = Reader::default().request(&ping).unwrap_err();
        assert_eq!(error, SessionError::OutOfTurn("Ping"));
        let many = frame(Message::CertificateAnswer(CertificateAnswer {
            chain: vec![vec![0]; MAX_CERTIFICATES + 1],
            ..CertificateAnswer::default()
        }));
        assert!(Reader::default().answer(&many.unwrap()).is_err());
    }

    #[test]
    fn a_token_is_not_shown() {
        assert!(!format!("{:?}", join()).contains("secret"));
    }
}
