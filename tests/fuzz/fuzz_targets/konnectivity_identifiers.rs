//! The identifiers of Konnectivity's agents, and the texts of dial errors: a parsed value has one
//! form, which parses to the same value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_proto::konnectivity::{Identifiers, MAX_IDENTIFIERS, text};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let (identifiers, _) = Identifiers::parse_lenient(&text);
    assert!(identifiers.claims().len() <= MAX_IDENTIFIERS);
    let again = Identifiers::parse_strict(&identifiers.to_string());
    assert_eq!(again, Ok((identifiers, Vec::new())));

    let reason = text::reason(&text);
    assert_eq!(text::reason(&text::go_error(&text, reason, &text)), reason);
});
