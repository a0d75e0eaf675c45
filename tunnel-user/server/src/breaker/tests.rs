//! The breaker in virtual time, and against what it promises over random dials.

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const SETTINGS: Settings = Settings {
    failures: 3,
    retry: Duration::from_secs(5),
    max_retry: Duration::from_secs(15),
};

fn breaker() -> (Breaker<u32>, Instant) {
    (Breaker::new(SETTINGS), Instant::now())
}

fn dial(breaker: &mut Breaker<u32>, key: u32, outcome: Outcome, now: Instant) -> Change {
    let pass = breaker.admit(&key, now).unwrap();
    breaker.settle(&key, pass, outcome, now)
}

fn opened() -> (Breaker<u32>, Instant) {
    let (mut breaker, now) = breaker();
    for change in [Change::None, Change::None, Change::Opened] {
        assert_eq!(dial(&mut breaker, 1, Outcome::TimedOut, now), change);
    }
    (breaker, now)
}

#[test]
fn it_opens_after_time_outs_in_a_row() {
    let (mut breaker, now) = breaker();
    for outcome in [Outcome::TimedOut, Outcome::TimedOut, Outcome::Answered] {
        assert_eq!(dial(&mut breaker, 1, outcome, now), Change::None);
    }
    assert!(breaker.is_empty(), "an answer forgets what was before");

    let (mut breaker, now) = opened();
    assert_eq!(breaker.open(), 1);
    let refused = breaker.admit(&1, now + SECOND).unwrap_err();
    assert_eq!((refused.failures, refused.wait), (3, 4 * SECOND));
    assert_eq!(
        breaker.admit(&2, now),
        Ok(Pass::Ordinary),
        "others are dialled"
    );
}

#[test]
fn one_probe_at_a_time_and_longer_waits() {
    let (mut breaker, mut now) = opened();
    for wait in [5, 10, 15, 15] {
        let until = now + wait * SECOND;
        assert!(breaker.admit(&1, until - SECOND).is_err());
        let probe = breaker.admit(&1, until).unwrap();
        assert!(matches!(probe, Pass::Probe(_)));
        let refused = breaker.admit(&1, until + SECOND).unwrap_err();
        assert_eq!(refused.wait, Duration::ZERO, "beside the probe");
        now = until + 2 * SECOND;
        let change = breaker.settle(&1, probe, Outcome::TimedOut, now);
        assert_eq!(change, Change::None);
    }
}

#[test]
fn a_probe_that_is_answered_closes_it() {
    let (mut breaker, now) = opened();
    let change = dial(&mut breaker, 1, Outcome::Answered, now + 5 * SECOND);
    assert_eq!(change, Change::Closed);
    assert!(breaker.is_empty());
}

#[test]
fn a_probe_that_tells_nothing_leaves_its_place_to_the_next() {
    let (mut breaker, now) = opened();
    let now = now + 5 * SECOND;
    assert_eq!(dial(&mut breaker, 1, Outcome::Unknown, now), Change::None);
    assert!(matches!(breaker.admit(&1, now), Ok(Pass::Probe(_))));
}

#[test]
fn dials_from_before_prolong_nothing_and_may_close_it() {
    let (mut breaker, now) = opened();
    let late = now + SECOND;
    let change = breaker.settle(&1, Pass::Ordinary, Outcome::TimedOut, late);
    assert_eq!(change, Change::None);
    let probe = breaker.admit(&1, now + 5 * SECOND);
    assert!(matches!(probe, Ok(Pass::Probe(_))));
    let change = breaker.settle(&1, Pass::Ordinary, Outcome::Answered, late);
    assert_eq!(change, Change::Closed);

    // It opens again: the former probe speaks for it no more.
    for _ in 0..SETTINGS.failures {
        dial(&mut breaker, 1, Outcome::TimedOut, late);
    }
    let now = late + 5 * SECOND;
    assert!(breaker.admit(&1, now).is_ok());
    breaker.settle(&1, probe.unwrap(), Outcome::Unknown, now);
    assert!(breaker.admit(&1, now).is_err(), "two probes");
}

