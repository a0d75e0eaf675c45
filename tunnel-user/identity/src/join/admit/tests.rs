use super::super::issue_records::{Holder, Ticket};
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

/// Records with one token, for an hour.
fn log(nodes: &str, addresses: &[&str], uses: u32) -> (IssueRecords, Token) {
    let token = Token::generate().unwrap();
    let ticket = Ticket {
        digest: token.digest(),
        nodes: nodes.into(),
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        uses,
        created: Some(start()),
        expires: start() + HOUR,
        used: Vec::new(),
    };
    let mut records = IssueRecords::default();
    records.tokens.insert(token.id().into(), ticket);
    (records, token)
}

/// Issues to `request` at that time. The serial number is one more than that of the earlier
/// certificate.
fn issue(records: &mut IssueRecords, request: &AdmitRequest<'_>, now: SystemTime) -> Holder {
    let holder = Holder {
        addresses: request.addresses.to_vec(),
        key: request.key.to_string(),
        serial: format!("{:02X}", records.holders().count() + 1),
        since: now,
        until: now + 10 * HOUR,
        token: "t".into(),
    };
    records.joined(request.node, holder.clone(), Time::of(now));
    holder
}

fn got(request: &AdmitRequest<'_>, holder: &Holder) -> Use {
    Use {
        node: request.node.into(),
        key: holder.key.clone(),
        addresses: holder.addresses.clone(),
        serial: holder.serial.clone(),
        certificate: STANDARD.encode(&holder.serial),
    }
}

/// Returns the serial number of the resulting certificate.
fn join(
    records: &mut IssueRecords,
    token: &Token,
    (node, addr, n): (&str, &str, u8),
    now: SystemTime,
) -> Result<String, Refusal> {
    let addresses: Vec<_> = addr.split(' ').map(address).collect();
    let request = AdmitRequest {
        node,
        addresses: &addresses,
        key: key(n),
    };
    match records.by_token(token, &request, Time::of(now))? {
        Admitted::First => {
            let holder = issue(records, &request, now);
            records.used(token, got(&request, &holder));
            Ok(holder.serial)
        }
        Admitted::Existing(der) => Ok(String::from_utf8(der).unwrap()),
        Admitted::Redated => {
            let holder = issue(records, &request, now);
            records.redated(token, got(&request, &holder));
            Ok(holder.serial)
        }
    }
}

#[test]
fn a_token_is_used_up_but_not_by_the_key_that_asks_again() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 2);
    let now = start();
    let first = join(&mut records, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    let again = join(&mut records, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    assert_eq!(again, first);
    join(&mut records, &token, ("w2", "10.99.0.2", 2), now).unwrap();
    let third = join(&mut records, &token, ("w3", "10.99.0.3", 3), now);
    assert_eq!(third, Err(Refusal::UsedUp));
    join(&mut records, &token, ("w2", "10.99.0.2", 2), now).unwrap();
    assert_eq!(records.holders().count(), 2);
}

/// A repeated request gets the earlier certificate and nothing else: no other addresses, no other
/// name, and no certificate after its end.
#[test]
fn asking_again_gives_nothing_more() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 1);
    let now = start();
    let both = "10.99.0.1 10.99.0.2";
    let first = join(&mut records, &token, ("w1", both, 1), now).unwrap();
    let turned = join(
        &mut records,
        &token,
        ("w1", "10.99.0.2 10.99.0.1 10.99.0.1", 1),
        now,
    );
    assert_eq!(turned.unwrap(), first);
    for addr in ["10.99.0.3", "10.99.0.1", "10.99.0.1 10.99.0.2 10.99.0.3"] {
        let other = join(&mut records, &token, ("w1", addr, 1), now).unwrap_err();
        assert!(
            matches!(other, Refusal::Otherwise { .. }),
            "{addr}: {other}"
        );
    }
    let name = join(&mut records, &token, ("w2", "10.99.0.3", 1), now);
    assert_eq!(name, Err(Refusal::UsedUp));
    assert_eq!(records.holders().count(), 1);
    for ticket in records.tokens.values_mut() {
        ticket.expires = now + 20 * HOUR;
    }
    let late = join(&mut records, &token, ("w1", both, 1), now + 10 * HOUR);
    assert_eq!(late, Err(Refusal::Ended));
}

