//! Bytes between a socket and a stream, in the two ways of quinn.

use std::io::IoSlice;

use anyhow::Result;
use bytes::{Buf, Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// Received chunks that are written at once.
const BATCH: usize = 32;

/// Way to hand bytes to quinn.
#[derive(Clone, Copy)]
pub(super) enum Variant {
    /// Through a buffer a direction, as [`tokio::io::copy`] does.
    Copy,
    /// Owned chunks, allocated when there is something to read.
    Chunks,
}

impl Variant {
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "copy" => Some(Self::Copy),
            "chunks" => Some(Self::Chunks),
            _ => None,
        }
    }
}

/// Relays both directions until both have ended.
pub(super) async fn both(
    socket: TcpStream,
    send: SendStream,
    recv: RecvStream,
    variant: Variant,
) -> Result<()> {
    let (read, write) = socket.into_split();
    match variant {
        Variant::Copy => tokio::try_join!(copy_out(read, send), copy_in(recv, write))?,
        Variant::Chunks => tokio::try_join!(chunks_out(read, send), chunks_in(recv, write))?,
    };
    Ok(())
}

async fn copy_out(mut read: OwnedReadHalf, mut send: SendStream) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read.read(&mut buffer).await? {
            0 => return Ok(send.finish()?),
            count => send.write_all(&buffer[..count]).await?,
        }
    }
}

async fn copy_in(mut recv: RecvStream, mut write: OwnedWriteHalf) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    while let Some(count) = recv.read(&mut buffer).await? {
        write.write_all(&buffer[..count]).await?;
    }
    Ok(write.shutdown().await?)
}

async fn chunks_out(read: OwnedReadHalf, mut send: SendStream) -> Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        // An idle connection holds no buffer.
        read.readable().await?;
        buffer.reserve(CHUNK);
        match read.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(send.finish()?),
            Ok(_) => send.write_chunk(buffer.split().freeze()).await?,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                buffer = BytesMut::new();
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn chunks_in(mut recv: RecvStream, mut write: OwnedWriteHalf) -> Result<()> {
    let mut chunks = [const { Bytes::new() }; BATCH];
    while let Some(count) = recv.read_chunks(&mut chunks).await? {
        let mut first = 0;
        while first < count {
            let slices: [_; BATCH] = std::array::from_fn(|n| IoSlice::new(&chunks[n]));
            let mut written = write.write_vectored(&slices[first..count]).await?;
            while first < count && written >= chunks[first].len() {
                written -= chunks[first].len();
                chunks[first] = Bytes::new();
                first += 1;
            }
            if first < count {
                chunks[first].advance(written);
            }
        }
    }
    Ok(write.shutdown().await?)
}
