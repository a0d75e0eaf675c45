//! Both ends over streams that write down what they are told.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::{LocalSet, yield_now};
use tokio::time::timeout;
use tunnel_proto::preface::DialResponse;

use super::*;

/// Record of a stream's end, and its data.
#[derive(Default)]
struct Script {
    told: RefCell<Vec<String>>,
    /// End of the sending half.
    end: RefCell<Option<SendEnd>>,
    /// Whether it takes no chunks for now.
    is_full: RefCell<bool>,
    answer: RefCell<Option<Answer>>,
    batches: RefCell<VecDeque<Result<&'static str, RecvEnd>>>,
    changed: Notify,
}

impl Script {
    fn tell(&self, what: impl Into<String>) {
        self.told.borrow_mut().push(what.into());
    }

    fn told(&self) -> Vec<String> {
        self.told.borrow().clone()
    }

    fn change(&self, change: impl FnOnce(&Self)) {
        change(self);
        self.changed.notify_waiters();
    }

    async fn find<T>(&self, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look(self) {
                return found;
            }
            changed.await;
        }
    }
}

struct Half(Rc<Script>, &'static str);

impl Drop for Half {
    fn drop(&mut self) {
        self.0.tell(format!("{} dropped", self.1));
    }
}

impl SendHalf for Half {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        self.0.find(|s| (!*s.is_full.borrow()).then_some(())).await;
        self.0.tell(String::from_utf8_lossy(&std::mem::take(chunk)));
        Ok(())
    }

    fn finish(&mut self) {
        self.0.tell("finish");
    }

    fn reset(&mut self, reason: CloseReason) {
        self.0.tell(format!("reset {}", reason.label()));
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        let script = self.0.clone();
        async move { script.find(|s| *s.end.borrow()).await }
    }
}

impl RecvHalf for Half {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        let next = self.0.find(|s| s.batches.borrow_mut().pop_front()).await?;
        into.push(Bytes::from_static(next.as_bytes()));
        Ok(())
    }

    async fn reset(&mut self) -> CloseReason {
        let script = &self.0;
        script
            .find(|s| match s.batches.borrow().back() {
                Some(Err(RecvEnd::Reset(reason))) => Some(*reason),
                _ => None,
            })
            .await
    }

    fn stop(&mut self, reason: CloseReason) {
        self.0.tell(format!("stop {}", reason.label()));
    }
}

impl Answered for Half {
    async fn answer(&mut self) -> Answer {
        self.0.find(|s| s.answer.borrow_mut().take()).await
    }
}

fn run(test: impl AsyncFnOnce(Rc<Script>, BridgeSend, BridgeRecv)) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let test = async {
        let script = Rc::new(Script::default());
        let ((send, out), (recv, inn)) = (outward(), inward());
        let mut half = Half(script.clone(), "send");
        tokio::task::spawn_local(async move { far::carry_out(&mut half, out).await });
        tokio::task::spawn_local(far::carry_in(Half(script.clone(), "recv"), inn));
        let test = test(script, send, recv);
        timeout(Duration::from_secs(5), test).await.unwrap();
    };
    LocalSet::new().block_on(&runtime, test);
}

async fn settle() {
    for _ in 0..20 {
        yield_now().await;
    }
}

async fn put(send: &mut BridgeSend, text: &'static str) {
    let mut chunk = Bytes::from_static(text.as_bytes());
    send.send(&mut chunk).await.unwrap();
    assert!(chunk.is_empty());
}

async fn read(recv: &mut BridgeRecv) -> Result<Vec<u8>, RecvEnd> {
    let mut chunks = Vec::new();
    recv.recv(&mut chunks).await?;
    Ok(chunks.concat())
}

async fn connect(script: &Script, recv: &mut BridgeRecv) {
    script.change(|s| drop(s.answer.replace(Some(Ok(DialResponse::Connected)))));
    assert!(matches!(recv.answer().await, Ok(DialResponse::Connected)));
}

#[test]
fn bytes_and_their_ends_pass_in_order() {
    run(async |script, mut send, mut recv| {
        connect(&script, &mut recv).await;
        let batches = [Ok("a"), Ok("b"), Ok("c"), Err(RecvEnd::Finished)];
        script.change(|s| s.batches.borrow_mut().extend(batches));
        for text in ["1", "2", "3"] {
            put(&mut send, text).await;
        }
        send.finish();
        settle().await;
        assert_eq!(script.told()[..4], ["1", "2", "3", "finish"]);
        let end = SendEnd::Acknowledged;
        script.change(|s| *s.end.borrow_mut() = Some(end));
        assert_eq!(send.stopped().await, end);
        for text in ["a", "b", "c"] {
            assert_eq!(read(&mut recv).await.unwrap(), text.as_bytes());
        }
        assert_eq!(read(&mut recv).await, Err(RecvEnd::Finished));
        let reset = timeout(Duration::from_millis(10), recv.reset()).await;
        assert!(reset.is_err(), "it has finished");
    });
}

