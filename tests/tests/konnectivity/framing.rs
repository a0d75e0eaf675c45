//! Requests that are HTTP/2 but not what gRPC is, on both gRPC ports of a proxy-server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use prost::Message;
use tokio::time::timeout;
use tonic::Code;
use tonic::body::Body;

use crate::client::Client;
use crate::scene::{Scene, agents, each_server};
use crate::script::SOON;
use crate::wire::{self, CONNECT, PROXY};

/// Types of frames and a flag, RFC 9113, 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_HEADERS: u8 = 4;

/// Answer to a request.
#[derive(Debug, PartialEq)]
struct Answer {
    http: StatusCode,
    grpc: Option<i32>,
}

/// Sends one request with this body and ends it; gives the answer, at its end.
async fn ask(client: Client, path: &str, kind: &str, body: &'static [u8]) -> Result<Answer> {
    let request = Request::post(format!("http://localhost{path}"))
        .header("content-type", kind)
        .header("te", "trailers")
        .header("agentid", "a")
        .body(Body::new(Full::new(Bytes::from_static(body))))?;
    let answered = async {
        let (head, body) = client.raw(request).await?.into_parts();
        let trailers = body
            .collect()
            .await?
            .trailers()
            .cloned()
            .unwrap_or_default();
        let status = head
            .headers
            .get("grpc-status")
            .or_else(|| trailers.get("grpc-status"));
        let grpc = match status {
            Some(value) => Some(value.to_str()?.parse()?),
            None => None,
        };
        Ok(Answer {
            http: head.status,
            grpc,
        })
    };
    // Who waits for more than was sent waits for ever.
    timeout(SOON, answered).await?
}

/// Both ports refuse these requests, and a correct client understands the answer.
#[test]
fn what_is_not_grpc_is_refused() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let grpc = "application/grpc";
        let ports = [("frontend", PROXY), ("agents", CONNECT)];
        for (port, path) in ports {
            let ask = |path: &str, kind: &str, body: &'static [u8]| -> Result<Answer> {
                let (path, kind) = (path.to_owned(), kind.to_owned());
                let place = if port == "agents" {
                    &scene.workers[0]
                } else {
                    &scene.control_plane
                };
                let client = connect(scene, port)?;
                place.run(async move { ask(client, &path, &kind, body).await })
            };
            let code = |answer: &Answer| answer.grpc.map(Code::from_i32);
            for unknown in ["/AgentService/Nothing", "/Nothing/Connect"] {
                let answer = ask(unknown, grpc, b"")?;
                ensure!(
                    code(&answer) == Some(Code::Unimplemented),
                    "{port}: {unknown}: {answer:?}"
                );
            }
            let answer = ask(path, "text/plain", b"")?;
            ensure!(
                answer.http == StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "{port}: {answer:?}"
            );
            let broken: [(&str, &[u8]); 4] = [
                ("compressed", b"\x01\x00\x00\x00\x02\x08\x06"),
                ("not a message", b"\x00\x00\x00\x00\x04\xff\xff\xff\xff"),
                ("a length of 4 GiB", b"\x00\xff\xff\xff\xff\x08\x04"),
                (
                    "a field that is longer than its message",
                    b"\x00\x00\x00\x00\x02\x22\x7f",
                ),
            ];
            for (what, body) in broken {
                // A reset is a refusal as well.
                let answer = ask(path, grpc, body);
                let taken = answer
                    .as_ref()
                    .is_ok_and(|answer| code(answer) == Some(Code::Ok));
                ensure!(!taken, "{port}: {what}: {answer:?}");
            }
        }
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut client = scene.script_client()?;
        client.send(wire::dial("10.99.1.2:7001", 1))?;
        agent.accept(1)?;
        client.dial_response().map(drop)
    })
}

fn connect(scene: &Scene, port: &str) -> Result<Client> {
    if port == "agents" {
        let tls = scene.agent.client()?;
        return scene.workers[0].run(Client::tls(agents().to_string(), tls));
    }
    let socket = scene.frontend("grpc");
    scene.control_plane.run(Client::unix(socket))
}

/// A message may come in as many pieces as it likes, and several in one.
#[test]
fn messages_need_not_match_frames() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut client = scene.script_client()?;
        let id = {
            client.send(wire::dial("10.99.1.2:7001", 1))?;
            agent.accept(1)?;
            client.dial_response()?.connect_id
        };
        // Many small ones in a row are joined by HTTP/2, one of a megabyte is cut.
        for n in 0..2000_u16 {
            client.send(wire::data(id, n.to_be_bytes().to_vec()))?;
        }
        let all = agent.data(1, 4000)?;
        let expected: Vec<u8> = (0..2000_u16).flat_map(u16::to_be_bytes).collect();
        ensure!(all == expected, "packets were lost, doubled or exchanged");
        std::thread::sleep(Duration::from_millis(50));
        agent.quiet()
    })
}

/// grpc-go names a server on a Unix socket by the socket's path, percent-encoded, which is no
/// authority by the letter of HTTP. It is what an API server sends.
#[test]
fn a_unix_socket_is_named_by_its_path() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut stream = UnixStream::connect(scene.frontend("grpc"))?;
        stream.set_read_timeout(Some(SOON))?;
        // HPACK, without Huffman's code and without the table: :method and :scheme by index, the
        // others as literals.
        let mut head = vec![0x83, 0x86];
        for (name, value) in [
            (&b"\x04"[..], PROXY),
            (b"\x01", "%2Frun%2Fkonnectivity%2Fserver.sock"),
            (b"\x00\x0ccontent-type", "application/grpc"),
            (b"\x00\x02te", "trailers"),
        ] {
            head.extend_from_slice(name);
            head.push(u8::try_from(value.len())?);
            head.extend_from_slice(value.as_bytes());
        }
        let message = wire::dial("10.99.1.2:7001", 1).encode_to_vec();
        let mut data = vec![0];
        data.extend(u32::try_from(message.len())?.to_be_bytes());
        data.extend(message);
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
        for (kind, flags, id, payload) in [
            (SETTINGS, 0, 0, &[][..]),
            (HEADERS, END_HEADERS, 1, &head),
            (DATA, 0, 1, &data),
        ] {
            let length = u32::try_from(payload.len())?.to_be_bytes();
            stream.write_all(&length[1..])?;
            stream.write_all(&[kind, flags, 0, 0, 0, id])?;
            stream.write_all(payload)?;
        }
        loop {
            let mut frame = [0; 9];
            stream.read_exact(&mut frame)?;
            let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
            let mut payload = vec![0; usize::try_from(length)?];
            stream.read_exact(&mut payload)?;
            match frame[3] {
                DATA => {
                    let text = String::from_utf8_lossy(&payload);
                    ensure!(text.contains("No agent available"), "{text:?}");
                    return Ok(());
                }
                RST_STREAM | GOAWAY => bail!("refused with {payload:?}"),
                _ => (),
            }
        }
    })
}