#[test]
fn it_can_be_turned_off() {
    let settings = Settings {
        failures: 0,
        ..SETTINGS
    };
    let (mut breaker, now) = (Breaker::new(settings), Instant::now());
    for _ in 0..10 {
        assert_eq!(dial(&mut breaker, 1, Outcome::TimedOut, now), Change::None);
    }
    assert!(breaker.is_empty());
}

#[test]
fn whom_nobody_asks_for_is_forgotten() {
    let (mut breaker, now) = opened();
    breaker.expire(now + FORGET - SECOND);
    assert_eq!(breaker.open(), 1);
    breaker.expire(now + FORGET);
    assert!(breaker.is_empty());
}

#[test]
fn the_table_is_bounded_and_the_oldest_makes_room() {
    let (mut breaker, now) = breaker();
    for key in 0..2 * MAX_ENTRIES as u32 {
        dial(&mut breaker, key, Outcome::TimedOut, now + key * SECOND);
        assert!(breaker.entries.len() <= MAX_ENTRIES);
    }
    assert!(!breaker.entries.contains_key(&0));
    assert!(breaker.entries.contains_key(&(2 * MAX_ENTRIES as u32 - 1)));
}

#[derive(Clone, Debug)]
enum Step {
    Admit(u32),
    Settle(usize, Outcome),
    Wait(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        1 => Just(Outcome::Answered),
        4 => Just(Outcome::TimedOut),
        1 => Just(Outcome::Unknown),
    ];
    prop_oneof![
        4 => (0..3u32).prop_map(Step::Admit),
        4 => (any::<usize>(), outcome).prop_map(|(at, outcome)| Step::Settle(at, outcome)),
        1 => (0..8u32).prop_map(Step::Wait),
    ]
}

proptest! {
    /// Invariants of any history: at most one probe per destination is under way; no dial is refused
    /// before so many time-outs since the last answer; and once all dials are settled and the longest
    /// wait is over, every destination is dialled again.
    #[test]
    fn over_random_dials(steps in proptest::collection::vec(step(), 0..200)) {
        let (mut breaker, mut now) = breaker();
        let mut under_way: Vec<(u32, Pass)> = Vec::new();
        let mut time_outs = [0u32; 3];
        for step in steps {
            match step {
                Step::Wait(seconds) => now += seconds * SECOND,
                Step::Admit(key) => match breaker.admit(&key, now) {
                    Ok(pass) => {
                        let probe = |pass: &Pass| matches!(pass, Pass::Probe(_));
                        let other = under_way.iter().any(|(k, p)| *k == key && probe(p));
                        prop_assert!(!probe(&pass) || !other, "two probes");
                        under_way.push((key, pass));
                    }
                    Err(refused) => {
                        prop_assert!(time_outs[key as usize] >= SETTINGS.failures);
                        prop_assert!(refused.failures >= SETTINGS.failures);
                        prop_assert!(refused.wait <= SETTINGS.max_retry);
                    }
                },
                Step::Settle(at, outcome) if !under_way.is_empty() => {
                    let (key, pass) = under_way.swap_remove(at % under_way.len());
                    breaker.settle(&key, pass, outcome, now);
                    match outcome {
                        Outcome::Answered => {
                            time_outs[key as usize] = 0;
                            // What was under way before is ordinary from now on.
                            for (other, pass) in &mut under_way {
                                if *other == key {
                                    *pass = Pass::Ordinary;
                                }
                            }
                        }
                        Outcome::TimedOut => time_outs[key as usize] += 1,
                        Outcome::Unknown => {}
                    }
                }
                Step::Settle(..) => {}
            }
        }
        for (key, pass) in under_way {
            breaker.settle(&key, pass, Outcome::Unknown, now);
        }
        now += SETTINGS.max_retry;
        for key in 0..3 {
            prop_assert!(breaker.admit(&key, now).is_ok());
        }
    }
}
