//! Against the kernel: real sockets, packets made by hand.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn_proto::ConnectionIdGenerator;

use super::super::connection_id::Generator;
use super::super::udp::{bind, bind_to_share, widen};
use super::*;

const INITIAL: u8 = 0xc0;
const HANDSHAKE: u8 = 0xe0;

/// The sockets of as many shards as asked for.
struct Group(Vec<UdpSocket>);

impl Group {
    fn new(at: IpAddr, shards: usize) -> Self {
        let mut group = vec![bind_to_share((at, 0).into()).unwrap()];
        widen(&mut group, shards).unwrap();
        assert_eq!(group.len(), shards);
        steer(&group).unwrap();
        Self(group)
    }

    /// The socket at which `packet` arrives, sent from a port of its own.
    fn arrival(&self, to: IpAddr, packet: &[u8]) -> usize {
        let any = SocketAddr::new(
            match to {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            },
            0,
        );
        let client = UdpSocket::bind(any).unwrap();
        let port = self.0[0].local_addr().unwrap().port();
        client.send_to(packet, (to, port)).unwrap();
        // Loopback delivers within the call, but a loaded machine may have it done elsewhere.
        for _ in 0..1000 {
            for (index, socket) in self.0.iter().enumerate() {
                let mut received = [0; 64];
                match socket.recv_from(&mut received) {
                    Ok((length, from)) => {
                        assert_eq!(from.port(), client.local_addr().unwrap().port());
                        assert_eq!(&received[..length], packet);
                        return index;
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("it arrived nowhere");
    }
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn short(id: &[u8]) -> Vec<u8> {
    [&[0x40][..], id, &[0; 20]].concat()
}

fn long(kind: u8, id: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 1, id.len() as u8][..], id, &[0; 20]].concat()
}

/// An id as shard `shard` makes them.
fn id_of(shard: u8) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"key");
    Generator::new(key, "s1", shard).generate_cid().to_vec()
}

/// An id as an agent's tunnel `number` begins with.
fn chosen(spread: Spread, number: u8) -> Vec<u8> {
    spread.ids(number)().to_vec()
}

#[test]
fn packets_go_to_the_shard_that_made_their_id_wherever_they_come_from() {
    for shards in [2, 3, 5] {
        let group = Group::new(V4, shards);
        for shard in 0..shards {
            // Each arrival is from another port: as many NAT mappings.
            for _ in 0..4 {
                let id = id_of(shard as u8);
                assert_eq!(group.arrival(V4, &short(&id)), shard);
                assert_eq!(group.arrival(V4, &long(HANDSHAKE, &id)), shard);
                // Behind a Retry, or after the server's first flight.
                assert_eq!(group.arrival(V4, &long(INITIAL, &id)), shard);
            }
        }
    }
}

#[test]
fn both_families_are_steered_alike() {
    let group = Group::new(Ipv6Addr::UNSPECIFIED.into(), 3);
    for shard in 0..3 {
        let packet = short(&id_of(shard as u8));
        assert_eq!(group.arrival(V4, &packet), shard);
        assert_eq!(group.arrival(Ipv6Addr::LOCALHOST.into(), &packet), shard);
    }
}

#[test]
fn a_first_flight_stays_together_and_tunnels_land_apart() {
    let group = Group::new(V4, 3);
    let from = |first| Spread {
        first,
        length: CHOSEN,
    };
    let random = [Spread::random(false), Spread::random(true)];
    for spread in [from(0), from(77), from(u16::MAX)]
        .into_iter()
        .chain(random)
    {
        let mut landed: Vec<_> = (0..3)
            .map(|number| {
                let id = chosen(spread, number);
                let arrival = group.arrival(V4, &long(INITIAL, &id));
                assert_eq!(group.arrival(V4, &long(INITIAL, &id)), arrival);
                // A second attempt begins with another id, and lands at the same place.
                let again = chosen(spread, number);
                assert_ne!(again, id);
                assert_eq!(group.arrival(V4, &long(INITIAL, &again)), arrival);
                arrival
            })
            .collect();
        landed.sort_unstable();
        assert_eq!(landed, [0, 1, 2], "{spread:?}");
    }
}

#[test]
fn every_packet_arrives_somewhere() {
    let group = Group::new(V4, 3);
    let mut reached = [false; 3];
    // Ids that clients chose, among them such as look like ours, and of more shards than there are.
    for length in [0, 1, 8, 15, 16, 17, 20] {
        for first in 0..=20 {
            let id = vec![first; length];
            reached[group.arrival(V4, &long(INITIAL, &id))] = true;
            reached[group.arrival(V4, &short(&id))] = true;
        }
    }
    assert_eq!(reached, [true; 3]);
    for packet in [&[][..], &[0], &[0x40], &[0x80], &[0xc0, 0, 0, 0, 1, 16]] {
        group.arrival(V4, packet);
    }
}

#[test]
fn a_port_in_use_is_not_shared_with_strangers() {
    let group = Group::new(V4, 2);
    let taken = group.0[0].local_addr().unwrap();
    for bind in [bind, bind_to_share] {
        assert_eq!(bind(taken).unwrap_err().kind(), ErrorKind::AddrInUse);
    }
    // As a service manager passes one unless its unit says otherwise.
    let mut alone = vec![bind((V4, 0).into()).unwrap()];
    let refused = widen(&mut alone, 2).unwrap_err();
    assert_eq!((refused.kind(), alone.len()), (ErrorKind::AddrInUse, 1));
    steer(&alone).unwrap();
}

/// A successor opens its sockets while its predecessor serves, and may fail.
#[test]
fn further_sockets_get_packets_once_they_are_steered_to() {
    let mut group = Group::new(V4, 2);
    let packets = [0, 1, 2, 3].map(|shard| short(&id_of(shard)));
    let arrivals = |group: &Group| {
        let arrivals = packets.iter().map(|packet| group.arrival(V4, packet));
        arrivals.collect::<Vec<_>>()
    };
    widen(&mut group.0, 4).unwrap();
    assert_eq!(arrivals(&group), [0, 1, 0, 1]);
    group.0.truncate(2);
    assert_eq!(arrivals(&group), [0, 1, 0, 1]);
    widen(&mut group.0, 4).unwrap();
    steer(&group.0).unwrap();
    assert_eq!(arrivals(&group), [0, 1, 2, 3]);
    // Sockets that are not wanted any more may stay open for a while.
    steer(&group.0[..1]).unwrap();
    assert_eq!(arrivals(&group), [0, 0, 0, 0]);
    group.0.truncate(1);
    assert_eq!(arrivals(&group), [0, 0, 0, 0]);
    widen(&mut group.0, 2).unwrap();
    assert_eq!(arrivals(&group), [0, 0, 0, 0]);
}