/// Keys that take turns with one name use the token up all the same.
#[test]
fn a_key_in_between_makes_no_use_free() {
    let (mut records, token) = log("w1", &["10.99.0.1/32"], 2);
    let now = start();
    let by = |records: &mut IssueRecords, n| join(records, &token, ("w1", "10.99.0.1", n), now);
    let first = by(&mut records, 1).unwrap();
    by(&mut records, 2).unwrap();
    assert_eq!(by(&mut records, 3), Err(Refusal::UsedUp));
    assert_eq!(by(&mut records, 1).unwrap(), first);
}

#[test]
fn a_token_of_kubernetes_gives_one_certificate() {
    let mut records = IssueRecords::default();
    let now = start();
    let addresses = [address("10.99.0.1")];
    let allowed = ["10.99.0.0/16".parse().unwrap()];
    let request = |n| AdmitRequest {
        node: "w1",
        addresses: &addresses,
        key: key(n),
    };
    let by_pod =
        |records: &IssueRecords, id, n| records.by_pod(id, &allowed, &request(n), Time::of(now));
    assert_eq!(by_pod(&records, "a", 1), Ok(Admitted::First));
    let holder = issue(&mut records, &request(1), now);
    let ticket = super::super::issue_records::PodTicket {
        expires: now + HOUR,
        used: got(&request(1), &holder),
    };
    records.pods.insert("a".into(), ticket);
    let again = Admitted::Existing(holder.serial.clone().into());
    assert_eq!(by_pod(&records, "a", 1), Ok(again));
    assert_eq!(by_pod(&records, "a", 2), Err(Refusal::PodUsedUp));
    // The next token, of another pod: the name is its own, and the one before is renewed no more.
    assert_eq!(by_pod(&records, "b", 2), Ok(Admitted::First));
    issue(&mut records, &request(2), now);
    let hours = 10 * HOUR;
    let before = records.renewal("w1", &holder.serial, hours, Time::of(now + HOUR));
    assert_eq!(before, Err(Refusal::Replaced("w1".into())));
    // No address is its own because the configuration names it.
    let one = ["10.99.0.1/32".parse().unwrap()];
    let w2 = AdmitRequest {
        node: "w2",
        ..request(3)
    };
    let taken = records.by_pod("c", &one, &w2, Time::of(now)).unwrap_err();
    assert!(matches!(taken, Refusal::AddressTaken { .. }), "{taken}");
    let beyond = records.by_pod("c", &[], &w2, Time::of(now));
    assert_eq!(beyond, Err(Refusal::PodAddress(addresses[0])));
}

#[test]
fn strangers_learn_nothing_of_a_token() {
    let (mut records, token) = log("w1", &["10.99.0.1/32"], 1);
    let w1 = ("w1", "10.99.0.1", 1);
    let other = Token::generate().unwrap();
    let same_id = format!("{}.{}", token.id(), &other.reveal()[9..]);
    for wrong in [other, same_id.parse().unwrap()] {
        let refused = join(&mut records, &wrong, w1, start());
        assert_eq!(refused, Err(Refusal::Token));
    }
    let late = join(&mut records, &token, w1, start() + HOUR);
    assert_eq!(late, Err(Refusal::Token));
    join(
        &mut records,
        &token,
        w1,
        start() + HOUR - Duration::from_secs(1),
    )
    .unwrap();
    records.tokens.clear();
    assert_eq!(join(&mut records, &token, w1, start()), Err(Refusal::Token));
}

#[test]
fn a_token_is_for_its_nodes_and_addresses() {
    let (mut records, token) = log("pool-a-*", &["10.99.1.0/24", "fd00:1::/64"], 9);
    let mut refused =
        |node, addr| join(&mut records, &token, (node, addr, 1), start()).unwrap_err();
    assert!(matches!(
        refused("pool-b-1", "10.99.1.1"),
        Refusal::Node { .. }
    ));
    assert!(matches!(
        refused("pool-a-1/x", "10.99.1.1"),
        Refusal::Name(_)
    ));
    let beyond = refused("pool-a-1", "10.99.2.1");
    assert_eq!(beyond, Refusal::Address(address("10.99.2.1")));
    let beyond = refused("pool-a-1", "fd00:2::1");
    assert_eq!(beyond, Refusal::Address(address("fd00:2::1")));
    join(&mut records, &token, ("pool-a-1", "fd00:1::1", 1), start()).unwrap();
}

