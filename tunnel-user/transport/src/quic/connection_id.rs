//! The layout of a server's connection ids.
//!
//! ```text
//!  0        1        2            4                  12          16
//!  | layout | shard  | server id  | nonce (random)   | tag       |
//!  | 1      | u8     | u16 hash   | 8 bytes          | 4 bytes   |
//! ```
//!
//! The tag is an HMAC-SHA256 over what stands before it, cut to four bytes, so that made-up ids
//! are told apart without a look-up. The shard stands in clear at a fixed place: packets are steered
//! to their shard by a socket filter, which can't compute an HMAC ([`steering`](super::steering)). The key derives from the
//! persisted secret, so ids of before a restart are still recognised as ours and answered with a
//! stateless reset.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};

use cpc_host::random;

pub(super) const LAYOUT: u8 = 1;
pub(super) const LEN: usize = 16;
pub(super) const SHARD_AT: usize = 1;
const TAG_AT: usize = 12;

/// Generator and verifier of the connection ids of one shard of one server. Clones share a diversion.
#[derive(Clone)]
pub struct Generator {
    key: hmac::Key,
    server: [u8; 2],
    shard: u8,
    /// The shard that new ids name.
    named: Arc<AtomicU8>,
}

impl Generator {
    /// Creates the generator of shard `shard` of the server called `server_id`.
    pub fn new(key: hmac::Key, server_id: &str, shard: u8) -> Self {
        let hash = hmac::sign(&key, server_id.as_bytes());
        let server = [hash.as_ref()[0], hash.as_ref()[1]];
        Self {
            key,
            server,
            shard,
            named: Arc::new(AtomicU8::new(shard)),
        }
    }

    /// Makes the ids that `make` needs name another shard: packets that carry them are steered there.
    pub(super) fn divert<T>(&self, shard: u8, make: impl FnOnce() -> T) -> T {
        self.named.store(shard, Ordering::Relaxed);
        let made = make();
        self.named.store(self.shard, Ordering::Relaxed);
        made
    }

    fn tag(&self, head: &[u8]) -> [u8; LEN - TAG_AT] {
        let mac = hmac::sign(&self.key, head);
        let mut tag = [0; LEN - TAG_AT];
        tag.copy_from_slice(&mac.as_ref()[..LEN - TAG_AT]);
        tag
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator")
            .field("shard", &self.shard)
            .finish_non_exhaustive()
    }
}

impl ConnectionIdGenerator for Generator {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; LEN];
        id[0] = LAYOUT;
        id[SHARD_AT] = self.named.load(Ordering::Relaxed);
        id[2..4].copy_from_slice(&self.server);
        // Without random numbers ids would repeat; quinn then draws again, and TLS fails first.
        let _ = random::fill(&mut id[4..TAG_AT]);
        let tag = self.tag(&id[..TAG_AT]);
        id[TAG_AT..].copy_from_slice(&tag);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        let ours = id.len() == LEN && id[0] == LAYOUT && id[TAG_AT..] == self.tag(&id[..TAG_AT]);
        if ours { Ok(()) } else { Err(InvalidCid) }
    }

    fn cid_len(&self) -> usize {
        LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generator(key: &[u8]) -> Generator {
        Generator::new(hmac::Key::new(hmac::HMAC_SHA256, key), "s1", 3)
    }

    #[test]
    fn ids_are_recognised_by_the_same_key_only() {
        let mut one = generator(b"one");
        let id = one.generate_cid();
        assert_eq!(id[1], 3);
        assert!(generator(b"one").validate(&id).is_ok());
        assert!(generator(b"two").validate(&id).is_err());
        assert_ne!(*id, *one.generate_cid());
    }

    #[test]
    fn ids_can_be_diverted_to_another_shard() {
        let one = generator(b"one");
        let mut other = one.clone();
        let diverted = one.divert(7, || other.generate_cid());
        assert_eq!(diverted[SHARD_AT], 7);
        assert!(one.validate(&diverted).is_ok());
        assert_eq!(other.generate_cid()[SHARD_AT], 3);
    }

    #[test]
    fn foreign_ids_are_not_ours() {
        let one = generator(b"one");
        for bytes in [&[][..], &[1; 8], &[0; 16], &[1; 20]] {
            assert!(one.validate(&ConnectionId::new(bytes)).is_err());
        }
    }
}
