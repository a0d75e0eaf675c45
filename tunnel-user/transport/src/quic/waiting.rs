//! Tasks that wait for events of one stream: one task for all events, as a rule.

use std::task::Waker;

/// Event of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) enum Interest {
    /// Bytes, the end of them, or a reset.
    Read,
    /// Credit.
    Write,
    /// The end of the sending half.
    Ended,
}

impl Interest {
    const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Ended];

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Waiting tasks. Each stream of a tunnel has one of these, so it is small.
#[derive(Debug)]
pub(super) enum Waiting {
    /// One task, which is kept while it waits for nothing: it will again.
    One(Waker, u8),
    /// Several tasks.
    Several(Box<[Option<Waker>; 3]>),
}

impl Waiting {
    /// Creates the entry of one task.
    pub(super) fn new(interest: Interest, waker: &Waker) -> Self {
        Self::One(waker.clone(), interest.bit())
    }

    /// Adds a task.
    pub(super) fn add(&mut self, interest: Interest, waker: &Waker) {
        match self {
            Self::One(one, interests) if one.will_wake(waker) => *interests |= interest.bit(),
            Self::One(_, interests) if *interests & !interest.bit() == 0 => {
                *self = Self::new(interest, waker);
            }
            Self::One(one, interests) => {
                let of_one = |it: Interest| (*interests & it.bit() != 0).then(|| one.clone());
                let mut wakers = Interest::ALL.map(of_one);
                wakers[interest as usize] = Some(waker.clone());
                *self = Self::Several(Box::new(wakers));
            }
            Self::Several(wakers) => wakers[interest as usize] = Some(waker.clone()),
        }
    }

    /// Whether `waker` waits for the event.
    pub(super) fn is_for(&self, interest: Interest, waker: &Waker) -> bool {
        match self {
            Self::One(one, interests) => *interests & interest.bit() != 0 && one.will_wake(waker),
            Self::Several(wakers) => {
                let registered = wakers[interest as usize].as_ref();
                registered.is_some_and(|registered| registered.will_wake(waker))
            }
        }
    }

    /// Removes the task that waits for the event. Returns whether no task is left.
    pub(super) fn remove(&mut self, interest: Interest) -> bool {
        match self {
            Self::One(_, interests) => {
                *interests &= !interest.bit();
                *interests == 0
            }
            Self::Several(wakers) => {
                wakers[interest as usize] = None;
                wakers.iter().all(Option::is_none)
            }
        }
    }

    /// Wakes and removes the task that waits for the event.
    pub(super) fn wake(&mut self, interest: Interest) {
        match self {
            Self::One(one, interests) => {
                if *interests & interest.bit() != 0 {
                    *interests &= !interest.bit();
                    one.wake_by_ref();
                }
            }
            Self::Several(wakers) => {
                if let Some(waker) = wakers[interest as usize].take() {
                    waker.wake();
                }
            }
        }
    }

    /// Wakes all tasks.
    pub(super) fn end(self) {
        match self {
            Self::One(_, 0) => {}
            Self::One(one, _) => one.wake(),
            Self::Several(wakers) => wakers.into_iter().flatten().for_each(Waker::wake),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Task {
        fn waker(self: &Arc<Self>) -> Waker {
            self.clone().into()
        }

        fn woken(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn one_task_is_woken_for_what_it_waits_for_once() {
        let task = Arc::<Task>::default();
        let mut waiting = Waiting::new(Interest::Read, &task.waker());
        waiting.wake(Interest::Write);
        assert_eq!(task.woken(), 0);
        waiting.add(Interest::Ended, &task.waker());
        waiting.wake(Interest::Read);
        waiting.wake(Interest::Read);
        assert_eq!(task.woken(), 1);
        assert!(!waiting.is_for(Interest::Read, &task.waker()));
        assert!(waiting.is_for(Interest::Ended, &task.waker()));
        assert!(waiting.remove(Interest::Ended));
        waiting.end();
        assert_eq!(task.woken(), 1);
    }

    #[test]
    fn several_tasks_are_told_apart() {
        let (reader, writer) = (Arc::<Task>::default(), Arc::<Task>::default());
        let mut waiting = Waiting::new(Interest::Read, &reader.waker());
        waiting.add(Interest::Write, &writer.waker());
        assert!(waiting.is_for(Interest::Read, &reader.waker()));
        assert!(!waiting.is_for(Interest::Read, &writer.waker()));
        waiting.wake(Interest::Write);
        assert_eq!((reader.woken(), writer.woken()), (0, 1));
        assert!(!waiting.remove(Interest::Write));
        waiting.add(Interest::Write, &writer.waker());
        waiting.end();
        assert_eq!((reader.woken(), writer.woken()), (1, 2));
    }

    /// A task that takes over from another is the only one.
    #[test]
    fn the_last_to_ask_is_woken() {
        let (first, second) = (Arc::<Task>::default(), Arc::<Task>::default());
        let mut waiting = Waiting::new(Interest::Read, &first.waker());
        waiting.add(Interest::Read, &second.waker());
        waiting.wake(Interest::Read);
        assert_eq!((first.woken(), second.woken()), (0, 1));
        assert!(waiting.remove(Interest::Read));
    }

    #[test]
    fn it_is_small() {
        assert!(size_of::<Waiting>() <= 24);
    }
}
