//! An end of a session with a peer that sends anything at any time, over any number of tunnels and processes: the kept
//! bytes are bounded and complete, and an ended session stays ended.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::sessions::end::End;

fuzz_target!(|data: &[u8]| End::new().run(data));