#[test]
fn what_is_not_taken_waits_at_its_source() {
    run(async |script, mut send, mut recv| {
        connect(&script, &mut recv).await;
        script.change(|s| s.batches.borrow_mut().extend([Ok("x"); 10]));
        settle().await;
        // What waits in the queue, and what waits for a place there.
        assert_eq!(script.batches.borrow().len(), 10 - INBOUND - 1);
        assert_eq!(read(&mut recv).await.unwrap(), b"x");

        script.is_full.replace(true);
        let mut taken = 0;
        let full = loop {
            let mut chunk = Bytes::from_static(b"y");
            match timeout(Duration::from_millis(10), send.send(&mut chunk)).await {
                Ok(sent) => sent.unwrap(),
                Err(_) => break chunk,
            }
            taken += 1;
        };
        assert_eq!(full, "y", "nothing is lost of what waits");
        assert_eq!(taken, OUTBOUND + 1);
        // A reset does not wait behind it.
        send.reset(CloseReason::Cancelled);
        settle().await;
        assert_eq!(script.told(), ["reset cancelled", "send dropped"]);
    });
}

#[test]
fn a_reset_of_the_target_passes_a_reader_that_has_stopped() {
    run(async |script, _send, mut recv| {
        connect(&script, &mut recv).await;
        let reset = RecvEnd::Reset(CloseReason::PeerReset);
        let batches = [Ok("a"), Ok("b"), Ok("c"), Ok("d"), Err(reset)];
        script.change(|s| s.batches.borrow_mut().extend(batches));
        assert_eq!(recv.reset().await, CloseReason::PeerReset);
        while read(&mut recv).await.is_ok() {}
        assert_eq!(read(&mut recv).await, Err(reset));
    });
}

#[test]
fn the_clients_end_reaches_the_stream() {
    let stopped = CloseReason::PeerGone;
    run(async |script, send, mut recv| {
        connect(&script, &mut recv).await;
        recv.stop(stopped);
        settle().await;
        assert_eq!(script.told(), ["stop peer_gone", "recv dropped"]);
        drop(send);
        settle().await;
        // Unfinished: its drop resets.
        assert_eq!(script.told()[2..], ["send dropped"]);
    });
    run(async |script, mut send, recv| {
        // Before there is an answer.
        drop(recv);
        put(&mut send, "1").await;
        send.finish();
        drop(send);
        settle().await;
        // What was finished goes on to its end without anybody.
        let told = ["1", "finish", "send dropped", "recv dropped"];
        assert_eq!(script.told(), told);
    });
}

#[test]
fn the_streams_end_reaches_the_client() {
    run(async |script, mut send, mut recv| {
        let refused = DialResponse::Refused {
            reason: CloseReason::DialFailed,
            detail: "no".into(),
        };
        script.change(|s| drop(s.answer.replace(Some(Ok(refused.clone())))));
        assert_eq!(recv.answer().await.unwrap(), refused);
        let end = SendEnd::Stopped(CloseReason::PeerGone);
        script.change(|s| *s.end.borrow_mut() = Some(end));
        assert_eq!(send.stopped().await, end);
        settle().await;
        let mut chunk = Bytes::from_static(b"late");
        assert_eq!(send.send(&mut chunk).await, Err(end));
        assert_eq!(chunk, "late");
    });
    run(async |script, send, mut recv| {
        connect(&script, &mut recv).await;
        let end = SendEnd::Stopped(CloseReason::PeerGone);
        script.change(|s| *s.end.borrow_mut() = Some(end));
        assert_eq!(send.stopped().await, end);
        settle().await;
        // A half's drop may end the other: it is not to be dropped behind the client's back.
        assert!(script.told().is_empty());
        let batches = [Ok("a"), Err(RecvEnd::Finished)];
        script.change(|s| s.batches.borrow_mut().extend(batches));
        assert_eq!(read(&mut recv).await.unwrap(), b"a");
        assert_eq!(read(&mut recv).await, Err(RecvEnd::Finished));
        settle().await;
        assert!(script.told().is_empty());
        drop((send, recv));
        settle().await;
        assert_eq!(script.told().len(), 2);
    });
}

#[test]
fn a_shard_that_is_gone_is_a_link_that_is_lost() {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.build().unwrap();
    runtime.block_on(async {
        let ((send, out), (mut recv, inn)) = (outward(), inward());
        drop((out, inn));
        let lost = CloseReason::LinkLost;
        assert_eq!(send.stopped().await, SendEnd::Link(lost));
        let answer = recv.answer().await;
        assert!(matches!(answer, Err(HeadError::End(RecvEnd::Link(reason))) if reason == lost));
        assert_eq!(read(&mut recv).await, Err(RecvEnd::Link(lost)));
    });
}
