//! A NAT between the two: it forgets its mapping, loses packets, and forges where one comes from.

use std::cell::RefCell;
use std::rc::Rc;

use tokio::net::UdpSocket;

use super::*;

/// Passes packets on, from a socket that the server takes for the agent.
pub(super) struct Nat {
    inside: UdpSocket,
    outside: RefCell<Rc<UdpSocket>>,
    server: SocketAddr,
    agent: Cell<Option<SocketAddr>>,
    /// Every so many packets are lost, each way.
    loses: Cell<usize>,
    /// The agent's packets are taken from it and counted.
    is_cut: Cell<bool>,
    last: RefCell<Vec<u8>>,
}

async fn bind() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
}

impl Nat {
    /// In front of `server`; its address for the agent.
    pub(super) async fn new(server: SocketAddr) -> (Rc<Self>, SocketAddr) {
        let inside = bind().await;
        let front = inside.local_addr().unwrap();
        let nat = Rc::new(Self {
            inside,
            outside: Rc::new(bind().await).into(),
            server,
            agent: Cell::default(),
            loses: Cell::new(usize::MAX),
            is_cut: Cell::default(),
            last: RefCell::default(),
        });
        tokio::task::spawn_local(nat.clone().carry_out());
        nat.clone().carry_in();
        (nat, front)
    }

    async fn carry_out(self: Rc<Self>) {
        let mut packet = vec![0; 1 << 16];
        for count in 1.. {
            let (size, agent) = self.inside.recv_from(&mut packet).await.unwrap();
            self.agent.set(Some(agent));
            // Not one that looks for a packet size.
            if size < 100 {
                self.last.replace(packet[..size].to_vec());
            }
            if self.is_cut.get() || count % self.loses.get() == 0 {
                continue;
            }
            let outside = self.outside.borrow().clone();
            outside.send_to(&packet[..size], self.server).await.unwrap();
        }
    }

    /// From the socket of now.
    fn carry_in(self: Rc<Self>) {
        let outside = self.outside.borrow().clone();
        tokio::task::spawn_local(async move {
            let mut packet = vec![0; 1 << 16];
            for count in 1.. {
                let (size, _) = outside.recv_from(&mut packet).await.unwrap();
                let is_lost = count % self.loses.get() == 0;
                if let Some(agent) = self.agent.get()
                    && !is_lost
                    && Rc::ptr_eq(&outside, &self.outside.borrow())
                {
                    self.inside.send_to(&packet[..size], agent).await.unwrap();
                }
            }
        });
    }

    /// Forgets the mapping: the agent comes from another port.
    async fn remap(self: &Rc<Self>) {
        self.outside.replace(Rc::new(bind().await));
        self.clone().carry_in();
    }
}

async fn behind_nat() -> (Pair, Rc<Nat>) {
    let nat = RefCell::new(None);
    let pair = Pair::through(async |server| {
        let (made, front) = Nat::new(server).await;
        nat.replace(Some(made));
        front
    });
    let pair = pair.await;
    (pair, nat.take().unwrap())
}

/// Says something and is answered.
async fn round_trip((ours, theirs): (&mut (Send, Recv), &mut (Send, Recv))) {
    ours.0.send(&mut pattern(100, 1)).await.unwrap();
    take(&mut theirs.1, 100).await.unwrap();
    theirs.0.send(&mut pattern(100, 2)).await.unwrap();
    take(&mut ours.1, 100).await.unwrap();
}

