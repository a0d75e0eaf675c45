use axum::Router;
use axum::routing::get;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const ASK: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

/// Serves on loopback; where.
async fn serve(max: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/healthz", get(|| async { "ok\n" }));
    tokio::spawn(async move { axum::serve(Listener::new(listener, max), router).await });
    address
}

/// Asks once; `None` when the connection ends instead.
async fn ask(socket: &mut TcpStream) -> Option<String> {
    socket.write_all(ASK).await.ok()?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"ok\n") {
        let read = socket.read_buf(&mut answer).await.ok()?;
        if read == 0 {
            return None;
        }
    }
    String::from_utf8(answer).ok()
}

async fn ends(socket: &mut TcpStream) -> bool {
    matches!(socket.read(&mut [0; 64]).await, Ok(0) | Err(_))
}

#[tokio::test]
async fn further_connections_are_answered_at_once_and_the_oldest_go() {
    let address = serve(4).await;
    let mut held = Vec::new();
    for _ in 0..12 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut socket).await.is_some());
        held.push(socket);
    }
    for socket in &mut held[..8] {
        assert!(ends(socket).await);
    }
    for socket in &mut held[8..] {
        assert!(ask(socket).await.is_some());
    }
}

#[tokio::test]
async fn a_connection_has_a_bounded_number_of_requests() {
    let address = serve(4).await;
    let mut socket = TcpStream::connect(address).await.unwrap();
    for _ in 0..MAX_REQUESTS {
        assert!(ask(&mut socket).await.is_some());
    }
    assert!(ends(&mut socket).await);
}

#[tokio::test(start_paused = true)]
async fn a_connection_has_a_bounded_life_and_an_idle_one_a_shorter_one() {
    let address = serve(4).await;
    let began = Instant::now();
    let mut polite = TcpStream::connect(address).await.unwrap();
    let mut answered = 0;
    while ask(&mut polite).await.is_some() {
        answered += 1;
        sleep(IDLE / 2).await;
    }
    let life = began.elapsed();
    assert!(life >= LIFE && life <= LIFE + IDLE, "{life:?}");
    assert!(answered >= 12, "{answered}");
    let began = Instant::now();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(&ASK[..9]).await.unwrap();
    assert!(ends(&mut half).await);
    assert!(began.elapsed() <= 2 * IDLE);
}
