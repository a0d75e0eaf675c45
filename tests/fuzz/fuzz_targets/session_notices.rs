//! The sessions of a tunnel, with a peer that sends any notices at any time: none is confused with another one, and
//! none stays that the peer does not settle.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tunnel_fuzz::sessions::tunnel::run(data));
