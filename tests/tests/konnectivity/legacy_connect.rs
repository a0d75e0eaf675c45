//! The HTTP CONNECT half of the server's stand-in. The status line and what the agent sends are
//! written by two tasks, as in the peer: an endpoint that speaks first may be heard first.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Notify, mpsc};

use crate::legacy_server::{Client, State};
use crate::wire::{self, Packet, Payload};

/// Maximum size of one read from a client, in bytes.
const CHUNK: usize = 32 << 10;
/// The longest head of a request, in bytes.
const LONGEST_HEAD: usize = 8 << 10;

/// Serves for as long as the future lives.
pub(crate) async fn serve(state: Arc<State>, path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let state = state.clone();
        tokio::spawn(async move {
            // A client that goes away is what many tests are about.
            let _ = connect(&state, stream).await;
        });
    }
}

#[derive(Debug)]
struct HttpClient {
    write: Mutex<Option<OwnedWriteHalf>>,
    connected: mpsc::UnboundedSender<i64>,
    closed: Notify,
}

impl HttpClient {
    async fn write(&self, bytes: &[u8]) -> Result<()> {
        let mut write = self.write.lock().await;
        Ok(write.as_mut().context("closed")?.write_all(bytes).await?)
    }

    async fn close(&self) {
        self.write.lock().await.take();
        self.closed.notify_one();
    }
}

impl Client for HttpClient {
    fn deliver<'a>(&'a self, packet: Packet) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            match packet.content() {
                Some(Payload::DialResponse(response)) if response.error.is_empty() => {
                    let _ = self.connected.send(response.connect_id);
                }
                Some(Payload::DialResponse(response)) => {
                    let _ = self.write(failure(&response.error).as_bytes()).await;
                    self.close().await;
                }
                Some(Payload::Data(data)) => drop(self.write(&data.data).await),
                _ => self.close().await,
            }
        })
    }
}

fn failure(error: &str) -> String {
    let lower = error.to_lowercase();
    let status = if lower.contains("timeout") || lower.contains("deadline exceeded") {
        "504 Gateway Timeout"
    } else if lower.contains("too many open files") {
        "503 Service Unavailable"
    } else {
        "502 Bad Gateway"
    };
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
         {error}"
    )
}

async fn connect(state: &State, stream: UnixStream) -> Result<()> {
    let (mut read, write) = stream.into_split();
    let (connected, mut answer) = mpsc::unbounded_channel();
    let write = Mutex::new(Some(write));
    let client = Arc::new(HttpClient {
        write,
        connected,
        closed: Notify::new(),
    });
    let (head, rest) = head(&mut read).await?;
    let mut words = head.split(' ');
    if words.next() != Some("CONNECT") {
        let body = "this proxy only supports CONNECT passthrough\n";
        let head = "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 45\r\n\r\n";
        return client.write(format!("{head}{body}").as_bytes()).await;
    }
    let destination = words.next().context("no destination")?;
    let backend = match state.choose(destination) {
        Ok(backend) => backend,
        Err(error) => {
            let head = "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n";
            let text = format!("{head}currently no tunnels available: {error}");
            return client.write(text.as_bytes()).await;
        }
    };
    let random = random();
    state.add_pending(random, client.clone());
    let _forget = Forget { state, random };
    backend.send(wire::dial(destination, random)).await?;
    let id = tokio::select! {
        id = answer.recv() => id.context("no answer")?,
        () = client.closed.notified() => return Ok(()),
        () = backend.gone() => {
            let head = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n";
            let text = format!("{head}Backend context error: context canceled\r\n");
            return client.write(text.as_bytes()).await;
        }
    };
    client
        .write(b"HTTP/1.1 200 Connection Established\r\n\r\n")
        .await?;
    let mut chunk = rest;
    loop {
        if !chunk.is_empty() && backend.send(wire::data(id, chunk)).await.is_err() {
            break;
        }
        let mut buffer = vec![0; CHUNK];
        let count = tokio::select! {
            count = read.read(&mut buffer) => count.unwrap_or(0),
            () = client.closed.notified() => 0,
        };
        if count == 0 {
            break;
        }
        buffer.truncate(count);
        chunk = Bytes::from(buffer);
    }
    let _ = backend.send(wire::close(id)).await;
    client.close().await;
    Ok(())
}

/// Takes a dial that came to nothing out of the table.
struct Forget<'a> {
    state: &'a State,
    random: i64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.state.remove_pending(self.random);
    }
}

fn random() -> i64 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(0) >> 1).cast_signed()
}

/// The first line of a request's head, and what came behind the head.
async fn head(read: &mut (impl AsyncReadExt + Unpin)) -> Result<(String, Bytes)> {
    let mut bytes = Vec::new();
    loop {
        let mut buffer = [0; LONGEST_HEAD];
        let count = read.read(&mut buffer).await?;
        bytes.extend_from_slice(&buffer[..count]);
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        if let Some(end) = end {
            let rest = Bytes::copy_from_slice(&bytes[end + 4..]);
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            return Ok((head.lines().next().unwrap_or_default().to_owned(), rest));
        }
        anyhow::ensure!(count > 0 && bytes.len() < LONGEST_HEAD, "no request");
    }
}
