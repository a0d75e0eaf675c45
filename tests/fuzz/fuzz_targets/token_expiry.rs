//! The expiry in an unverified token.
#![no_main]

use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;

// Without the crate that it belongs to, which brings everything else along.
#[path = "../../../tunnel-user/kubernetes/src/token/claims.rs"]
mod claims;

fuzz_target!(|data: &[u8]| {
    read(&String::from_utf8_lossy(data));
    // The text inside, so that not every input has to be base64 first.
    let payload = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, data);
    read(&format!("e30.{payload}.c2ln"));
});

fn read(token: &str) {
    let _ = claims::left(token);
    let (now, longest) = (SystemTime::UNIX_EPOCH, Duration::from_secs(86_400));
    assert!(claims::good_until(token, now, longest) <= now + longest);
}
