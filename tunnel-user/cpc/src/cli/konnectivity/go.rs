//! Values in the syntax of Go's command lines (packages `strconv` and `time`).

use std::time::Duration;

/// The longest duration of Go, in nanoseconds: 292 years.
const LONGEST: u64 = i64::MAX as u64;

/// Text that is no value of its kind.
#[derive(Debug, thiserror::Error)]
pub(super) enum GoError {
    /// No duration.
    #[error("{0:?} is no duration: 1h0m0s, 1.5h and 300ms are")]
    Duration(String),
    /// A duration below zero.
    #[error("{0:?} is below zero")]
    Negative(String),
    /// No boolean.
    #[error("{0:?} is neither true nor false")]
    Bool(String),
    /// No integer.
    #[error("{0:?} is no integer")]
    Integer(String),
    /// An integer below one.
    #[error("{0:?} must be greater than 0")]
    Positive(String),
}

/// Parses a duration like `time.ParseDuration`, but rejects negative ones.
///
/// # Errors
/// [`GoError::Duration`], [`GoError::Negative`].
pub(super) fn duration(text: &str) -> Result<Duration, GoError> {
    let wrong = || GoError::Duration(text.into());
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let mut total = 0_u64;
    if rest != "0" {
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let unit_at = rest.find(|c: char| !is_number(c)).ok_or_else(wrong)?;
            let (number, tail) = rest.split_at(unit_at);
            let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
            let part = nanoseconds(number, unit).ok_or_else(wrong)?;
            total = total.checked_add(part).ok_or_else(wrong)?;
            rest = tail;
        }
    }
    match total {
        1.. if negative => Err(GoError::Negative(text.into())),
        0..=LONGEST => Ok(Duration::from_nanos(total)),
        _ => Err(wrong()),
    }
}

fn is_number(c: char) -> bool {
    c == '.' || c.is_ascii_digit()
}

/// Returns `None` for an invalid number or unit, and for too long a duration.
fn nanoseconds(number: &str, unit: &str) -> Option<u64> {
    let unit: u64 = match unit {
        "ns" => 1,
        // Micro sign and Greek letter mu.
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(fraction) {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    // Each digit is worth a tenth of the one before it, until that is less than a nanosecond.
    let tenths = fraction.bytes().scan(unit, |worth, digit| {
        *worth /= 10;
        Some(*worth * u64::from(digit - b'0'))
    });
    whole.checked_mul(unit)?.checked_add(tenths.sum())
}

/// Parses a boolean like `strconv.ParseBool`.
///
/// # Errors
/// [`GoError::Bool`].
pub(super) fn boolean(text: &str) -> Result<bool, GoError> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(GoError::Bool(text.into())),
    }
}

/// Parses an integer like `strconv.ParseInt` with base 0: `8091`, `0x1f9b`, `0o17`, `017`, `0b1`,
/// `1_000`.
///
/// # Errors
/// [`GoError::Integer`].
pub(super) fn integer(text: &str) -> Result<i64, GoError> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (base, digits) = [("0x", 16), ("0o", 8), ("0b", 2), ("0", 8)]
        .into_iter()
        .find_map(|(prefix, base)| Some((base, lower.strip_prefix(prefix)?)))
        .filter(|(_, digits)| !digits.is_empty())
        .unwrap_or((10, &lower));
    let plain = digits.replace('_', "");
    // `from_str_radix` takes a sign of its own.
    let unsigned = plain.starts_with(|c: char| c.is_ascii_alphanumeric());
    i64::from_str_radix(&format!("{sign}{plain}"), base)
        .ok()
        .filter(|_| unsigned)
        .ok_or_else(|| GoError::Integer(text.into()))
}

/// Parses an integer above zero.
///
/// # Errors
/// [`GoError::Integer`], [`GoError::Positive`].
pub(super) fn positive(text: &str) -> Result<i64, GoError> {
    let number = integer(text)?;
    let positive = Some(number).filter(|number| *number > 0);
    positive.ok_or_else(|| GoError::Positive(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("-0", 0),
            ("0s", 0),
            ("300ms", 300_000_000),
            ("1h0m0s", 3_600_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("+5s", 5_000_000_000),
            ("2m3.25s", 123_250_000_000),
            ("1us2\u{b5}s3\u{3bc}s4ns", 6_004),
            ("0.0000000009s", 0),
            ("9223372036854775807ns", LONGEST),
        ] {
            let parsed = duration(text).unwrap();
            assert_eq!(parsed, Duration::from_nanos(nanoseconds), "{text:?}");
        }
        for wrong in [
            "",
            "-",
            "5",
            "s",
            ".s",
            "1.2.3s",
            "1d",
            "1 s",
            "1h 5m",
            "one",
            "9223372036854775808ns",
            "99999999999999999999h",
            "2562048h",
        ] {
            let error = duration(wrong).unwrap_err();
            assert!(matches!(error, GoError::Duration(_)), "{wrong:?}: {error}");
        }
        assert!(matches!(duration("-1s"), Err(GoError::Negative(_))));
    }

    #[test]
    fn booleans() {
        assert!(boolean("T").unwrap() && boolean("1").unwrap());
        assert!(!boolean("False").unwrap());
        for wrong in ["", "yes", "tRUE", "2"] {
            assert!(boolean(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn integers() {
        for (text, number) in [
            ("8091", 8091),
            ("0", 0),
            ("-1", -1),
            ("+7", 7),
            ("0x1F9B", 8091),
            ("0o17", 15),
            ("017", 15),
            ("0b11", 3),
            ("1_000", 1000),
        ] {
            assert_eq!(integer(text).unwrap(), number, "{text:?}");
        }
        for wrong in [
            "",
            "-",
            "+-1",
            "--1",
            "08",
            "0x",
            "1.0",
            "9223372036854775808",
        ] {
            assert!(integer(wrong).is_err(), "{wrong:?}");
        }
    }
}
