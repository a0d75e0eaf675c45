//! HTTP/2 against the port of Konnectivity's agents, behind TLS with a genuine certificate.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::peer;
use crate::{Aim, WHILE};

/// Frames of one flood at most.
const FRAMES: usize = 200_000;
/// Number of frames in one write.
const BATCH: usize = 200;
/// Duration of one flood, and maximum wait of a write.
const EACH: Duration = Duration::from_millis(700);

const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;

/// `:method POST`, `:scheme https`, `:path /`, `:authority x` (RFC 7541, appendix A).
const BLOCK: &[u8] = &[0x83, 0x87, 0x84, 0x41, 1, b'x'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Floods with streams that are reset at once, streams left open, pings, settings, headers without
/// end, and garbage. Reads only what TLS itself needs.
pub(crate) fn floods(aim: &Aim) -> Result<()> {
    let begun = Instant::now();
    type Flood = fn(u32) -> Vec<u8>;
    let floods: [(&str, Flood); 6] = [
        ("rapid resets", |n| {
            let stream = 2 * n + 1;
            let reset = frame(RESET, 0, stream, &8_u32.to_be_bytes());
            [frame(HEADERS, 4, stream, BLOCK), reset].concat()
        }),
        ("streams", |n| frame(HEADERS, 4, 2 * n + 1, BLOCK)),
        ("pings", |_| frame(PING, 0, 0, &[0; 8])),
        ("settings", |_| frame(SETTINGS, 0, 0, &[])),
        ("continuations", |n| match n {
            0 => frame(HEADERS, 0, 1, BLOCK),
            _ => frame(CONTINUATION, 0, 1, &[0x40, 1, b'a', 1, b'b']),
        }),
        ("garbage", |n| frame(n as u8, 0xff, n, &[0xff; 100])),
    ];
    for (name, flood) in floods {
        let mut stream = connect(aim)?;
        let flooding = Instant::now();
        let mut sent = 0;
        let mut ended = false;
        let opened = [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            &frame(SETTINGS, 0, 0, &[])[..],
        ]
        .concat();
        stream.write_all(&opened)?;
        while sent < FRAMES && flooding.elapsed() < EACH && begun.elapsed() < 2 * WHILE {
            let batch: Vec<u8> = (sent..sent + BATCH).flat_map(|n| flood(n as u32)).collect();
            // Ended, or what was sent is not taken: both are an answer.
            if stream
                .write_all(&batch)
                .and_then(|()| stream.flush())
                .is_err()
            {
                ended = true;
                break;
            }
            sent += BATCH;
        }
        aim.tally.add(format!("{name} sent"), sent as u64);
        if !ended {
            // All that it had to say comes before the end; a reader that waits is not ended.
            let mut rest = vec![0; 64 << 10];
            let reading = Instant::now();
            while reading.elapsed() < 2 * EACH {
                match stream.read(&mut rest) {
                    Ok(0) => ended = true,
                    Ok(_) => continue,
                    Err(error) => ended = !matches!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
                break;
            }
        }
        aim.tally
            .one(if ended { "ended by the server" } else { "kept" });
    }
    Ok(())
}

fn connect(aim: &Aim) -> Result<StreamOwned<ClientConnection, TcpStream>> {
    let credentials = aim.credentials()?;
    let tls = peer::client_tls(Some(&credentials), b"h2")?;
    let name = ServerName::from(aim.server.ip());
    let session = ClientConnection::new(Arc::new(tls), name)?;
    let stream = TcpStream::connect_timeout(&aim.server, WHILE)?;
    stream.set_write_timeout(Some(EACH))?;
    stream.set_read_timeout(Some(EACH))?;
    aim.tally.one("connections");
    Ok(StreamOwned::new(session, stream))
}
