//! Control data of recvmsg(2) beside a datagram: its source, its destination, the ECN mark, and the
//! size of the datagrams that it is to be split into.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use quinn_udp::{EcnCodepoint, RecvMeta};

/// Size of the header of a control message (`struct cmsghdr`), in bytes, a multiple of its alignment.
const HEADER: usize = size_of::<libc::cmsghdr>();

/// Parses `name` and `control` of a batch of `length` bytes. Returns `None` if it has no source.
pub(super) fn meta(name: &[u8], control: &[u8], length: usize) -> Option<RecvMeta> {
    let mut meta = RecvMeta {
        addr: address(name)?,
        len: length,
        stride: length,
        ..RecvMeta::default()
    };
    for (level, kind, data) in Messages(control) {
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_TOS | libc::IP_RECVTOS) => {
                meta.ecn = EcnCodepoint::from_bits(*data.first()?);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                meta.ecn = EcnCodepoint::from_bits(i32::from_ne_bytes(head(data)?) as u8);
            }
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // in_pktinfo: interface, our address, the one in the packet.
                let to: [u8; 4] = head(data.get(8..)?)?;
                meta.dst_ip = Some(Ipv4Addr::from(to).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                let to: [u8; 16] = head(data)?;
                meta.dst_ip = Some(Ipv6Addr::from(to).into());
            }
            (libc::SOL_UDP, libc::UDP_GRO) => {
                meta.stride = usize::try_from(i32::from_ne_bytes(head(data)?)).ok()?;
            }
            _ => {}
        }
    }
    Some(meta)
}

/// Parses a `struct sockaddr_in` or `sockaddr_in6`.
fn address(name: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(head(name.get(2..)?)?);
    match i32::from(u16::from_ne_bytes(head(name)?)) {
        libc::AF_INET => {
            let ip: [u8; 4] = head(name.get(4..)?)?;
            Some(SocketAddr::new(IpAddr::V4(ip.into()), port))
        }
        libc::AF_INET6 => {
            let flow = u32::from_ne_bytes(head(name.get(4..)?)?);
            let ip: [u8; 16] = head(name.get(8..)?)?;
            let scope = u32::from_ne_bytes(head(name.get(24..)?)?);
            Some(SocketAddrV6::new(ip.into(), port, flow, scope).into())
        }
        _ => None,
    }
}

fn head<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.first_chunk().copied()
}

/// An iterator over control messages, one behind the other (cmsg(3)).
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = (i32, i32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let whole = self.0;
        let length = usize::from_ne_bytes(head(whole)?);
        let level = i32::from_ne_bytes(head(whole.get(size_of::<usize>()..)?)?);
        let kind = i32::from_ne_bytes(head(whole.get(size_of::<usize>() + 4..)?)?);
        let data = whole.get(HEADER..length)?;
        self.0 = whole
            .get(length.next_multiple_of(size_of::<usize>())..)
            .unwrap_or_default();
        Some((level, kind, data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(level: i32, kind: i32, data: &[u8]) -> Vec<u8> {
        let mut bytes = (HEADER + data.len()).to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(size_of::<usize>()), 0);
        bytes
    }

    #[test]
    fn all_that_the_kernel_says_is_read() {
        let mut name = (libc::AF_INET as u16).to_ne_bytes().to_vec();
        name.extend([0x12, 0x34, 10, 0, 0, 1]);
        let mut control = message(libc::IPPROTO_IP, libc::IP_TOS, &[0b10]);
        control.extend(message(
            libc::IPPROTO_IP,
            libc::IP_PKTINFO,
            &[1, 0, 0, 0, 9, 9, 9, 9, 10, 0, 0, 2],
        ));
        control.extend(message(
            libc::SOL_UDP,
            libc::UDP_GRO,
            &1200i32.to_ne_bytes(),
        ));
        let meta = meta(&name, &control, 5000).unwrap();
        assert_eq!(meta.addr, "10.0.0.1:4660".parse().unwrap());
        assert_eq!(meta.dst_ip, Some("10.0.0.2".parse().unwrap()));
        assert_eq!((meta.len, meta.stride), (5000, 1200));
        assert_eq!(meta.ecn, Some(EcnCodepoint::Ect0));
    }

    #[test]
    fn what_is_cut_short_is_no_message() {
        let whole = message(libc::SOL_UDP, libc::UDP_GRO, &1200i32.to_ne_bytes());
        for length in 0..HEADER + 4 {
            assert_eq!(Messages(&whole[..length]).count(), 0, "{length}");
        }
        assert!(meta(&[], &whole, 1).is_none());
        let mut endless = whole;
        endless[..8].fill(0);
        assert_eq!(Messages(&endless).count(), 0);
    }
}
