//! Deduplication of repeated errors: a lasting error is logged when it begins and when it changes, not
//! at every attempt.

/// The last logged error of one task.
#[derive(Clone, Debug, Default)]
pub struct ErrorDedup(Option<String>);

impl ErrorDedup {
    /// Whether `text` differs from the last logged error. Texts that differ only in words with
    /// digits (an address, an id or a time) are equal.
    pub fn is_new(&mut self, text: &str) -> bool {
        let kind = kind_of(text);
        if self.0.as_ref() == Some(&kind) {
            return false;
        }
        self.0 = Some(kind);
        true
    }

    /// Forgets the error after a success: the same error is then new.
    pub fn clear(&mut self) {
        self.0 = None;
    }
}

/// Returns the text without the words that hold digits.
fn kind_of(text: &str) -> String {
    let mut kind = String::with_capacity(text.len());
    for piece in text.split_inclusive(|c: char| !c.is_alphanumeric()) {
        let word = piece.trim_end_matches(|c: char| !c.is_alphanumeric());
        let is_number = word.contains(|c: char| c.is_ascii_digit());
        kind.push_str(if is_number { "#" } else { word });
        kind.push_str(&piece[word.len()..]);
    }
    kind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_make_no_other_trouble() {
        let mut dedup = ErrorDedup::default();
        for (text, is_new) in [
            ("10.0.0.1:8132: no answer after 5.02 s (id 7f3a)", true),
            ("10.0.0.1:8132: no answer after 4.97 s (id 0b91)", false),
            ("10.0.0.1:8132: refused", true),
            ("10.0.0.1:8132: no answer after 5.02 s (id 7f3a)", true),
        ] {
            assert_eq!(dedup.is_new(text), is_new, "{text}");
        }
        dedup.clear();
        assert!(dedup.is_new("10.0.0.1:8132: no answer after 5 s (id 7f3a)"));
        assert_eq!(kind_of("a1 b\u{e4}, 22c-d "), "# b\u{e4}, #-d ");
    }
}
