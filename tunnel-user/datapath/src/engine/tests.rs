//! Properties of a ring that epoll has by nature: a close is a close at once, nothing is received
//! without bound, nothing is lost on the way, and no memory goes before the kernel is done with it.

use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::testing::{ring, run_on};
use super::*;
use crate::LocalSocket;
use crate::socket::{Portable, prepare};
use cpc_config::datapath::EngineChoice;

const PATIENCE: Duration = Duration::from_secs(10);

async fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap());
    let (peer, accepted) = tokio::join!(peer, listener.accept());
    let (local, _) = accepted.unwrap();
    prepare(&local).unwrap();
    let local = Socket::new(local).unwrap();
    assert!(matches!(local, Socket::Ring(_)));
    (peer.unwrap(), local)
}

/// Runs a test on a ring; it must end soon.
fn on_ring<T>(test: impl AsyncFnOnce() -> T) -> Option<T> {
    let ring = ring()?;
    Some(run_on(Some(ring), async || {
        timeout(PATIENCE, test()).await.expect("it hangs")
    }))
}

/// Waits until a receive of `local` is in flight.
async fn receiving(local: &Socket, peer: &mut TcpStream) {
    peer.write_all(b"x").await.unwrap();
    assert_eq!(local.read().await.unwrap(), "x");
    let mut read = std::pin::pin!(local.read());
    assert!(is_pending(read.as_mut()).await);
    tokio::task::yield_now().await;
}

