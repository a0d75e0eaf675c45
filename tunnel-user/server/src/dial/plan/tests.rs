use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, TestCaseError, any, prop_oneof, proptest};
use proptest::sample::{Index, select};
use proptest::{prop_assert, prop_assert_eq};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A link, known by its number.
#[derive(Clone, Debug)]
struct Link(u8);

impl Candidate for Link {
    type Id = u8;

    fn id(&self) -> u8 {
        self.0
    }
}

fn links(ids: &[u8]) -> Vec<Link> {
    ids.iter().copied().map(Link).collect()
}

/// The link to ask, its attempt number and the patience with it.
fn asked(plan: &mut Plan<Link, usize>, now: Instant) -> (u8, u8, Option<Duration>) {
    match plan.next(now) {
        Action::Ask(ask) => (ask.candidate.0, ask.attempt, ask.patience),
        other => panic!("{other:?}"),
    }
}

/// Anything that a driver may report, and the clock.
#[derive(Clone, Debug)]
enum Event {
    Found(Vec<u8>),
    NotFound,
    FirstByte,
    Suspicion,
    Connected,
    Failed(Failure),
    Time(Duration),
}

fn reason() -> impl Strategy<Value = CloseReason> {
    prop_oneof![
        any::<Index>().prop_map(|index| CloseReason::ALL[index.index(CloseReason::ALL.len())]),
        select(vec![
            CloseReason::Draining,
            CloseReason::DuplicateServer,
            CloseReason::Overloaded,
            CloseReason::LinkLost,
        ]),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let failure = prop_oneof![
        3 => Just(Failure::NotAsked),
        6 => reason().prop_map(Failure::Refused),
        6 => reason().prop_map(Failure::Lost),
        2 => Just(Failure::Abandoned),
        1 => Just(Failure::DeadlineOver),
        1 => Just(Failure::ClientGone),
        1 => Just(Failure::CircuitOpen),
    ];
    prop_oneof![
        8 => vec(0..8_u8, 0..6).prop_map(Event::Found),
        1 => Just(Event::NotFound),
        4 => Just(Event::FirstByte),
        2 => Just(Event::Suspicion),
        1 => Just(Event::Connected),
        6 => failure.prop_map(Event::Failed),
        1 => (0..20_000_u64).prop_map(|ms| Event::Time(Duration::from_millis(ms))),
    ]
}

/// Whether an agent says with this that it did not dial. Independent of [`Failure::may_retry`].
fn denies(failure: Failure) -> bool {
    match failure {
        Failure::Refused(reason) => (0x100..0x200).contains(&reason.code()),
        Failure::Lost(reason) => {
            [CloseReason::DuplicateServer, CloseReason::Draining].contains(&reason)
        }
        _ => false,
    }
}

/// The agents' side of a dial. A request may have run where a byte of the client's was sent and the
/// agent did not say that it did not dial; a connected one runs.
#[derive(Debug, Default)]
struct Agents {
    asked: Vec<u8>,
    /// The link that is being asked, and whether it was sent a byte of the client's.
    current: Option<(u8, bool)>,
    /// The last look-up.
    found: Vec<u8>,
    may_have_run: usize,
    last_error: Option<usize>,
    is_over: bool,
}

impl Agents {
    /// Checks the next step of the plan. Returns whether the plan has ended.
    fn check(&mut self, plan: &mut Plan<Link, usize>, now: Instant) -> Result<bool, TestCaseError> {
        match plan.next(now) {
            Action::LookUp => {
                prop_assert!(!self.is_over && self.current.is_none());
                prop_assert_eq!(self.may_have_run, 0, "a look-up after the request ran");
            }
            Action::Ask(ask) => {
                prop_assert!(!self.is_over);
                let id = ask.candidate.0;
                if let Some((current, _)) = self.current {
                    prop_assert_eq!(id, current);
                } else {
                    prop_assert_eq!(self.may_have_run, 0, "asked after the request ran");
                    prop_assert!(!self.asked.contains(&id), "{} was asked twice", id);
                    self.asked.push(id);
                    self.current = Some((id, false));
                }
                prop_assert!(self.asked.len() <= MAX_CANDIDATES, "{:?}", self.asked);
                let left = (plan.deadline()).saturating_duration_since(now);
                prop_assert_eq!(ask.time_left, left);
                let has_alternative = { self.found.iter() }.any(|id| !self.asked.contains(id));
                prop_assert_eq!(ask.patience, has_alternative.then_some(left / 3));
            }
            Action::GiveUp(error) => {
                prop_assert!(self.current.is_none());
                prop_assert_eq!(error, self.last_error.take());
                self.is_over = true;
            }
        }
        Ok(self.is_over)
    }

    /// Lets an event happen to the plan and, where it fits, to the agents.
    fn apply(
        &mut self,
        plan: &mut Plan<Link, usize>,
        event: Event,
        (serial, now): (usize, &mut Instant),
    ) -> Result<(), TestCaseError> {
        let looks_up = !self.is_over && self.current.is_none();
        match event {
            Event::Found(ids) => {
                plan.found(Ok(links(&ids)));
                if looks_up {
                    self.found = ids;
                }
            }
            Event::NotFound => {
                plan.found(Err(serial));
                if looks_up {
                    self.last_error.get_or_insert(serial);
                }
            }
            Event::FirstByte => {
                plan.first_byte();
                if let Some((_, sent)) = &mut self.current {
                    *sent = true;
                }
            }
            Event::Suspicion => {
                if plan.may_abandon() {
                    prop_assert!(matches!(self.current, Some((_, false))));
                    let failed = Event::Failed(Failure::Abandoned);
                    return self.apply(plan, failed, (serial, now));
                }
            }
            Event::Connected => {
                plan.connected();
                if self.current.take().is_some() {
                    self.may_have_run += 1;
                    self.last_error = None;
                }
            }
            Event::Failed(failure) => {
                let goes_on = plan.failed(failure, serial).is_some();
                if let Some((_, sent)) = self.current.take() {
                    self.may_have_run += usize::from(sent && !denies(failure));
                    self.last_error = Some(serial);
                } else {
                    prop_assert!(!goes_on);
                }
            }
            Event::Time(passed) => *now += passed,
        }
        Ok(())
    }
}

proptest! {
    /// Over any events, in any order and at any time, fitting or not: a request may run at most once,
    /// no candidate is asked twice, at most [`MAX_CANDIDATES`] are asked, and the dial ends.
    #[test]
    fn a_request_runs_at_most_once(events in vec(event(), 0..60)) {
        let mut now = Instant::now();
        let mut plan = Plan::new(now + TIMEOUT);
        let mut agents = Agents::default();
        let mut serial = 0;
        for event in events {
            agents.check(&mut plan, now)?;
            agents.apply(&mut plan, event, (serial, &mut now))?;
            serial += 1;
        }
        // Fresh candidates that refuse: the events that keep a plan going for the longest time.
        for fresh in 0..2 * MAX_CANDIDATES + 2 {
            if agents.check(&mut plan, now)? {
                break;
            }
            let event = match agents.current {
                None => Event::Found(vec![100 + fresh as u8, 200]),
                Some(_) => Event::Failed(Failure::Refused(CloseReason::Overloaded)),
            };
            agents.apply(&mut plan, event, (serial, &mut now))?;
            serial += 1;
        }
        prop_assert!(agents.check(&mut plan, now)?, "the plan does not end: {:?}", plan);
        prop_assert!(agents.may_have_run <= 1);
    }
}

#[test]
fn another_candidate_is_asked_only_while_the_request_cannot_have_run() {
    use Failure::*;
    let always = [
        Refused(CloseReason::Overloaded),
        Refused(CloseReason::PolicyDenied),
        Lost(CloseReason::Draining),
        Lost(CloseReason::DuplicateServer),
    ];
    let before_the_first_byte = [
        NotAsked,
        Abandoned,
        Lost(CloseReason::LinkLost),
        Lost(CloseReason::ProtocolError),
    ];
    let never = [
        Refused(CloseReason::ConnectionRefused),
        Refused(CloseReason::DialTimeout),
        DeadlineOver,
        ClientGone,
        CircuitOpen,
    ];
    let cases = { always.map(|failure| (failure, [true, true])).into_iter() }
        .chain(before_the_first_byte.map(|failure| (failure, [true, false])))
        .chain(never.map(|failure| (failure, [false, false])));
    for (failure, expected) in cases {
        for (sent, expected) in [false, true].into_iter().zip(expected) {
            let now = Instant::now();
            let mut plan = Plan::new(now + TIMEOUT);
            plan.found(Ok(links(&[1, 2])));
            assert_eq!(asked(&mut plan, now).0, 1);
            if sent {
                plan.first_byte();
            }
            assert_eq!(plan.may_abandon(), !sent);
            let goes_on = plan.failed(failure, 7) == Some(&7);
            assert_eq!(goes_on, expected, "{failure:?}, sent: {sent}");
            match plan.next(now) {
                Action::LookUp => assert!(expected),
                Action::GiveUp(error) => assert_eq!((error, expected), (Some(7), false)),
                Action::Ask(ask) => panic!("{ask:?}"),
            }
        }
    }
}

/// A limit keeps a request back, so the attempt number does not count it.
#[test]
fn attempts_count_requests() {
    let now = Instant::now();
    let mut plan = Plan::new(now + TIMEOUT);
    plan.found(Ok(links(&[1, 2, 3])));
    assert_eq!(asked(&mut plan, now), (1, 0, Some(TIMEOUT / 3)));
    plan.failed(Failure::NotAsked, 1);
    plan.found(Ok(links(&[1, 2, 3])));
    let later = now + Duration::from_secs(15);
    assert_eq!(asked(&mut plan, later), (2, 0, Some(TIMEOUT / 6)));
    plan.failed(Failure::Lost(CloseReason::LinkLost), 2);
    plan.found(Ok(links(&[1, 2, 3])));
    // Nothing is gained by impatience with the last one.
    assert_eq!(asked(&mut plan, later), (3, 1, None));
    let alternatives = plan.alternatives().unwrap();
    assert_eq!(
        [1, 2, 3, 4].map(|id| alternatives.contains(&id)),
        [false, false, false, true]
    );
    plan.failed(Failure::Abandoned, 3);
    plan.found(Ok(links(&[4, 5])));
    assert_eq!(
        asked(&mut plan, now + 2 * TIMEOUT),
        (4, 2, Some(Duration::ZERO))
    );
    assert!(plan.alternatives().is_none() && !plan.may_abandon());
    assert!(
        plan.failed(Failure::Refused(CloseReason::Overloaded), 4)
            .is_none()
    );
    assert!(matches!(plan.next(now), Action::GiveUp(Some(4))));
}

#[test]
fn the_last_failure_says_more_than_an_empty_look_up() {
    let now = Instant::now();
    let mut plan = Plan::<Link, usize>::new(now + TIMEOUT);
    plan.found(Err(1));
    assert!(matches!(plan.next(now), Action::GiveUp(Some(1))));

    let mut plan = Plan::new(now + TIMEOUT);
    plan.found(Ok(links(&[1])));
    plan.failed(Failure::Lost(CloseReason::LinkLost), 1);
    plan.found(Err(2));
    assert!(matches!(plan.next(now), Action::GiveUp(Some(1))));
}
