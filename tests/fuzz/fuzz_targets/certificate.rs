//! The identity in a certificate of an unverified peer: a result is a name in its one form.
#![no_main]

use libfuzzer_sys::fuzz_target;

// Without the crate that it belongs to, which brings everything else along.
#[allow(dead_code)]
#[path = "../../../tunnel-user/identity/src/identity.rs"]
mod identity;

use identity::{Identity, TrustDomain, check_name, name_of};

fuzz_target!(|data: &[u8]| {
    match Identity::from_certificate(data) {
        Ok(identity) => {
            assert_eq!(check_name(&identity.name), Ok(()));
            let domain = identity.trust_domain.as_str();
            assert_eq!(domain.parse(), Ok(identity.trust_domain.clone()));
            assert_eq!(identity.uri(), identity.to_string());
        }
        // It goes into the log, of an unknown peer.
        Err(error) => assert!(error.to_string().len() < 64 << 10),
    }
    let text = String::from_utf8_lossy(data);
    assert_eq!(check_name(&name_of(&text)), Ok(()));
    let _ = text.parse::<TrustDomain>();
});
