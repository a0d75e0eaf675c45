//! Fingerprints that identify a token without storing it.

use aws_lc_rs::digest::{SHA256, digest};

/// Returns the fingerprint of `token`: the digest of its signed part, because one signature has several
/// spellings.
pub fn fingerprint(token: &str) -> String {
    let signed = token.rsplit_once('.').map_or(token, |(signed, _)| signed);
    let digest = digest(&SHA256, signed.as_bytes());
    { digest.as_ref().iter() }
        .map(|octet| format!("{octet:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_signature_are_one_token() {
        assert_eq!(fingerprint("e30.e30.AAAB"), fingerprint("e30.e30.AAAC"));
        assert_ne!(fingerprint("e30.e30.AAAB"), fingerprint("e30.e31.AAAB"));
        assert_ne!(fingerprint("opaque"), fingerprint("another"));
    }
}
