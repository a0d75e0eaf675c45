//! epoll(7), edge-triggered: what mio uses.

use std::collections::{BTreeMap, VecDeque};

/// An epoll instance.
#[derive(Debug, Default)]
pub(super) struct Epoll {
    pub(super) interests: BTreeMap<i32, Interest>,
    /// Descriptors with news, in the order of their news.
    news: VecDeque<i32>,
}

/// A registration.
#[derive(Debug)]
pub(super) struct Interest {
    pub(super) events: u32,
    pub(super) data: u64,
    has_news: bool,
}

impl Epoll {
    /// Adds a registration, or replaces one.
    pub(super) fn set(&mut self, fd: i32, events: u32, data: u64) {
        let interest = Interest {
            events,
            data,
            has_news: false,
        };
        self.interests.insert(fd, interest);
        self.note(fd);
    }

    /// Removes a registration.
    pub(super) fn remove(&mut self, fd: i32) -> bool {
        self.interests.remove(&fd).is_some()
    }

    /// Notes that the readiness of a descriptor may have changed.
    pub(super) fn note(&mut self, fd: i32) {
        if let Some(interest) = self.interests.get_mut(&fd)
            && !std::mem::replace(&mut interest.has_news, true)
        {
            self.news.push_back(fd);
        }
    }

    /// Takes a descriptor with news, and its registration.
    pub(super) fn next(&mut self) -> Option<(i32, u32, u64)> {
        loop {
            let fd = self.news.pop_front()?;
            if let Some(interest) = self.interests.get_mut(&fd)
                && std::mem::take(&mut interest.has_news)
            {
                return Some((fd, interest.events, interest.data));
            }
        }
    }

    /// Whether a descriptor has news.
    pub(super) fn has_news(&self) -> bool {
        let is_new = |fd: &i32| self.interests.get(fd).is_some_and(|it| it.has_news);
        self.news.iter().any(is_new)
    }
}
