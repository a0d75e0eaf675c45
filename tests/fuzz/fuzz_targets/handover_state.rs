//! The state that a process hands over, and what a keeper has of a connection: what is decoded can be encoded and
//! decoded again, and a restored session keeps its promises to any peer.
#![no_main]

use std::fmt::Debug;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use prometheus_client::registry::Registry;
use prost::Message;
use tunnel_fuzz::access::{ConnectionMeter, Record, Totals};
use tunnel_fuzz::metrics::DialMetrics;
use tunnel_fuzz::sessions::end::End;
use tunnel_fuzz::take_piece;
use tunnel_proto::handover::{self, KeptConnection, KeptProcess, Offer, Ready, Request, State};

/// Number of connections of a state that are restored: they are all alike.
const RESTORED: usize = 4;

fn metrics() -> &'static DialMetrics {
    static METRICS: OnceLock<DialMetrics> = OnceLock::new();
    METRICS.get_or_init(|| DialMetrics::register(&mut Registry::default()))
}

fn decode<M: Message + Default + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert_eq!(M::decode(&*message.encode_to_vec()).as_ref(), Ok(&message));
    Some(message)
}

/// Restores the record of a connection. Addresses and names have one form, and times go on.
fn restore(saved: &handover::Record) {
    let Some(mut record) = Record::restore(saved) else {
        return;
    };
    let again = record.save();
    let form = |saved: handover::Record| handover::Record {
        age: 0,
        connected: 0,
        ..saved
    };
    assert_eq!(again.client.is_empty(), saved.client.is_empty());
    let (client, destination) = (again.client.clone(), again.destination.clone());
    let expected = handover::Record {
        client,
        destination,
        ..saved.clone()
    };
    assert_eq!(form(again.clone()), form(expected));
    let restored = Record::restore(&again).expect("a process understands its own record");
    assert_eq!(form(restored.save()), form(again));
    // The connection goes on.
    let meter = ConnectionMeter::<true> {
        bytes: &record.bytes,
        totals: &Totals::default(),
        metrics: metrics(),
    };
    meter.up(1);
    meter.down(1);
    record.resumed(Duration::from_secs(1));
    assert_eq!(record.bytes.up.get(), saved.up + 1);
    assert!(record.resumptions >= saved.resumptions);
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let bytes = take_piece(&mut data).unwrap_or_default();
    decode::<Request>(bytes);
    decode::<Offer>(bytes);
    decode::<Ready>(bytes);
    decode::<KeptProcess>(bytes);
    if let Some(kept) = decode::<KeptConnection>(bytes) {
        kept.record.iter().for_each(restore);
    }
    let Some(state) = decode::<State>(bytes) else {
        return;
    };
    for connection in state.connections.iter().take(RESTORED) {
        let socket = connection.socket.as_ref();
        if let Some(record) = socket.and_then(|socket| socket.record.as_ref()) {
            restore(record);
        }
        let session = connection.session.as_ref();
        if let Some(end) = session.and_then(|it| End::restored(it, socket.is_some())) {
            end.run(data);
        }
    }
});