/// A packet of the agent comes from another address, where no peer answers. No more than three times
/// its bytes go there; the tunnel goes on.
#[test]
fn a_forged_address_is_sent_three_times_what_came() {
    run_alone(async || {
        let (pair, nat) = behind_nat().await;
        let (mut server, mut agent) = pair.stream().await;
        round_trip((&mut server, &mut agent)).await;
        // Only what is newer than all before moves the path.
        nat.is_cut.set(true);
        agent.0.send(&mut Bytes::from_static(b"?")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let forged = nat.last.take();
        assert!((20..100).contains(&forged.len()), "{}", forged.len());
        let elsewhere = bind().await;
        elsewhere.send_to(&forged, nat.server).await.unwrap();
        take(&mut server.1, 1).await.unwrap();
        assert_eq!(
            pair.server.remote_address(),
            elsewhere.local_addr().unwrap()
        );
        // It has much to say.
        let sends = async { server.0.send(&mut pattern(1 << 20, 3)).await.unwrap() };
        let sent = async {
            let (mut sent, mut packet) = (0, vec![0; 1 << 16]);
            let recv = async |packet: &mut Vec<u8>| elsewhere.recv(packet).await.unwrap();
            while let Ok(size) = timeout(Duration::from_millis(300), recv(&mut packet)).await {
                sent += size;
            }
            nat.is_cut.set(false);
            sent
        };
        let receives = async { take(&mut agent.1, 1 << 20).await.unwrap() };
        let ((), received, sent) = tokio::join!(sends, receives, sent);
        assert!(received == pattern(1 << 20, 3));
        assert!(
            sent <= 3 * forged.len(),
            "{sent} bytes for {}",
            forged.len()
        );
    });
}

#[test]
fn a_tunnel_outlives_its_mapping() {
    run_alone(async || {
        let (pair, nat) = behind_nat().await;
        let (mut server, mut agent) = pair.stream().await;
        for _ in 0..3 {
            round_trip((&mut server, &mut agent)).await;
            let before = pair.server.remote_address();
            nat.remap().await;
            round_trip((&mut agent, &mut server)).await;
            assert_ne!(pair.server.remote_address(), before);
            // As fast as it was: nothing is held back any more.
            let much = async { server.0.send(&mut pattern(3 << 20, 4)).await.unwrap() };
            let (received, ()) = tokio::join!(take(&mut agent.1, 3 << 20), much);
            assert!(received.unwrap() == pattern(3 << 20, 4));
        }
    });
}

/// Reordered data is put in order, and nothing stays charged.
#[test]
fn what_is_lost_is_sent_again_and_comes_in_order() {
    run_alone(async || {
        let (pair, nat) = behind_nat().await;
        let mut streams = Vec::new();
        for _ in 0..4 {
            streams.push(pair.stream().await);
        }
        nat.loses.set(23);
        let moves = streams
            .into_iter()
            .enumerate()
            .map(|(seed, stream)| async move {
                let ((mut send, mut recv), (mut agents_send, mut agents_recv)) = stream;
                let bytes = pattern(1 << 20, seed);
                let forth = async {
                    send.send(&mut bytes.clone()).await.unwrap();
                    send.finish();
                };
                let back = async {
                    agents_send.send(&mut bytes.clone()).await.unwrap();
                    agents_send.finish();
                };
                let (there, here, (), ()) = tokio::join!(
                    take(&mut agents_recv, bytes.len()),
                    take(&mut recv, bytes.len()),
                    forth,
                    back
                );
                assert!(there.unwrap() == bytes && here.unwrap() == bytes);
                assert_eq!(take(&mut recv, 1).await, Err(RecvEnd::Finished));
            });
        futures_util::future::join_all(moves).await;
        assert!(pair.server.held() == 0 && pair.agent.held() == 0);
    });
}

/// An answer, an end or a reset that is lost on the way.
#[test]
fn the_end_of_a_stream_is_unacknowledged_until_it_has_arrived() {
    run_alone(async || {
        let (pair, nat) = behind_nat().await;
        for is_reset in [false, true] {
            let (mut server, mut agent) = pair.stream().await;
            assert!(!pair.agent.has_unacknowledged(), "one is in use");
            nat.is_cut.set(true);
            agent.0.send(&mut Bytes::from_static(b"!")).await.unwrap();
            match is_reset {
                true => agent.0.reset(CloseReason::Aborted),
                false => agent.0.finish(),
            }
            drop(agent);
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(pair.agent.has_unacknowledged());
            nat.is_cut.set(false);
            while take(&mut server.1, 1).await.is_ok() {}
            while pair.agent.has_unacknowledged() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
}