/// A token for many nodes can't take over an existing node.
#[test]
fn names_and_addresses_are_given_away_by_name_only() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 9);
    let now = start();
    join(&mut records, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    let name = join(&mut records, &token, ("w1", "10.99.0.9", 2), now).unwrap_err();
    assert!(matches!(name, Refusal::Taken { .. }), "{name}");
    let addr = join(&mut records, &token, ("w2", "10.99.0.1", 2), now).unwrap_err();
    assert!(matches!(addr, Refusal::AddressTaken { .. }), "{addr}");
    // When the certificate has ended, they are free; the token has to live until then.
    let (mut later, renewed) = (records.clone(), now + 10 * HOUR);
    later
        .tokens
        .values_mut()
        .for_each(|it| it.expires = now + 20 * HOUR);
    join(&mut later, &token, ("w1", "10.99.0.9", 2), renewed).unwrap();
    join(&mut later, &token, ("w2", "10.99.0.1", 3), renewed).unwrap();
    // A token that names them.
    let (exact, token) = log("w1", &["10.99.0.1/32"], 1);
    records.tokens.extend(exact.tokens);
    join(&mut records, &token, ("w1", "10.99.0.1", 7), now).unwrap();
    let (exact, token) = log("w2", &["10.99.0.1/32"], 1);
    records.tokens.extend(exact.tokens);
    join(&mut records, &token, ("w2", "10.99.0.1", 8), now).unwrap();
    // What moved is not renewed for the one who had it.
    let had = [address("10.99.0.1"), address("10.99.0.5")];
    let time = Time::of(now);
    assert_eq!(records.still_of("w1", &had, time), [address("10.99.0.5")]);
    assert_eq!(records.still_of("w2", &had, time), had);
    // All of them are on record.
    assert_eq!(records.holders().count(), 3);
}

fn renewed(records: &mut IssueRecords, node: &str, n: u8, now: SystemTime) -> Result<(), Refusal> {
    records.renewal(node, "", 300 * HOUR, Time::of(now))?;
    let holder = Holder {
        addresses: Vec::new(),
        key: key(n).to_string(),
        serial: format!("{n:02X}"),
        since: now,
        until: now + 300 * HOUR,
        token: "t".into(),
    };
    records.record(node, holder);
    Ok(())
}

#[test]
fn a_certificate_is_not_renewed_every_second() {
    let mut records = IssueRecords::default();
    let second = Duration::from_secs(1);
    assert_eq!(renewed(&mut records, "w1", 1, start()), Ok(()));
    let soon = renewed(&mut records, "w1", 2, start() + 59 * second);
    assert_eq!(soon, Err(Refusal::TooSoon(60 * second)));
    // Eight may be had like that, as after answers that were lost; then a thirtieth of a life lies between.
    for n in 1..8 {
        let now = start() + u32::from(n) * 60 * second;
        assert_eq!(renewed(&mut records, "w1", 1 + n, now), Ok(()));
    }
    let last = start() + 7 * 60 * second;
    let many = renewed(&mut records, "w1", 9, last + 9 * HOUR);
    assert_eq!(many, Err(Refusal::TooSoon(10 * HOUR)));
    assert_eq!(renewed(&mut records, "w1", 9, last + 10 * HOUR), Ok(()));
}

#[test]
fn what_is_over_is_forgotten() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 9);
    join(&mut records, &token, ("w1", "10.99.0.1", 1), start()).unwrap();
    records.release("01");
    records.forget(start() + 24 * HOUR);
    assert!(records.issued.is_empty() && records.released.is_empty() && records.tokens.len() == 1);
    records.forget(start() + 25 * HOUR);
    assert_eq!(records, IssueRecords::default());
}

/// The clock is sixty days ahead for some seconds. Names stay with their holders, certificates
/// issued meanwhile do not block a renewal, and a useless certificate is issued again.
#[test]
fn a_clock_that_is_ahead_for_seconds_takes_nothing_from_anybody() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 2);
    let (now, ahead) = (start(), start() + 60 * 24 * HOUR);
    join(&mut records, &token, ("w1", "10.99.0.1", 1), now).unwrap();
    let stepped = Time {
        now: ahead,
        settled: now,
        is_steady: false,
    };
    assert!(records.name_holder("w1", "another", stepped).is_some());
    let held = [address("10.99.0.1")];
    assert!(records.still_of("w2", &held, stepped).is_empty());

    renewed(&mut records, "w1", 9, ahead).unwrap();
    assert_eq!(renewed(&mut records, "w1", 10, now + HOUR), Ok(()));

    let addresses = [address("10.99.0.2")];
    let request = AdmitRequest {
        node: "w2",
        addresses: &addresses,
        key: key(2),
    };
    let dated_ahead = issue(&mut records, &request, ahead);
    records.used(&token, got(&request, &dated_ahead));
    let again = join(&mut records, &token, ("w2", "10.99.0.2", 2), now).unwrap();
    assert_ne!(again, dated_ahead.serial);
    let once_more = join(&mut records, &token, ("w2", "10.99.0.2", 2), now).unwrap();
    assert_eq!(once_more, again);
    assert_eq!(records.tokens[token.id()].uses, 0);
}

