//! Patterns of names and identities, in which `*` stands for any characters but `/`.
//!
//! Invariant: a match takes time proportional to the lengths of pattern and text. Patterns come from
//! configuration, texts from peers.

/// Maximum length of a pattern, in bytes. The longest identity has 524.
pub const MAX_PATTERN: usize = 1024;

/// Whether `text` matches `pattern`.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (mut patterns, mut texts) = (pattern.split('/'), text.split('/'));
    loop {
        match (patterns.next(), texts.next()) {
            (None, None) => return true,
            (Some(pattern), Some(text)) if segment_matches(pattern, text) => {}
            _ => return false,
        }
    }
}

/// Whether a segment without `/` matches. The text between two `*` is searched once, from the end of
/// the match before: an earlier match leaves more for those that follow.
fn segment_matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(head) else {
        return false;
    };
    let (between, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(mut text) = text.strip_suffix(tail) else {
        return false;
    };
    for part in between.split('*') {
        let Some(at) = text.find(part) else {
            return false;
        };
        text = &text[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_stands_for_anything_within_a_segment() {
        for (pattern, text, fits) in [
            ("spiffe://a/agent/w1", "spiffe://a/agent/w1", true),
            ("spiffe://a/agent/*", "spiffe://a/agent/w1", true),
            ("spiffe://a/agent/w*-x", "spiffe://a/agent/w-1-x", true),
            ("spiffe://*/agent/w1", "spiffe://a/agent/w1", true),
            ("spiffe://a/*", "spiffe://a/agent/w1", false),
            ("spiffe://a/agent/w*", "spiffe://a/agent/x1", false),
            ("*", "", true),
            ("**", "w1", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*b", "ab", false),
            ("*ab*ab", "abab", true),
            ("*-*", "a-", true),
            ("ä*ß", "äöß", true),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }

    /// A match that tried every position for every `*` would not end here.
    #[test]
    fn many_stars_are_matched_at_once() {
        let pattern = "*-".repeat(250) + "x";
        let text = "-".repeat(100_000);
        assert!(!matches(&pattern, &text));
        assert!(matches(&pattern, &(text + "x")));
    }

    /// Tries every place: right, and slow.
    fn tries_everything(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => {
                let end = text.iter().position(|b| *b == b'/').unwrap_or(text.len());
                (0..=end).any(|at| tries_everything(rest, &text[at..]))
            }
            Some((first, rest)) => {
                text.first() == Some(first) && tries_everything(rest, &text[1..])
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_what_trying_everything_finds(pattern in "[ab/*]{0,8}", text in "[ab/]{0,10}") {
            let expected = tries_everything(pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(matches(&pattern, &text), expected, "{} {}", pattern, text);
        }
    }
}
