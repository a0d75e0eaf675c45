//! Switches off the offloads of a network device, as `ethtool -K` does.
//!
//! Over an ioctl, so that the benchmark needs no program for it. Sources: linux/ethtool.h and
//! linux/sockios.h.

use std::io;
use std::mem::size_of;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The set of strings that names features.
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a name.
const NAME: usize = 32;
/// Fields of `struct ethtool_get_features_block`: available, requested, active, `never_changed`.
const FIELDS: usize = 4;

/// Switches `feature` of `device` off, in the network namespace of this thread.
///
/// # Errors
///
/// There is no such device or feature, it can't be changed, or no root.
pub(super) fn disable(device: &str, feature: &str) -> Result<()> {
    let names = names(device)?;
    let position = names.iter().position(|name| name == feature);
    let bit = position.with_context(|| format!("the kernel knows no {feature}"))?;
    let blocks = names.len().div_ceil(32);

    // struct ethtool_sfeatures: cmd, size, then (valid, requested) for each 32 features.
    let mut set = vec![0; 2 + 2 * blocks];
    set[0] = ETHTOOL_SFEATURES;
    set[1] = blocks as u32;
    set[2 + 2 * (bit / 32)] = 1 << (bit % 32);
    call(device, &mut set)?;

    let mut get = vec![0; 2 + FIELDS * blocks];
    get[0] = ETHTOOL_GFEATURES;
    get[1] = blocks as u32;
    call(device, &mut get)?;
    let active = get[2 + FIELDS * (bit / 32) + 2];
    if active & 1 << (bit % 32) != 0 {
        bail!("{feature} of {device} stays on");
    }
    Ok(())
}

/// Returns the names of all features, by number.
fn names(device: &str) -> Result<Vec<String>> {
    // struct ethtool_sset_info: cmd, reserved, a mask of 64 bits, then a length for each bit.
    let mut info = vec![ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
    call(device, &mut info)?;
    let count = info[4] as usize;
    // struct ethtool_gstrings: cmd, string_set, len, then the names.
    let mut strings = vec![0; 3 + count * NAME / size_of::<u32>()];
    strings[0] = ETHTOOL_GSTRINGS;
    strings[1] = ETH_SS_FEATURES;
    strings[2] = count as u32;
    call(device, &mut strings)?;
    let bytes: Vec<u8> = strings[3..]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let name = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&bytes[..end.unwrap_or(NAME)]).into_owned()
    };
    Ok(bytes.chunks_exact(NAME).map(name).collect())
}

/// Runs one command in `words`, which also takes the answer.
fn call(device: &str, words: &mut [u32]) -> Result<()> {
    let any = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an ifreq of zeros is valid: no name, no address, no pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    for (to, from) in room.zip(device.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: the request and the words that it points to live through the call, and the words
    // have the size that their command names.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
    if result < 0 {
        let command = words.first().copied().unwrap_or_default();
        return Err(io::Error::last_os_error())
            .with_context(|| format!("ethtool command {command:#x} on {device}"));
    }
    Ok(())
}
