//! The reader of a stream's bytes from quinn-proto, in order.
//!
//! Without a gap bytes are read in order. A reader that finds a gap also takes the data behind it:
//! quinn-proto would not tell how much that is, or in how many pieces. Each piece is copied to its
//! size, so that a few bytes don't keep a packet.

use std::collections::BTreeMap;

use bytes::Bytes;
use quinn_proto::{Chunk, ReadError, StreamId};

use super::connection::State;
use super::ledger::FRAME;
use super::reason_of;
use cpc_datapath::stream::RecvEnd;

/// Maximum number of chunks taken from a stream at once: one vectored write.
const CHUNKS: usize = 64;

/// Initial room in chunks: a few packets, or the better part of a GRO batch.
const BATCH: usize = 16;

/// Position of a stream's reader.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    /// Offset of the next byte.
    next: u64,
    /// Data behind a gap; `None` until there was one. From then on quinn-proto is read out of order.
    ahead: Option<Box<OutOfOrderData>>,
}

/// Result of a read.
pub(super) struct Read {
    /// The end of the stream, once it is reached.
    pub(super) end: Option<RecvEnd>,
    /// Whether the peer's new credit must be sent.
    pub(super) credit: bool,
}

/// Result of a pass over the chunks of quinn-proto.
enum Pass {
    /// There may be more.
    Full,
    /// No more data is available.
    Blocked,
    End(RecvEnd),
}

impl Reassembly {
    /// Takes the available data, at most about [`CHUNKS`]. Returns `None` if quinn-proto does not know
    /// the stream any more.
    pub(super) fn read(
        &mut self,
        id: StreamId,
        state: &mut State,
        into: &mut Vec<Bytes>,
    ) -> Option<Read> {
        let before = into.len();
        let mut credit = false;
        loop {
            let is_ordered = self.ahead.is_none();
            let mut stream = state.proto.recv_stream(id);
            let mut chunks = stream.read(is_ordered).ok()?;
            let (mut taken, mut bytes) = (0, 0);
            let pass = loop {
                if into.len() - before >= CHUNKS {
                    break Pass::Full;
                }
                match chunks.next(usize::MAX) {
                    Ok(Some(chunk)) => {
                        taken += 1;
                        bytes += chunk.bytes.len() as u64;
                        self.take(chunk, into);
                    }
                    Ok(None) => break Pass::End(RecvEnd::Finished),
                    Err(ReadError::Reset(code)) => {
                        break Pass::End(RecvEnd::Reset(reason_of(code)));
                    }
                    Err(ReadError::Blocked) => break Pass::Blocked,
                }
            };
            credit |= chunks.finalize().should_transmit();
            let end = match pass {
                Pass::Full => {
                    state.ledger.read(id, (taken, bytes), self.ahead());
                    return Some(Read { end: None, credit });
                }
                Pass::Blocked if is_ordered && taken < state.ledger.frames(id) => {
                    // Some of it lies behind a gap, or came twice: only reading tells.
                    self.ahead = Some(Box::default());
                    state.ledger.read(id, (taken, bytes), 0);
                    continue;
                }
                Pass::Blocked => None,
                Pass::End(end) => Some(end),
            };
            if let Some(RecvEnd::Reset(_)) = end {
                // Resets count as those of stopped streams.
                state.ledger.stopped(id);
                self.ahead = None;
            }
            let gives = into.len() > before;
            state.ledger.read_out(id, self.ahead(), gives);
            return Some(Read { end, credit });
        }
    }

    /// Returns the memory cost of the data behind a gap, in bytes.
    fn ahead(&self) -> u64 {
        self.ahead.as_ref().map_or(0, |ahead| ahead.cost())
    }

    /// Passes on a chunk that is the next one, and those that follow it; keeps any other.
    fn take(&mut self, chunk: Chunk, into: &mut Vec<Bytes>) {
        if let Some(ahead) = &mut self.ahead
            && chunk.offset != self.next
        {
            ahead.keep(chunk.offset, &chunk.bytes);
            return;
        }
        if into.capacity() == 0 {
            into.reserve(BATCH);
        }
        self.next = chunk.offset + chunk.bytes.len() as u64;
        into.push(chunk.bytes);
        while let Some(bytes) = self.ahead.as_mut().and_then(|ahead| ahead.take(self.next)) {
            self.next += bytes.len() as u64;
            into.push(bytes);
        }
    }

    /// Discards the available data. Returns `true` if that was all, and quinn-proto has forgotten the
    /// stream.
    pub(super) fn discard(&mut self, id: StreamId, state: &mut State) -> bool {
        // Out of order only where it was read so before: quinn-proto's change to that counts bytes twice which
        // came twice and were read once.
        let is_ordered = self.ahead.take().is_none();
        let mut stream = state.proto.recv_stream(id);
        let Ok(mut chunks) = stream.read(is_ordered) else {
            return true;
        };
        let (is_over, is_reset) = loop {
            match chunks.next(usize::MAX) {
                Ok(Some(_)) => {}
                Ok(None) => break (true, false),
                Err(ReadError::Reset(_)) => break (true, true),
                Err(ReadError::Blocked) => break (false, false),
            }
        };
        drop(chunks);
        if is_reset {
            state.ledger.stopped(id);
        }
        is_over
    }
}

/// Pieces of one stream behind a gap, by their offset. They never overlap: quinn-proto returns each
/// byte once.
#[derive(Debug, Default)]
struct OutOfOrderData {
    pieces: BTreeMap<u64, Bytes>,
    bytes: u64,
}

impl OutOfOrderData {
    /// Returns the memory cost, in bytes.
    fn cost(&self) -> u64 {
        self.bytes + self.pieces.len() as u64 * FRAME
    }

    /// Keeps a copy of `bytes`.
    fn keep(&mut self, offset: u64, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.pieces.insert(offset, Bytes::copy_from_slice(bytes));
    }

    /// Removes the piece at `offset`.
    fn take(&mut self, offset: u64) -> Option<Bytes> {
        let bytes = self.pieces.remove(&offset)?;
        self.bytes -= bytes.len() as u64;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, bytes: &'static [u8]) -> Chunk {
        let bytes = Bytes::from_static(bytes);
        Chunk { offset, bytes }
    }

    #[test]
    fn pieces_come_out_in_order() {
        let mut reassembly = Reassembly::default();
        let mut out = Vec::new();
        reassembly.take(chunk(0, b"ab"), &mut out);
        reassembly.ahead = Some(Box::default());
        for (offset, bytes) in [(4, &b"ef"[..]), (9, b"j"), (6, b"ghi")] {
            reassembly.take(chunk(offset, bytes), &mut out);
        }
        assert_eq!(out.concat(), b"ab");
        let cost = |it: &Reassembly| it.ahead.as_ref().unwrap().cost();
        assert_eq!(cost(&reassembly), 6 + 3 * FRAME);
        reassembly.take(chunk(2, b"cd"), &mut out);
        assert_eq!(out.concat(), b"abcdefghij");
        assert_eq!(cost(&reassembly), 0);
    }
}
