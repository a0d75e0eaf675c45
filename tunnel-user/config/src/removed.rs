//! Explains keys of earlier versions, which would otherwise be unknown keys.

use std::borrow::Cow;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

/// Formats errors in the library's words for users, except those about removed keys.
pub(super) struct Formatter;

impl MessageFormatter for Formatter {
    fn format_message<'a>(&self, error: &'a Error) -> Cow<'a, str> {
        match error {
            // No other section had a key of this name.
            Error::SerdeUnknownField { field, .. } if field == "shortcut" => Cow::Borrowed(
                "the shortcut past TCP on loopback was removed, since it was no faster: \
                 delete the key `shortcut`. `cpc redirect attach` removes the shortcut's programs and maps from the kernel",
            ),
            error => UserMessageFormatter.format_message(error),
        }
    }
}
