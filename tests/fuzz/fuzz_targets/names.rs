//! Destinations and claims as text: a parsed value has one form, which parses to the same value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_proto::control::Offer;
use tunnel_proto::preface::Destination;
use tunnel_proto::route::{from_offer, to_offer};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    if let Ok(destination) = text.parse::<Destination>() {
        assert_eq!(destination.to_string().parse(), Ok(destination));
    }

    // One entry a line, its first character saying to which list it belongs.
    let mut offer = Offer::default();
    for line in text.lines() {
        let mut characters = line.chars();
        let list = match characters.next() {
            Some('a') => &mut offer.addresses,
            Some('c') => &mut offer.cidrs,
            Some('n') => &mut offer.names,
            _ => {
                offer.default_route = true;
                continue;
            }
        };
        list.push(characters.as_str().to_owned());
    }
    if let Ok(claims) = from_offer(&offer) {
        assert_eq!(from_offer(&to_offer(&claims)), Ok(claims));
    }
});
