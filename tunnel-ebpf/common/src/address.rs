//! Addresses and endpoints in the one form that all maps use.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The third word of a v4-mapped address in memory.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv6 address, or an IPv4 address in v4-mapped form: four words in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// The v4-mapped form of an IPv4 address in network order.
    #[inline(always)]
    pub const fn mapped(v4: u32) -> Self {
        Self([0, 0, MAPPED, v4])
    }

    /// The sixteen bytes.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 16] {
        // SAFETY: both are sixteen initialised bytes.
        unsafe { core::mem::transmute(self.0) }
    }

    /// Whether this is an IPv4 address in v4-mapped form.
    #[inline(always)]
    pub const fn is_mapped(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let (words, _) = octets.as_chunks::<4>();
        let mut address = [0; 4];
        for (word, bytes) in address.iter_mut().zip(words) {
            *word = u32::from_ne_bytes(*bytes);
        }
        Self(address)
    }
}

impl From<Address> for IpAddr {
    /// Converts an address. A v4-mapped address becomes the IPv4 address that it stands for.
    fn from(address: Address) -> Self {
        Self::V6(Ipv6Addr::from(address.octets())).to_canonical()
    }
}

/// Address and TCP port. Port 0 means none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, in host order, at most 65535.
    pub port: u32,
}

impl Endpoint {
    /// No endpoint.
    pub const NONE: Self = Self {
        address: Address([0; 4]),
        port: 0,
    };
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self {
            address: address.ip().into(),
            port: address.port().into(),
        }
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.address.into(), endpoint.port as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_there_and_back() {
        for text in [
            "10.99.1.2:10250",
            "[2001:db8::1]:443",
            "0.0.0.0:1",
            "[::1]:65535",
        ] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(SocketAddr::from(Endpoint::from(address)), address);
        }
    }

    #[test]
    fn a_mapped_address_is_the_same_as_its_ipv4_address() {
        let v4: IpAddr = "10.1.2.3".parse().unwrap();
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        assert_eq!(Address::from(v4), Address::from(mapped));
        assert_eq!(IpAddr::from(Address::from(mapped)), v4);
        assert!(Address::from(v4).is_mapped());
        assert!(!Address::from("::1".parse::<IpAddr>().unwrap()).is_mapped());
        assert_eq!(
            Address::mapped(u32::from_ne_bytes([10, 1, 2, 3])),
            Address::from(v4)
        );
    }

    #[test]
    fn bytes_lie_in_network_order() {
        let address = Address::from("2001:db8::1".parse::<IpAddr>().unwrap());
        assert_eq!(address.0[0].to_ne_bytes(), [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(address.0[3].to_ne_bytes(), [0, 0, 0, 1]);
    }
}
