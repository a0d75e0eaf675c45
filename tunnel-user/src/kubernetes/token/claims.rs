//! The one claim of a token that is read here.
//!
//! Nothing is verified: that is the API server's part. A lie can only make us ask sooner.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

#[derive(Deserialize)]
struct Claims {
    /// Seconds since the epoch.
    exp: f64,
}

/// For how long `token` (RFC 7519) is good, by its own word. `None` when it does not say.
pub(super) fn left(token: &str) -> Option<Duration> {
    let payload = token.split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&json).ok()?;
    let now = SystemTime::UNIX_EPOCH.elapsed().ok()?;
    let left = claims.exp - now.as_secs_f64();
    Some(Duration::try_from_secs_f64(left).unwrap_or_default())
}

#[cfg(test)]
pub(super) fn expiring_in(seconds: f64) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let payload = serde_json::json!({ "sub": "x", "exp": now + seconds }).to_string();
    format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expiry_is_read() {
        let left_of = |seconds| left(&expiring_in(seconds)).unwrap().as_secs_f64();
        assert!((left_of(100.0) - 100.0).abs() < 2.0);
        assert_eq!(left_of(-5.0), 0.0);
        for strange in ["", "a.b", "a.e30.c", "opaque", "..", "a.!!.c"] {
            assert_eq!(left(strange), None, "{strange:?}");
        }
    }
}
