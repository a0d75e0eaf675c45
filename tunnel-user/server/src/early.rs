//! A client's first bytes, kept until its dial is answered, so that another agent can be asked.

use std::cell::Cell;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};

use cpc_datapath::Budget;
use cpc_datapath::budget::Charge;
use cpc_datapath::stream::{SendEnd, SendHalf};
use cpc_datapath::{LocalSocket, Outbound};

/// The most that is kept, in bytes; a client that sends more waits for the answer.
const KEPT: usize = 64 << 10;

/// What happens to early bytes before the dial is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Early {
    /// They are sent behind the request: no round trip is lost. An end of file is a half-close.
    Send,
    /// They are held, since the client waits for an answer. An end of file is a half-close, unless the
    /// client has gone altogether.
    Hold,
    /// They are held, and an end of file cancels the dial: the protocol knows no half-close.
    HoldWhole,
}

/// Why a client is not read any more before its dial is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EarlyEnd {
    /// The client went away.
    Client,
    /// The stream takes no more.
    Stream(SendEnd),
}

/// The bytes of one client.
#[derive(Debug)]
pub(super) struct EarlyBytes {
    policy: Early,
    kept: Vec<Bytes>,
    len: usize,
    eof: bool,
    /// What is kept is charged to it.
    charge: Option<Charge>,
    /// It takes no more: the client waits for the answer.
    is_full: bool,
}

/// How much of them one stream has been given.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    next: usize,
    current: Bytes,
    finished: bool,
    /// Whether the stream may have carried something of the client's.
    pub touched: Rc<Cell<bool>>,
}

impl EarlyBytes {
    /// Starts with what was read behind the request, if anything.
    pub(super) fn new(policy: Early, first: Bytes) -> Self {
        let len = first.len();
        let kept = if first.is_empty() {
            Vec::new()
        } else {
            vec![first]
        };
        Self {
            policy,
            kept,
            len,
            eof: false,
            charge: None,
            is_full: false,
        }
    }

    /// Charges `budget` for what is kept.
    pub(super) fn charge_to(&mut self, budget: Budget) {
        let mut charge = Charge::new(budget);
        self.is_full |= !charge.set(self.len as u64);
        self.charge = Some(charge);
    }

    /// Reads the client and, if it may, gives the stream what there is; until one of them ends.
    /// Without a stream nothing is given before the dial is answered. Cancelling loses nothing:
    /// what was done stands in `self` and `cursor`.
    pub(super) async fn pump(
        &mut self,
        local: &impl LocalSocket,
        mut send: Option<&mut impl SendHalf>,
        cursor: &mut Cursor,
    ) -> EarlyEnd {
        loop {
            if self.policy == Early::Send
                && let Some(send) = &mut send
                && let Err(end) = self.give(*send, cursor).await
            {
                return EarlyEnd::Stream(end);
            }
            if self.eof {
                Box::pin(local.departed()).await;
                return EarlyEnd::Client;
            }
            if self.len >= KEPT || self.is_full {
                Box::pin(local.broken()).await;
                return EarlyEnd::Client;
            }
            match local.read().await {
                Ok(bytes) if !bytes.is_empty() => {
                    self.len += bytes.len();
                    self.kept.push(bytes);
                    let len = self.len as u64;
                    let charged = self.charge.as_mut().is_none_or(|charge| charge.set(len));
                    self.is_full |= !charged;
                }
                Ok(_) if self.policy != Early::HoldWhole => self.eof = true,
                _ => return EarlyEnd::Client,
            }
        }
    }

    async fn give(&self, send: &mut impl SendHalf, cursor: &mut Cursor) -> Result<(), SendEnd> {
        loop {
            if !cursor.current.is_empty() {
                cursor.touched.set(true);
                send.send(&mut cursor.current).await?;
            }
            let Some(bytes) = self.kept.get(cursor.next) else {
                break;
            };
            cursor.current = bytes.clone();
            cursor.next += 1;
        }
        if self.eof && !cursor.finished {
            cursor.finished = true;
            cursor.touched.set(true);
            send.finish();
        }
        Ok(())
    }

    /// What the stream has yet to be given, once the dial has succeeded, and how many bytes it has.
    pub(super) fn rest(&self, cursor: Cursor) -> (Outbound, usize) {
        let mut rest = BytesMut::from(cursor.current);
        self.kept[cursor.next..]
            .iter()
            .for_each(|bytes| rest.extend_from_slice(bytes));
        let given = self.len - rest.len();
        let pending = rest.freeze();
        (
            Outbound {
                pending,
                eof: self.eof,
            },
            given,
        )
    }
}
