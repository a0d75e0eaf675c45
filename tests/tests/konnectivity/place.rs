//! The place of stand-ins: a thread in a namespace with a runtime, so that they go on while the
//! test does something else.

use std::future::Future;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tunnel_tests::lab::netns::Netns;

/// A runtime in a namespace. Dropping it ends whatever is on it, sockets included.
#[derive(Debug)]
pub(crate) struct Place {
    runtime: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Place {
    pub(crate) fn new(netns: &Netns) -> Result<Self> {
        let (end, ended) = oneshot::channel();
        let (handle, started) = mpsc::channel();
        let netns = netns.clone();
        let turn = move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handle.send(runtime.handle().clone())?;
            // The other half is dropped when it is over.
            let _ = runtime.block_on(ended);
            Ok(())
        };
        let thread = thread::spawn(move || netns.enter(turn));
        Ok(Self {
            runtime: started.recv().context("a runtime did not start")?,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// The runtime, for what needs no namespace.
    pub(crate) fn handle(&self) -> &Handle {
        &self.runtime
    }

    /// Lets `work` go on by itself.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.runtime.spawn(work).abort_handle()
    }

    /// Runs `work` there and waits for it.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.runtime.block_on(self.runtime.spawn(work))?
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.end.take());
        // A panic has been printed by the thread itself.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
