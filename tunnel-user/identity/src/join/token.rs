//! Join tokens: `ID.SECRET`. The id is for people, lists and the audit. Only a digest of the secret is
//! stored.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::{constant_time, digest, rand};

/// Length of an id, in characters.
const ID: usize = 8;

/// Length of a secret, in characters: 160 bits.
const SECRET: usize = 32;

/// Alphabet of five bits per character, in which no two characters look alike (Crockford's Base32, in
/// lower case).
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// A token. Only [`Token::reveal`] shows the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

/// Text that is not a join token.
#[derive(Debug, thiserror::Error)]
#[error("not a join token: ID.SECRET is one, as `cpc token create` prints it")]
pub struct TokenError;

impl Token {
    /// Generates a token.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn generate() -> Result<Self, aws_lc_rs::error::Unspecified> {
        let mut bytes = [0; ID + SECRET];
        rand::fill(&mut bytes)?;
        // 256 is a multiple of 32: each letter is as likely.
        let letters = bytes.map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]));
        Ok(Self {
            id: letters[..ID].iter().collect(),
            secret: letters[ID..].iter().collect(),
        })
    }

    /// Returns the id, which is no secret.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the whole token, for its user.
    pub fn reveal(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }

    /// Returns the digest for storage. The secret has too many bits to be guessed, so that a plain
    /// digest suffices.
    pub fn digest(&self) -> Digest {
        let digest = digest::digest(&digest::SHA256, self.secret.as_bytes());
        let hex = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
        Digest(hex.collect())
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let (id, secret) = text.trim().split_once('.').ok_or(TokenError)?;
        let is_of = |text: &str, length| {
            text.len() == length && text.bytes().all(|letter| ALPHABET.contains(&letter))
        };
        if !is_of(id, ID) || !is_of(secret, SECRET) {
            return Err(TokenError);
        }
        Ok(Self {
            id: id.into(),
            secret: secret.into(),
        })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id)
    }
}

/// The SHA-256 of a secret, in hexadecimal digits.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Digest(String);

impl Digest {
    /// Whether this is the digest of `token`, in constant time.
    pub fn is_of(&self, token: &Token) -> bool {
        let given = token.digest();
        constant_time::verify_slices_are_equal(self.0.as_bytes(), given.0.as_bytes()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_printed_and_shows_itself_to_nobody() {
        let token = Token::generate().unwrap();
        let text = token.reveal();
        assert_eq!(format!("{text}\n").parse::<Token>().unwrap(), token);
        assert!(token.digest().is_of(&token));
        assert!(!token.digest().is_of(&Token::generate().unwrap()));
        let shown = format!("{token:?} {:?}", token.digest());
        assert!(!shown.contains(&text[ID + 1..]), "{shown}");
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let good = Token::generate().unwrap().reveal();
        for wrong in [
            "",
            ".",
            &good[1..],
            &good[..40],
            &good.replace('.', "-"),
            "eyJh.eyJz.c2ln",
        ] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }
}
