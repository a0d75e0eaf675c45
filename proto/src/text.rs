//! Texts on the wire. What a name is made of is checked strictly, since it becomes a key; free text is
//! made fit instead, since nobody should lose a session over the wording of a refusal.

use crate::session::{MAX_TEXT, MessageError};

/// A name: at most [`MAX_TEXT`] bytes, no control characters.
pub(crate) fn name(field: &'static str, text: String) -> Result<String, MessageError> {
    if text.len() > MAX_TEXT {
        return Err(MessageError::TextTooLong {
            field,
            length: text.len(),
        });
    }
    if text.chars().any(char::is_control) {
        return Err(MessageError::ControlCharacters { field });
    }
    Ok(text)
}

/// Free text, cut to [`MAX_TEXT`] bytes, its control characters replaced.
pub(crate) fn made_fit(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(MAX_TEXT)];
    text.replace(char::is_control, "?")
}
