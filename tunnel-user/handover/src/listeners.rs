//! Listeners in a keeper: while no process is there, connects wait in their backlog.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::keeper::KeeperSpec;
use super::predecessor::Listeners;
use cpc_host::inherited::{Inherited, Noted};
use cpc_host::report::report;
use cpc_keeper::{Keeper, KeeperError, Slot, Taken, take};

/// Time for the next process to come. Afterwards connects are refused at once, as without a keeper.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval of looks at the keeper and at the listeners.
const LOOK: Duration = Duration::from_secs(1);

/// Handle of the copies of this process's listeners in its keeper. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct KeptListeners(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    spec: Option<KeeperSpec>,
    /// The listeners of the process, once it keeps them.
    noted: Option<Noted>,
    keeper: Option<Keeper>,
    /// Names and cookies of the listeners that the keeper has.
    kept: Vec<(String, u64)>,
    slots: Vec<Slot>,
    /// Listeners of a process that was killed. The keeper holds them until this process has given its own.
    taken: Option<Taken>,
}

impl KeptListeners {
    /// Takes the listeners of a process that was killed, and adds them to `inherited`.
    pub fn take(spec: Option<KeeperSpec>, inherited: &mut Inherited) -> Self {
        let spec = spec.map(|spec| spec.for_listeners(PATIENCE));
        let taken = spec.as_ref().and_then(|spec| {
            let taken = take(spec.path(), spec.role());
            // A keeper that is not there is logged with the connections.
            taken
                .inspect_err(|error| tracing::debug!(error = report(error), "no listener is found"))
                .ok()
        });
        let mut state = State {
            spec,
            taken,
            ..State::default()
        };
        let listeners = state.take_listeners();
        if !listeners.is_empty() {
            tracing::info!(
                listeners = listeners.len(),
                "listeners of a process that was killed are taken over"
            );
            inherited.add(listeners);
        }
        Self(Arc::new(Mutex::new(state)))
    }

    /// Gives the keeper the `noted` listeners.
    pub fn keep(&self, noted: Noted) {
        let mut state = self.lock();
        state.noted = Some(noted);
        state.renew();
    }

    /// Gives the keeper again what it lacks, until dropped: it may have been restarted, and listeners may be replaced.
    pub async fn watch(self) {
        while self.lock().spec.is_some() {
            sleep(LOOK).await;
            let this = self.clone();
            // The keeper may let this process wait. A panic has been logged.
            let _ = spawn_blocking(move || this.lock().renew()).await;
        }
    }

    /// Ends the keeping, before another process uses the listeners or this one closes them. Waits until the keeper
    /// has closed its copies.
    pub fn discard(&self) {
        let mut state = self.lock();
        state.noted = None;
        state.give_up();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the listeners of processes that were killed, in the order of their binding.
    fn take_listeners(&mut self) -> Listeners {
        let sets = { self.taken.iter_mut() }.flat_map(|taken| std::mem::take(&mut taken.sets));
        let listeners = sets.flat_map(|mut left| {
            left.kept.sort_by_key(|kept| kept.slot);
            left.kept
        });
        let named = listeners.map(|kept| {
            let name = String::from_utf8_lossy(&kept.description).into_owned();
            (name, kept.descriptor)
        });
        named.collect()
    }

    /// Gives the keeper the listeners, unless it has them.
    fn renew(&mut self) {
        let (Some(spec), Some(noted)) = (&self.spec, &self.noted) else {
            return;
        };
        let Ok(listeners) = noted.copies() else {
            // There is no descriptor left: later.
            return;
        };
        let current = identities(&listeners);
        if current == self.kept && self.keeper.as_ref().is_some_and(Keeper::is_there) {
            return;
        }
        let spec = spec.clone();
        self.give_up();
        match self.give(&spec, &listeners) {
            Ok(()) => self.kept = current,
            Err(error) => tracing::debug!(error = report(&error), "no listener is kept"),
        }
    }

    fn give(&mut self, spec: &KeeperSpec, listeners: &Listeners) -> Result<(), KeeperError> {
        let keeper = Keeper::open(spec.path(), spec.role(), b"", spec.patience())?;
        let slots = listeners.iter().map(|(name, listener)| {
            // Nothing is read from a listener.
            keeper.keep(name.clone().into_bytes(), 0, listener.as_fd())
        });
        self.slots = slots.flatten().collect();
        keeper.flush();
        self.keeper = Some(keeper);
        match self.taken.take() {
            Some(taken) => taken.confirm(),
            None => Ok(()),
        }
    }

    /// Has the keeper close its copies.
    fn give_up(&mut self) {
        if let Some(keeper) = self.keeper.take()
            && !keeper.is_gone()
            && !keeper.discard()
        {
            tracing::warn!("the keeper has not closed its copies of the listeners in time");
        }
        self.slots.clear();
        self.kept.clear();
    }
}

/// Returns the names of `listeners` and the cookies of their sockets (SO_COOKIE, Linux 4.12).
fn identities(listeners: &Listeners) -> Vec<(String, u64)> {
    let identity = |(name, listener): &(String, _)| {
        let cookie = SockRef::from(listener).cookie().unwrap_or_default();
        (name.clone(), cookie)
    };
    listeners.iter().map(identity).collect()
}