/// The certificate of a clock that was ahead is revoked or released, or another node holds its
/// addresses: its replacement is decided like any other.
#[test]
fn a_certificate_is_not_dated_anew_for_who_lost_it() {
    let (now, ahead) = (start(), start() + 60 * 24 * HOUR);
    let w1 = ("w1", "10.99.0.1", 1);
    let dated_ahead = |nodes: &str| {
        let (mut records, token) = log(nodes, &["10.99.0.0/16"], 2);
        let addresses = [address("10.99.0.1")];
        let request = AdmitRequest {
            node: "w1",
            addresses: &addresses,
            key: key(1),
        };
        let holder = issue(&mut records, &request, ahead);
        records.used(&token, got(&request, &holder));
        (records, token, holder)
    };
    let (mut records, token, _) = dated_ahead("w*");
    assert!(join(&mut records, &token, w1, now).is_ok());

    let (mut records, token, holder) = dated_ahead("w*");
    records.release(&holder.serial);
    assert_eq!(join(&mut records, &token, w1, now), Err(Refusal::Ended));

    // Also with a token that names the node, which takes the name from its holder.
    let (mut records, token, holder) = dated_ahead("w1");
    records.release_address(&holder.serial, address("10.99.0.1"));
    assert_eq!(join(&mut records, &token, w1, now), Err(Refusal::Ended));

    let (mut records, token, holder) = dated_ahead("w*");
    let by_hand = Holder {
        serial: "4A".into(),
        since: now,
        ..holder
    };
    records.by_hand.insert("w8".into(), vec![by_hand]);
    let taken = join(&mut records, &token, w1, now).unwrap_err();
    assert!(matches!(taken, Refusal::AddressTaken { .. }), "{taken}");
}

/// A node was removed, and another one was installed again.
#[test]
fn what_is_released_others_may_have() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 9);
    let now = start();
    let w1 = join(&mut records, &token, ("w1", "10.99.0.1 10.99.0.2", 1), now).unwrap();
    let second = |records: &mut IssueRecords, addr| join(records, &token, ("w2", addr, 2), now);
    assert!(second(&mut records, "10.99.0.1").is_err());
    records.release_address(&w1, address("10.99.0.1"));
    second(&mut records, "10.99.0.1").unwrap();
    let kept = join(&mut records, &token, ("w3", "10.99.0.2", 3), now).unwrap_err();
    assert!(matches!(kept, Refusal::AddressTaken { .. }), "{kept}");
    let name = join(&mut records, &token, ("w1", "10.99.0.9", 4), now).unwrap_err();
    assert!(matches!(name, Refusal::Taken { .. }), "{name}");
    records.release(&w1);
    // Who is there all the same may go on, until another has come.
    let later = Time::of(now + HOUR);
    assert_eq!(records.renewal("w1", &w1, 10 * HOUR, later), Ok(()));
    join(&mut records, &token, ("w1", "10.99.0.2", 4), now).unwrap();
    let replaced = records.renewal("w1", &w1, 10 * HOUR, later);
    assert_eq!(replaced, Err(Refusal::Replaced("w1".into())));
}

/// Certificates of `cpc pki` count as issued here.
#[test]
fn a_certificate_that_was_issued_by_hand_keeps_its_name_and_address() {
    let (mut records, token) = log("w*", &["10.99.0.0/16"], 9);
    let (mut other, _) = log("w*", &[], 1);
    let addresses = [address("10.99.0.1")];
    let request = AdmitRequest {
        node: "w1",
        addresses: &addresses,
        key: key(1),
    };
    issue(&mut other, &request, start());
    records.by_hand = other.issued;
    let name = join(&mut records, &token, ("w1", "10.99.0.2", 2), start()).unwrap_err();
    assert!(matches!(name, Refusal::Taken { .. }), "{name}");
    let addr = join(&mut records, &token, ("w2", "10.99.0.1", 2), start()).unwrap_err();
    assert!(matches!(addr, Refusal::AddressTaken { .. }), "{addr}");
    records.release("01");
    join(&mut records, &token, ("w2", "10.99.0.1", 2), start()).unwrap();
}
