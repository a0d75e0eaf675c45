use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + 500_000 * HOUR
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(n: u8) -> KeyHash {
    KeyHash::of_spki(&[n])
}

/// A book with one token, for an hour.
fn book(nodes: &str, addresses: &[&str], uses: u32) -> (Pages, Token) {
    let token = Token::generate().unwrap();
    let ticket = Ticket {
        digest: token.digest(),
        nodes: nodes.into(),
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        uses,
        expires: start() + HOUR,
        used: BTreeMap::new(),
    };
    let mut pages = Pages::default();
    pages.tokens.insert(token.id().into(), ticket);
    (pages, token)
}

fn issue(pages: &mut Pages, node: &str, addresses: &[IpAddr], key: KeyHash, now: SystemTime) {
    let holder = Holder {
        addresses: addresses.to_vec(),
        key: key.to_string(),
        serial: "01".into(),
        since: now,
        until: now + 10 * HOUR,
        token: "t".into(),
    };
    pages.record(node, holder);
}

fn join(
    pages: &mut Pages,
    token: &Token,
    (node, addr, n): (&str, &str, u8),
    now: SystemTime,
) -> Result<(), Refused> {
    let addresses = [address(addr)];
    let asked = Asked {
        node,
        addresses: &addresses,
        key: key(n),
    };
    pages.by_token(token, &asked, now)?;
    issue(pages, node, &addresses, key(n), now);
    Ok(())
}

#[test]
fn a_token_is_used_up_but_not_by_the_key_that_asks_again() {
    let (mut pages, token) = book("w*", &["10.99.0.0/16"], 2);
    let now = start();
    join(&mut pages, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    join(&mut pages, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    join(&mut pages, &token, ("w2", "10.99.0.2", 2), now).unwrap();
    let third = join(&mut pages, &token, ("w3", "10.99.0.3", 3), now);
    assert_eq!(third, Err(Refused::UsedUp));
    join(&mut pages, &token, ("w2", "10.99.0.2", 2), now).unwrap();
}

#[test]
fn strangers_learn_nothing_of_a_token() {
    let (mut pages, token) = book("w1", &["10.99.0.1/32"], 1);
    let w1 = ("w1", "10.99.0.1", 1);
    let other = Token::generate().unwrap();
    let same_id = format!("{}.{}", token.id(), &other.reveal()[9..]);
    for wrong in [other, same_id.parse().unwrap()] {
        let refused = join(&mut pages, &wrong, w1, start());
        assert_eq!(refused, Err(Refused::Token));
    }
    let late = join(&mut pages, &token, w1, start() + HOUR);
    assert_eq!(late, Err(Refused::Token));
    join(
        &mut pages,
        &token,
        w1,
        start() + HOUR - Duration::from_secs(1),
    )
    .unwrap();
    pages.tokens.clear();
    assert_eq!(join(&mut pages, &token, w1, start()), Err(Refused::Token));
}

#[test]
fn a_token_is_for_its_nodes_and_addresses() {
    let (mut pages, token) = book("pool-a-*", &["10.99.1.0/24", "fd00:1::/64"], 9);
    let mut refused = |node, addr| join(&mut pages, &token, (node, addr, 1), start()).unwrap_err();
    assert!(matches!(
        refused("pool-b-1", "10.99.1.1"),
        Refused::Node { .. }
    ));
    assert!(matches!(
        refused("pool-a-1/x", "10.99.1.1"),
        Refused::Name(_)
    ));
    let beyond = refused("pool-a-1", "10.99.2.1");
    assert_eq!(beyond, Refused::Address(address("10.99.2.1")));
    let beyond = refused("pool-a-1", "fd00:2::1");
    assert_eq!(beyond, Refused::Address(address("fd00:2::1")));
    join(&mut pages, &token, ("pool-a-1", "fd00:1::1", 1), start()).unwrap();
}

/// A token for many can't be used to become somebody who is there.
#[test]
fn names_and_addresses_are_given_away_by_name_only() {
    let (mut pages, token) = book("w*", &["10.99.0.0/16"], 9);
    let now = start();
    join(&mut pages, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    let name = join(&mut pages, &token, ("w1", "10.99.0.9", 2), now).unwrap_err();
    assert!(matches!(name, Refused::Taken { .. }), "{name}");
    let addr = join(&mut pages, &token, ("w2", "10.99.0.1", 2), now).unwrap_err();
    assert!(matches!(addr, Refused::AddressTaken { .. }), "{addr}");
    // When the certificate has ended, they are anybody's; the token has to live until then.
    let (mut later, renewed) = (pages.clone(), now + 10 * HOUR);
    later
        .tokens
        .values_mut()
        .for_each(|it| it.expires = now + 20 * HOUR);
    join(&mut later, &token, ("w1", "10.99.0.9", 2), renewed).unwrap();
    join(&mut later, &token, ("w2", "10.99.0.1", 3), renewed).unwrap();
    // A token that names them.
    let (exact, token) = book("w1", &["10.99.0.1/32"], 1);
    pages.tokens.extend(exact.tokens);
    join(&mut pages, &token, ("w1", "10.99.0.1", 7), now).unwrap();
    let (exact, token) = book("w2", &["10.99.0.1/32"], 1);
    pages.tokens.extend(exact.tokens);
    join(&mut pages, &token, ("w2", "10.99.0.1", 8), now).unwrap();
    // What moved is not renewed for the one who had it.
    let had = [address("10.99.0.1"), address("10.99.0.5")];
    assert_eq!(pages.still_of("w1", &had, now), [address("10.99.0.5")]);
    assert_eq!(pages.still_of("w2", &had, now), had);
}

#[test]
fn a_certificate_is_not_renewed_every_second() {
    let (mut pages, _) = book("w*", &[], 1);
    assert_eq!(pages.renewal("w1", start()), Ok(()));
    issue(&mut pages, "w1", &[], key(1), start());
    let second = Duration::from_secs(1);
    assert_eq!(
        pages.renewal("w1", start() + 59 * second),
        Err(Refused::TooSoon)
    );
    assert_eq!(pages.renewal("w1", start() + 60 * second), Ok(()));
}

#[test]
fn what_is_over_is_forgotten() {
    let (mut pages, token) = book("w*", &["10.99.0.0/16"], 9);
    join(&mut pages, &token, ("w1", "10.99.0.1", 1), start()).unwrap();
    pages.forget(start() + 24 * HOUR);
    assert!(pages.issued.is_empty() && pages.tokens.len() == 1);
    pages.forget(start() + 25 * HOUR);
    assert_eq!(pages, Pages::default());
}
