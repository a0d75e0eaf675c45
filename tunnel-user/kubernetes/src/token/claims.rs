//! Claims of a token that are read here.
//!
//! This module verifies nothing: that is the API server's part. Before that, a lie can only cause an
//! earlier review.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

#[derive(Deserialize)]
struct Claims {
    /// Seconds since the epoch.
    exp: f64,
}

/// Returns the remaining validity of `token` (RFC 7519) by its own claim. `None` when it has none.
pub(super) fn left(token: &str) -> Option<Duration> {
    let now = SystemTime::UNIX_EPOCH.elapsed().ok()?;
    let left = expiry(token)? - now.as_secs_f64();
    Some(Duration::try_from_secs_f64(left).unwrap_or_default())
}

/// Returns the end of `token`'s validity, at most `longest` from `now`, which is also the result
/// without a claim.
pub fn good_until(token: &str, now: SystemTime, longest: Duration) -> SystemTime {
    let end = expiry(token).and_then(|exp| Duration::try_from_secs_f64(exp).ok());
    let end = end.and_then(|end| SystemTime::UNIX_EPOCH.checked_add(end));
    end.map_or(now + longest, |end| end.min(now + longest))
}

fn expiry(token: &str) -> Option<f64> {
    let payload = token.split('.').nth(1)?;
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&json).ok()?;
    Some(claims.exp)
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

    #[test]
    fn the_end_is_bounded() {
        let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
        let end = |token: &str| good_until(token, now, day);
        assert_eq!(end("opaque"), now + day);
        assert_eq!(end(&expiring_in(1e300)), now + day);
        assert!(end(&expiring_in(100.0)) < now + day / 2);
    }
}