async fn is_pending<F: Future>(mut future: Pin<&mut F>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

async fn end_of(peer: &mut TcpStream) -> Option<ErrorKind> {
    let mut rest = Vec::new();
    let end = peer.read_to_end(&mut rest).await;
    end.err().map(|error| error.kind())
}

#[test]
fn a_close_with_a_receive_in_flight_is_one_at_once() {
    on_ring(async || {
        for (reset, end) in [(true, Some(ErrorKind::ConnectionReset)), (false, None)] {
            let (mut peer, local) = pair().await;
            receiving(&local, &mut peer).await;
            local.reset_on_close(reset);
            drop(local);
            // Not by the reactor, which would turn the ring meanwhile.
            let peer_now = peer.into_std().unwrap();
            peer_now.set_nonblocking(true).unwrap();
            let now = (&mut [0; 1][..], &peer_now);
            let read = std::io::Read::read(&mut { now.1 }, now.0);
            assert_eq!(read.err().map(|error| error.kind()), end, "reset {reset}");
        }
    });
}

#[test]
fn what_came_before_an_end_comes_first() {
    on_ring(async || {
        for reset in [false, true] {
            let (mut peer, local) = pair().await;
            receiving(&local, &mut peer).await;
            peer.write_all(b"last words").await.unwrap();
            if reset {
                let peer = socket2::SockRef::from(&peer);
                peer.set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(peer);
            if reset {
                local.broken().await;
                local.broken_before_eof().await;
            }
            assert_eq!(local.read().await.unwrap(), "last words");
            let end = local.read().await;
            let kind = end.as_ref().err().map(std::io::Error::kind);
            let wanted = reset.then_some(ErrorKind::ConnectionReset);
            assert_eq!(kind, wanted, "{end:?}");
        }
    });
}

/// Unread data survives a reset behind the end of file.
#[test]
fn a_reset_behind_the_end_of_file_revokes_nothing() {
    on_ring(async || {
        let (mut peer, local) = pair().await;
        receiving(&local, &mut peer).await;
        peer.write_all(b"all").await.unwrap();
        drop(peer);
        assert_eq!(local.read().await.unwrap(), "all");
        assert_eq!(local.read().await.unwrap(), "");
        local
            .try_write(&[std::io::IoSlice::new(b"is anybody there?")])
            .unwrap();
        local.broken().await;
        let mut revoked = std::pin::pin!(local.broken_before_eof());
        assert!(is_pending(revoked.as_mut()).await);
    });
}

#[test]
fn a_reader_that_stops_is_not_received_for_without_bound() {
    on_ring(async || {
        let (mut peer, local) = pair().await;
        receiving(&local, &mut peer).await;
        let bytes: Vec<u8> = (0..32u32 << 20).map(|n| (n % 251) as u8).collect();
        let sent = bytes.clone();
        let sender = spawn_local(async move {
            peer.write_all(&sent).await.unwrap();
            peer.shutdown().await.unwrap();
        });
        // Until the peer's window has closed: the peer reads nothing.
        let Socket::Ring(socket) = &local else {
            return;
        };
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let ahead = socket.ahead();
            if ahead == before && ahead > 0 {
                break;
            }
            before = ahead;
        }
        assert!(before < 1 << 20, "{before} bytes were received ahead");
        assert!(!sender.is_finished());
        let mut received = Vec::new();
        loop {
            match local.read().await.unwrap() {
                chunk if chunk.is_empty() => break,
                chunk => received.extend_from_slice(&chunk),
            }
        }
        assert!(received == bytes, "{} bytes", received.len());
        sender.await.unwrap();
    });
}

#[test]
fn many_that_share_few_buffers_all_get_everything() {
    on_ring(async || {
        let mut readers = Vec::new();
        for n in 0..100u8 {
            let (mut peer, local) = pair().await;
            readers.push(spawn_local(async move {
                let mut received = Vec::new();
                loop {
                    let chunk = local.read().await.unwrap();
                    if chunk.is_empty() {
                        return received == vec![n; 300_000];
                    }
                    received.extend_from_slice(&chunk);
                    // Kept for a while, so that the buffers are not back at once.
                    tokio::task::yield_now().await;
                }
            }));
            spawn_local(async move {
                peer.write_all(&vec![n; 300_000]).await.unwrap();
                peer.shutdown().await.unwrap();
            });
        }
        for reader in readers {
            assert!(reader.await.unwrap());
        }
    });
}

#[test]
fn a_socket_that_moves_takes_along_what_was_received() {
    let moved = on_ring(async || {
        let (mut peer, local) = pair().await;
        receiving(&local, &mut peer).await;
        peer.write_all(b"received ahead").await.unwrap();
        let Socket::Ring(socket) = &local else {
            unreachable!("it is on a ring");
        };
        while socket.ahead() == 0 {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (peer.into_std().unwrap(), local.pack().unwrap())
    });
    let Some((peer, packed)) = moved else { return };
    on_ring(async || {
        let mut peer = TcpStream::from_std(peer).unwrap();
        let local = Socket::unpack(packed).unwrap();
        assert_eq!(local.read().await.unwrap(), "received ahead");
        receiving(&local, &mut peer).await;
        drop(local);
        assert_eq!(end_of(&mut peer).await, Some(ErrorKind::ConnectionReset));
    });
}

#[test]
fn a_ring_ends_with_all_that_is_in_flight() {
    let kept = on_ring(async || {
        let (mut peer, local) = pair().await;
        receiving(&local, &mut peer).await;
        (peer.into_std().unwrap(), local)
    });
    // The socket outlives its thread's ring, which it holds.
    let Some((mut peer, local)) = kept else {
        return;
    };
    drop(local);
    peer.set_nonblocking(false).unwrap();
    let end = std::io::Read::read(&mut peer, &mut [0; 1]).unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn what_the_kernel_refuses_is_replaced_by_epoll() {
    let chosen = std::thread::spawn(|| {
        refuse_io_uring();
        Engines::choose(EngineChoice::IoUring, 2).engine()
    });
    assert_eq!(chosen.join().unwrap(), Engine::Epoll);
    if ring().is_some() {
        let chosen = Engines::choose(EngineChoice::IoUring, 2);
        assert_eq!((chosen.engine(), chosen.rings.len()), (Engine::IoUring, 2));
    }
}

/// Installs a seccomp filter without io_uring on this thread, as a container may have it.
fn refuse_io_uring() {
    let step = |code: u32, k: u32, yes, no| libc::sock_filter {
        code: code as u16,
        jt: yes,
        jf: no,
        k,
    };
    let mut filter = [
        // The number of the call is the first field of struct seccomp_data.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_io_uring_setup as u32,
            0,
            1,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            0,
            0,
        ),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call, and concerns this thread alone.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
