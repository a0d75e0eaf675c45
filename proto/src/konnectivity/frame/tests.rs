use proptest::prelude::*;

use super::*;

fn any_packet() -> impl Strategy<Value = Packet> {
    let id = || prop_oneof![Just(0), Just(1), Just(i64::MAX), any::<i64>()];
    let data = proptest::collection::vec(any::<u8>(), 0..5000);
    prop_oneof![
        (".{0,9}", ".{0,40}", id()).prop_map(|(protocol, address, random)| {
            Packet::DialRequest {
                protocol,
                address,
                random,
            }
        }),
        (".{0,40}", id(), id()).prop_map(|(error, connect_id, random)| Packet::DialResponse {
            error,
            connect_id,
            random,
        }),
        (id(), data).prop_map(|(connect_id, data)| Packet::Data {
            connect_id,
            data: data.into(),
        }),
        id().prop_map(|connect_id| Packet::CloseRequest { connect_id }),
        (".{0,40}", id())
            .prop_map(|(error, connect_id)| Packet::CloseResponse { error, connect_id }),
        id().prop_map(|random| Packet::CloseDial { random }),
        Just(Packet::Drain),
        (7..=i32::MAX).prop_map(Packet::Unknown),
    ]
}

/// Decodes everything in `input`, in pieces that end at `cuts`.
fn decode_all(input: &Bytes, cuts: &[usize]) -> (Vec<Packet>, Result<(), DecodeError>) {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(input.len());
    let mut decoder = Decoder::default();
    let mut packets = Vec::new();
    let mut start = 0;
    for end in cuts {
        let mut piece = input.slice(start..end);
        start = end;
        loop {
            match decoder.decode(&mut piece) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(error) => return (packets, Err(error)),
            }
        }
        assert!(piece.is_empty());
        assert!(decoder.partial.len() <= HEADER + MAX_MESSAGE);
    }
    (packets, Ok(()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn error(bytes: &'static [u8]) -> DecodeError {
    decode_all(&Bytes::from_static(bytes), &[]).1.unwrap_err()
}

/// The bytes of kube-apiserver and the agents of upstream.
#[test]
fn the_bytes_on_the_wire() {
    for (packet, bytes) in [
        (
            Packet::DialRequest {
                protocol: "tcp".into(),
                address: "10.0.0.1:443".into(),
                random: 300,
            },
            // No type: DIAL_REQ is 0.
            "0000000018".to_owned()
                + "1216"
                + "0a03746370"
                + "120c31302e302e302e313a343433"
                + "18ac02",
        ),
        (
            Packet::DialResponse {
                error: String::new(),
                connect_id: 1,
                random: 300,
            },
            "0000000009".to_owned() + "0801" + "1a05" + "1001" + "18ac02",
        ),
        (
            Packet::DialResponse {
                error: "no".into(),
                connect_id: 0,
                random: i64::MAX,
            },
            "0000000012".to_owned() + "0801" + "1a0e" + "0a026e6f" + "18ffffffffffffffff7f",
        ),
        (
            Packet::Data {
                connect_id: 1,
                data: Bytes::from_static(b"hi"),
            },
            // Type 4, field 4.
            "000000000a".to_owned() + "0804" + "2206" + "0801" + "1a026869",
        ),
        (
            Packet::CloseRequest { connect_id: 1 },
            // Type 2, field 5.
            "0000000006".to_owned() + "0802" + "2a02" + "0801",
        ),
        (
            Packet::CloseResponse {
                error: String::new(),
                connect_id: 1,
            },
            "0000000006".to_owned() + "0803" + "3202" + "1001",
        ),
        (
            Packet::CloseDial { random: 300 },
            "0000000007".to_owned() + "0805" + "3a03" + "08ac02",
        ),
        (Packet::Drain, "0000000004".to_owned() + "0806" + "4200"),
    ] {
        assert_eq!(hex(&packet.frame()), bytes, "{packet:?}");
    }
}

#[test]
fn a_payload_stays_where_it_was_received_unless_it_is_short() {
    for (length, stays) in [(100, false), (30_000, true)] {
        let packet = Packet::Data {
            connect_id: 1,
            data: vec![7; length].into(),
        };
        let mut input = packet.frame();
        let memory = input.as_ptr_range();
        let Some(Packet::Data { data, .. }) = Decoder::default().decode(&mut input).unwrap() else {
            panic!("not a DATA packet");
        };
        assert_eq!(memory.contains(&data.as_ptr()), stays, "{length} bytes");
    }
}

#[test]
fn what_no_sender_sends_is_refused() {
    assert_eq!(error(b"\x01\0\0\0\0"), DecodeError::Compressed);
    assert_eq!(error(b"\0\0\x40\0\x01"), DecodeError::TooLong(0x40_0001));
    // Without a payload, without type and payload, with another type's payload.
    assert_eq!(error(b"\0\0\0\0\x02\x08\x04"), DecodeError::Payload("DATA"));
    assert_eq!(error(b"\0\0\0\0\0"), DecodeError::Payload("DIAL_REQ"));
    assert_eq!(
        error(b"\0\0\0\0\x04\x08\x02\x22\0"),
        DecodeError::Payload("CLOSE_REQ")
    );
    // An address that is not UTF-8.
    assert!(matches!(
        error(b"\0\0\0\0\x05\x12\x03\x12\x01\xff"),
        DecodeError::Malformed(_)
    ));
}

#[test]
fn types_and_fields_to_come_are_ignored() {
    let known = Bytes::from_static(b"\0\0\0\0\x09\x08\x02\x2a\x02\x08\x01\x7a\x01x");
    assert_eq!(
        decode_all(&known, &[]).0,
        [Packet::CloseRequest { connect_id: 1 }]
    );
    let unknown = Bytes::from_static(b"\0\0\0\0\x05\x08\x07\x7a\x01x");
    assert_eq!(decode_all(&unknown, &[]).0, [Packet::Unknown(7)]);
}

#[test]
fn a_stream_may_end_between_messages_only() {
    let mut decoder = Decoder::default();
    let frame = Packet::Drain.frame();
    assert_eq!(decoder.decode(&mut frame.slice(..6)), Ok(None));
    assert!(!decoder.is_at_border());
    assert_eq!(
        decoder.decode(&mut frame.slice(6..)),
        Ok(Some(Packet::Drain))
    );
    assert!(decoder.is_at_border());
}

proptest! {
    #[test]
    fn packets_come_out_as_they_went_in(
        packets in proptest::collection::vec(any_packet(), 0..5),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let input: Vec<u8> = packets.iter().flat_map(|packet| packet.frame()).collect();
        prop_assert_eq!(decode_all(&input.into(), &cuts), (packets, Ok(())));
    }

    #[test]
    fn a_data_packet_is_its_head_and_its_payload(
        connect_id: i64,
        data in proptest::collection::vec(any::<u8>(), 1..300),
    ) {
        let mut bytes = data_head(connect_id, data.len()).to_vec();
        bytes.extend_from_slice(&data);
        let wire = wire::Packet {
            r#type: PacketType::Data as i32,
            payload: Some(wire::packet::Payload::Data(wire::Data {
                connect_id,
                error: String::new(),
                data: data.into(),
            })),
        };
        prop_assert_eq!(Bytes::from(bytes), frame(&wire));
    }

    #[test]
    fn dividing_the_input_changes_nothing(
        input in proptest::collection::vec(prop_oneof![0..9_u8, any::<u8>()], 0..200),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let input = Bytes::from(input);
        prop_assert_eq!(decode_all(&input, &cuts), decode_all(&input, &[]));
    }

    #[test]
    fn any_message_is_read_or_refused(message in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Packet::read(message.into());
    }
}
