//! A server's session with an agent that sends anything at any time.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::{take_byte, take_piece};
use tunnel_proto::certificate::MAX_CSR;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{
    InstanceId, MAX_QUEUED, Refusal, ServerEvent, ServerSession, SessionError, Timers, Welcome,
};

fn welcome() -> Welcome {
    Welcome {
        version: VERSION,
        server_id: "s1".to_owned(),
        server_count: 1,
        instance_id: InstanceId([2; 16]),
        accepted: Vec::new(),
        refused: Vec::new(),
        heartbeat: Duration::from_secs(2),
        incarnation: 0,
    }
}

/// Answers all requests, and counts the Hellos.
fn answer(server: &mut ServerSession, now: Instant, hellos: &mut u32) -> Result<(), SessionError> {
    while let Some(event) = server.poll_event() {
        match event {
            ServerEvent::Hello(_) => {
                *hellos += 1;
                server.welcome(welcome(), now)?;
            }
            other => {
                assert_eq!(*hellos, 1, "{other:?} before the Hello");
                if let ServerEvent::CertificateRequest(csr) = &other {
                    assert!(csr.len() <= MAX_CSR);
                    server.certificate(&Err("none is issued here".to_owned()))?;
                } else if let ServerEvent::Offer(claims) = other {
                    let why = "not granted".to_owned();
                    let refused = claims.iter().map(|claim| Refusal {
                        claim: claim.to_string(),
                        why: why.clone(),
                    });
                    let refused = refused.collect();
                    server.verdict(claims, refused)?;
                }
            }
        }
    }
    Ok(())
}

fn run(mut data: &[u8]) -> Result<(), SessionError> {
    let mut now = Instant::now();
    let mut server = ServerSession::new(Timers::default(), now);
    let mut hellos = 0;
    while let Some(action) = take_byte(&mut data) {
        match action % 8 {
            0 => now += Duration::from_millis(u64::from(action) * 20),
            1 => server.note_traffic(now),
            2 => server.drain(Duration::from_secs(1), CloseReason::Shutdown)?,
            3 => while server.poll_transmit().is_some() {},
            4 => answer(&mut server, now, &mut hellos)?,
            _ => server.handle_bytes(take_piece(&mut data).unwrap_or_default(), now)?,
        }
        if server.poll_timeout().is_some_and(|due| due <= now) {
            server.handle_timeout(now)?;
            assert!(
                server.poll_timeout().is_none_or(|due| due > now),
                "due again at once"
            );
        }
    }
    answer(&mut server, now, &mut hellos)?;
    assert!(hellos <= 1);
    let queued: usize = std::iter::from_fn(|| server.poll_transmit())
        .map(|b| b.len())
        .sum();
    assert!(queued <= MAX_QUEUED);
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    if let Err(error) = run(data) {
        // Both are read by people and machines after every session.
        let _ = (error.reason(), error.to_string());
    }
});
