//! `transport`: the packets that a process sends between an agent and a server.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Connections that a server may hold open over one tunnel at once.
pub const MAX_DIALS: u32 = 8192;

/// Permitted sizes of an IP packet. The minimum of IPv6 on every path is enough for QUIC's 1200
/// bytes of payload; an IP header counts up to 65535.
const MTUS: RangeInclusive<u16> = 1280..=u16::MAX;

/// Permitted numbers of packets that the peer may gather before it acknowledges them.
const ACK_EVERY: RangeInclusive<u32> = 1..=64;

/// `transport`: the packets that a process sends between an agent and a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TransportConfig {
    /// The largest IP packet, or that it is searched for.
    pub mtu: Mtu,
    /// Largest size that is probed.
    pub max_mtu: u16,
    /// Congestion control.
    pub congestion: Congestion,
    /// Packets after which the other side acknowledges them at once.
    pub ack_every: u32,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            mtu: Mtu::Auto,
            max_mtu: 9000,
            congestion: Congestion::Cubic,
            ack_every: 2,
        }
    }
}

impl TransportConfig {
    /// Checks what serde can't check.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let bounds = |key: &'static str, range: &dyn fmt::Debug, remedy: &str| {
            let why = format!("must be in {range:?}{remedy}");
            Err(ConfigError::value(key, why))
        };
        if let Mtu::Fixed(mtu) = self.mtu
            && !MTUS.contains(&mtu)
        {
            let remedy = ", the size of an IP packet in bytes, or auto";
            return bounds("transport.mtu", &MTUS, remedy);
        }
        if !MTUS.contains(&self.max_mtu) {
            let remedy = ", the size of an IP packet in bytes";
            return bounds("transport.max_mtu", &MTUS, remedy);
        }
        if !ACK_EVERY.contains(&self.ack_every) {
            return bounds("transport.ack_every", &ACK_EVERY, " packets");
        }
        Ok(())
    }
}

/// The largest IP packet that is sent, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mtu {
    /// Finds the size by probing.
    #[default]
    Auto,
    /// Uses this size without probing.
    Fixed(u16),
}

impl Serialize for Mtu {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => s.serialize_str("auto"),
            Self::Fixed(size) => s.serialize_u16(*size),
        }
    }
}

impl<'de> Deserialize<'de> for Mtu {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = Mtu;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("auto or the size of an IP packet in bytes, such as 1400")
            }

            fn visit_u64<E: Error>(self, size: u64) -> Result<Mtu, E> {
                u16::try_from(size).map(Mtu::Fixed).map_err(E::custom)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Mtu, E> {
                match text {
                    "auto" => Ok(Mtu::Auto),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }
        }
        d.deserialize_any(Size)
    }
}

/// Congestion control.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// CUBIC (RFC 9438), as the kernel's TCP by default.
    #[default]
    Cubic,
    /// BBR, version 1: by measured bandwidth instead of losses.
    Bbr,
    /// NewReno (RFC 9002).
    NewReno,
}
