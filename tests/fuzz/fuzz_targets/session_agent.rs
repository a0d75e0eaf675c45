//! An agent's session with a server that sends anything at any time.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::{take_byte, take_piece};
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{
    AgentEvent, AgentSession, Hello, InstanceId, MAX_QUEUED, SessionError, Timers,
};

fn hello() -> Hello {
    Hello {
        version: VERSION,
        agent_id: "w1".to_owned(),
        instance_id: InstanceId([1; 16]),
        node: "worker-1".to_owned(),
        software_version: "0.1.0".to_owned(),
        features: Vec::new(),
        offer: vec![Claim::DefaultRoute],
        predecessor: None,
        incarnation: 0,
    }
}

fn run(mut data: &[u8]) -> Result<(), SessionError> {
    let mut now = Instant::now();
    let mut agent = AgentSession::new(hello(), Timers::default(), now)?;
    let mut welcomes = 0;
    while let Some(action) = take_byte(&mut data) {
        match action % 8 {
            0 => now += Duration::from_millis(u64::from(action) * 20),
            1 => agent.note_traffic(now),
            2 => agent.drain(Duration::from_secs(1), CloseReason::Shutdown)?,
            3 => while agent.poll_transmit().is_some() {},
            4 => agent.offer(vec![Claim::DefaultRoute; usize::from(action)])?,
            _ => agent.handle_bytes(take_piece(&mut data).unwrap_or_default(), now)?,
        }
        if agent.poll_timeout().is_some_and(|due| due <= now) {
            agent.handle_timeout(now)?;
            assert!(
                agent.poll_timeout().is_none_or(|due| due > now),
                "due again at once"
            );
        }
        while let Some(event) = agent.poll_event() {
            if let AgentEvent::Welcomed(welcome) = &event {
                assert!(welcome.server_count > 0);
                welcomes += 1;
            }
            assert_eq!(welcomes, 1, "{event:?}");
        }
    }
    let queued: usize = std::iter::from_fn(|| agent.poll_transmit())
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
