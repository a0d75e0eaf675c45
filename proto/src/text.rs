//! Texts on the wire. Names become keys, so their content is checked strictly. Free text is
//! repaired instead: the wording of a refusal must not end a session.

use crate::session::{MAX_TEXT, MessageError};

/// Checks a name: at most [`MAX_TEXT`] bytes, no control characters.
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

/// Repairs free text: cuts it to [`MAX_TEXT`] bytes and replaces its control characters.
pub(crate) fn sanitized(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(MAX_TEXT)];
    text.replace(char::is_control, "?")
}
