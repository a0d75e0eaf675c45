//! Connects to one of several addresses: the next one is tried while those before it are silent (RFC
//! 8305, "Happy Eyeballs"), and the last successful one comes first the next time.
//!
//! Only connects race. The losers are closed before a byte was sent.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep};

/// Delay before the next address is tried as well (RFC 8305 section 5 recommends 250 ms).
const DELAY: Duration = Duration::from_millis(250);

/// Maximum number of concurrent connects. Each takes a file descriptor.
const AT_ONCE: usize = 8;

/// Time for which a successful address is remembered (RFC 8305 section 4 has 10 minutes).
const REMEMBERED: Duration = Duration::from_secs(600);

/// Maximum number of remembered names.
const MAX_NAMES: usize = 1024;

/// Opens a connection to the first of `addresses` that answers.
///
/// # Errors
/// The last failure, with its address; `None` without any address.
pub(super) async fn race<T, F>(
    addresses: &[SocketAddr],
    open: impl Fn(SocketAddr) -> F,
) -> Result<(SocketAddr, T), Option<(SocketAddr, io::Error)>>
where
    F: Future<Output = io::Result<T>>,
{
    let mut waiting = addresses.iter().copied();
    let mut under_way = FuturesUnordered::new();
    let mut last = None;
    let mut start_next = true;
    loop {
        if start_next
            && under_way.len() < AT_ONCE
            && let Some(address) = waiting.next()
        {
            let opened = open(address);
            under_way.push(async move { (address, opened.await) });
        }
        let may_start = waiting.len() > 0 && under_way.len() < AT_ONCE;
        start_next = tokio::select! {
            biased;
            ended = under_way.next() => match ended {
                Some((address, Ok(opened))) => return Ok((address, opened)),
                Some((address, Err(error))) => {
                    last = Some((address, error));
                    true
                }
                None => return Err(last),
            },
            () = sleep(DELAY), if may_start => true,
        };
    }
}

/// Address of a name that answered, where it was not the first.
#[derive(Debug, Default)]
pub(super) struct AnsweredAddresses(Mutex<HashMap<String, (IpAddr, Instant)>>);

impl AnsweredAddresses {
    /// Returns the order in which the addresses of `name` are tried: the one that answered the last
    /// time, then the resolver's order with its families in turn (RFC 8305 section 4).
    pub(super) fn order(
        &self,
        name: &str,
        addresses: &[SocketAddr],
        now: Instant,
    ) -> Vec<SocketAddr> {
        let remembered = self.lock().get(name).copied();
        let remembered = remembered.filter(|(_, since)| now.duration_since(*since) < REMEMBERED);
        let mut ordered = in_turn(addresses);
        if let Some((ip, _)) = remembered {
            // Stable: the others keep their order.
            ordered.sort_by_key(|address| address.ip() != ip);
        }
        ordered
    }

    /// Notes which of the `addresses` of `name` has answered.
    pub(super) fn note(
        &self,
        name: &str,
        addresses: &[SocketAddr],
        answered: IpAddr,
        now: Instant,
    ) {
        let mut names = self.lock();
        if addresses.first().is_none_or(|first| first.ip() == answered) {
            names.remove(name);
            return;
        }
        if names.len() >= MAX_NAMES && !names.contains_key(name) {
            names.retain(|_, (_, since)| now.duration_since(*since) < REMEMBERED);
            if names.len() >= MAX_NAMES {
                return;
            }
        }
        names.insert(name.to_owned(), (answered, now));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (IpAddr, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns one address of each family in turn, beginning with the first one's; each address once.
pub(super) fn in_turn(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let Some(first) = addresses.first() else {
        return Vec::new();
    };
    let is_first_family = |address: &&SocketAddr| address.is_ipv4() == first.is_ipv4();
    let mut own = addresses.iter().filter(is_first_family);
    let mut other = addresses.iter().filter(|address| !is_first_family(address));
    let mut ordered: Vec<SocketAddr> = Vec::with_capacity(addresses.len());
    loop {
        let pair = [own.next(), other.next()];
        if pair == [None, None] {
            return ordered;
        }
        for address in pair.into_iter().flatten() {
            if !ordered.contains(address) {
                ordered.push(*address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn numbered(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 1))
    }

    /// Fails at once at even numbers, is silent at 1 and 3, and answers elsewhere.
    async fn open(address: SocketAddr) -> io::Result<u8> {
        let IpAddr::V4(ip) = address.ip() else {
            return Err(io::ErrorKind::Other.into());
        };
        match ip.octets()[3] {
            1 | 3 => std::future::pending().await,
            n if n % 2 == 0 => Err(io::ErrorKind::ConnectionRefused.into()),
            n => Ok(n),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_holds_up_the_next_for_a_moment_only() {
        let start = Instant::now();
        let (address, n) = race(&[1, 3, 5, 7].map(numbered), open).await.unwrap();
        assert_eq!((address, n), (numbered(5), 5));
        assert_eq!(start.elapsed(), 2 * DELAY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_followed_at_once() {
        let start = Instant::now();
        assert_eq!(race(&[2, 4, 5].map(numbered), open).await.unwrap().1, 5);
        assert_eq!(start.elapsed(), Duration::ZERO);
        let (address, error) = race(&[2, 4].map(numbered), open)
            .await
            .unwrap_err()
            .unwrap();
        assert_eq!(address, numbered(4));
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(race(&[], open).await.unwrap_err().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_some_are_under_way() {
        let started = RefCell::new(0);
        let silent = |_| {
            *started.borrow_mut() += 1;
            std::future::pending::<io::Result<()>>()
        };
        let many: Vec<_> = (0..100).map(numbered).collect();
        let raced = tokio::time::timeout(Duration::from_secs(60), race(&many, silent)).await;
        assert!(raced.is_err());
        assert_eq!(*started.borrow(), AT_ONCE);
    }

    #[test]
    fn what_answered_comes_first_and_families_take_turns() {
        let (answered, now) = (AnsweredAddresses::default(), Instant::now());
        let addresses = [
            "[2001:db8::1]:1",
            "[2001:db8::2]:1",
            "192.0.2.1:1",
            "192.0.2.1:1",
        ]
        .map(at);
        let order = |now| answered.order("x", &addresses, now);
        let resolved = ["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1"].map(at);
        assert_eq!(order(now), resolved);
        answered.note("x", &addresses, addresses[2].ip(), now);
        let expected = ["192.0.2.1:1", "[2001:db8::1]:1", "[2001:db8::2]:1"].map(at);
        assert_eq!(order(now), expected);
        assert_eq!(answered.order("y", &addresses, now), resolved);
        assert_eq!(order(now + REMEMBERED), resolved);
        answered.note("x", &addresses, addresses[0].ip(), now);
        assert_eq!(order(now), resolved);
    }

    #[test]
    fn names_are_remembered_within_a_bound() {
        let (answered, now) = (AnsweredAddresses::default(), Instant::now());
        let addresses = [numbered(1), numbered(2)];
        for n in 0..2 * MAX_NAMES {
            answered.note(&n.to_string(), &addresses, addresses[1].ip(), now);
        }
        assert_eq!(answered.lock().len(), MAX_NAMES);
        answered.note("late", &addresses, addresses[1].ip(), now + REMEMBERED);
        assert_eq!(answered.lock().len(), 1);
    }
}
