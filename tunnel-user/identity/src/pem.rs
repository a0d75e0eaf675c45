//! PEM files (RFC 7468) of certificates and keys, with a diagnosis of files that hold none.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::material_error::MaterialError;

/// Mode bits that let users other than the owner and the group read or write a file.
const EXPOSED: u32 = 0o006;

/// Reads the certificates in `path`, at least one.
///
/// # Errors
/// [`MaterialError::File`], which says what the file holds instead.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    parse_certificates(&read(path)?).map_err(|error| error.of(path))
}

/// Reads the first private key in `path`.
///
/// # Errors
/// [`MaterialError::File`], which says what the file holds instead.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, MaterialError> {
    parse_key(&read(path)?).map_err(|error| error.of(path))
}

/// Returns the remedy for a private key in `path` that every user of the host may read or write.
pub fn exposure(path: &Path) -> Option<String> {
    let mode = fs::metadata(path).ok()?.permissions().mode() & 0o7777;
    (mode & EXPOSED != 0).then(|| {
        format!(
            "every user of this host may read the private key, or write it (mode {mode:04o}): run \
             `chmod o= {}`",
            path.display()
        )
    })
}

/// Logs a warning about such a key.
pub fn warn_if_exposed(path: &Path) {
    if let Some(text) = exposure(path) {
        tracing::warn!("{text}");
    }
}

/// Writes a certificate as PEM.
pub fn encode(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().copied().map(char::from));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn read(path: &Path) -> Result<Vec<u8>, MaterialError> {
    fs::read(path).map_err(|why| MaterialError::File {
        path: path.into(),
        why: why.to_string(),
    })
}

fn parse_certificates(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let wrong = |error| diagnose(bytes, Expected::Certificate, Some(error));
    let read = CertificateDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>();
    let certificates = read.map_err(wrong)?;
    match certificates.is_empty() {
        true => Err(diagnose(bytes, Expected::Certificate, None)),
        false => Ok(certificates),
    }
}

fn parse_key(bytes: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    let wrong = |error| diagnose(bytes, Expected::Key, Some(error));
    PrivateKeyDer::from_pem_slice(bytes).map_err(wrong)
}

/// Expected content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Certificate,
    Key,
}

impl Expected {
    fn name(self) -> &'static str {
        match self {
            Self::Certificate => "a certificate",
            Self::Key => "a private key",
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Certificate => "CERTIFICATE",
            Self::Key => "PRIVATE KEY",
        }
    }

    /// Returns the command that converts DER.
    fn command(self) -> &'static str {
        match self {
            Self::Certificate => "openssl x509 -inform der -in FILE -out NEW",
            Self::Key => "openssl pkey -inform der -in FILE -out NEW",
        }
    }
}

/// Reason why a file gives nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum PemError {
    #[error("the file is empty; {} in PEM is needed", .0.name())]
    Empty(Expected),
    #[error(
        "the file is binary, not PEM: `{}` converts DER, `openssl pkcs12 -in FILE -out NEW -nodes` \
         PKCS #12",
        .0.command()
    )]
    Binary(Expected),
    #[error(
        "the PEM has lost its line ends: each -----BEGIN ..----- and each -----END ..----- stands on a \
         line of its own, between them base64 in lines"
    )]
    Joined,
    #[error("the lines of the PEM are indented: remove the blanks before -----BEGIN")]
    Indented,
    #[error(
        "the key is encrypted, and cpc can't ask for its passphrase: \
         `openssl pkey -in FILE -out NEW` decrypts it"
    )]
    Encrypted,
    #[error("the file is no PEM: {} begins with the line -----BEGIN {}-----", .0.name(), .0.label())]
    NoSection(Expected),
    #[error("the file holds {found}, but not {}", expected.name())]
    Another { found: String, expected: Expected },
    #[error("the file is cut off: a section has no -----END ..----- line")]
    NoEnd,
    #[error("the text between the -----BEGIN and -----END lines is not base64")]
    Base64,
}

impl PemError {
    fn of(self, path: &Path) -> MaterialError {
        MaterialError::File {
            path: path.into(),
            why: self.to_string(),
        }
    }
}

/// Diagnoses `bytes` without usable content. `error` is the parser's.
fn diagnose(bytes: &[u8], expected: Expected, error: Option<pem::Error>) -> PemError {
    const BEGIN: &str = "-----BEGIN ";
    let text = match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => text.trim_start_matches('\u{feff}'),
        _ => return PemError::Binary(expected),
    };
    if text.trim().is_empty() {
        return PemError::Empty(expected);
    }
    let mut labels = Vec::new();
    for line in text.lines() {
        let Some(at) = line.find(BEGIN) else {
            continue;
        };
        let (before, rest) = (&line[..at], &line[at + BEGIN.len()..]);
        match rest.split_once("-----") {
            Some((label, after)) if after.trim().is_empty() && before.trim().is_empty() => {
                if !before.is_empty() {
                    return PemError::Indented;
                }
                labels.push(label.chars().take(40).collect::<String>());
            }
            _ => return PemError::Joined,
        }
    }
    let is_encrypted = |label: &String| label == "ENCRYPTED PRIVATE KEY";
    if expected == Expected::Key
        && (labels.iter().any(is_encrypted) || text.contains("Proc-Type: 4,ENCRYPTED"))
    {
        return PemError::Encrypted;
    }
    match error {
        Some(pem::Error::MissingSectionEnd { .. }) => return PemError::NoEnd,
        Some(pem::Error::Base64Decode(_)) => return PemError::Base64,
        _ => {}
    }
    labels.dedup();
    match labels.is_empty() {
        true => PemError::NoSection(expected),
        false => PemError::Another {
            found: labels.join(", "),
            expected,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_error(text: &str) -> String {
        parse_key(text.as_bytes()).unwrap_err().to_string()
    }

    fn certificate_error(text: &str) -> String {
        let read = parse_certificates(text.as_bytes());
        read.unwrap_err().to_string()
    }

    #[test]
    fn a_key_is_for_its_owner_and_group() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (mode, is_exposed) in [
            (0o600, false),
            (0o640, false),
            (0o400, false),
            (0o644, true),
            (0o602, true),
        ] {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            let text = exposure(file.path());
            assert_eq!(text.is_some(), is_exposed, "{mode:o}: {text:?}");
        }
        let text = exposure(file.path()).unwrap();
        assert!(
            text.contains(&format!("`chmod o= {}`", file.path().display())),
            "{text}"
        );
        assert_eq!(exposure(Path::new("/nowhere/at/all")), None);
    }

    #[test]
    fn a_file_that_gives_nothing_says_what_it_holds() {
        let made = rcgen::generate_simple_self_signed(["x".to_owned()]).unwrap();
        let (key, certificate) = (made.signing_key.serialize_pem(), made.cert.pem());
        assert!(parse_key((certificate.clone() + &key).as_bytes()).is_ok());
        let both = certificate.clone() + &key + &certificate;
        assert_eq!(parse_certificates(both.as_bytes()).unwrap().len(), 2);
        let crlf = certificate.replace('\n', "\r\n");
        assert!(parse_certificates(crlf.as_bytes()).is_ok());

        for (text, says) in [
            (String::new(), "is empty"),
            (" \n".into(), "is empty"),
            ("hello".into(), "-----BEGIN PRIVATE KEY-----"),
            (certificate.clone(), "holds CERTIFICATE, but not a private key"),
            (key.replace('\n', ""), "lost its line ends"),
            (key.replace('\n', " "), "lost its line ends"),
            (key.replace('\n', "\\n"), "lost its line ends"),
            (key.replace('\n', "\n  ").replace("-----BEGIN", "  -----BEGIN"), "indented"),
            (key.replace("PRIVATE", "ENCRYPTED PRIVATE"), "openssl pkey -in FILE"),
            (
                "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n-----END EC PRIVATE KEY-----\n".into(),
                "is encrypted",
            ),
            (key.replace("PRIVATE", "OPENSSH PRIVATE"), "OPENSSH PRIVATE KEY"),
            (key.replace("PRIVATE", "PUBLIC"), "PUBLIC KEY"),
            (key[..key.len() / 2].into(), "cut off"),
        ] {
            let error = key_error(&text);
            assert!(error.contains(says), "{text:?}: {error}");
        }
        for (text, says) in [
            (String::new(), "is empty"),
            (key.clone(), "but not a certificate"),
            (certificate.replace('\n', ""), "lost its line ends"),
            (
                certificate.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
                "holds TRUSTED CERTIFICATE",
            ),
            (certificate.replace("MII", "M!I"), "not base64"),
            (certificate[..certificate.len() / 2].into(), "cut off"),
        ] {
            let error = certificate_error(&text);
            assert!(error.contains(says), "{text:?}: {error}");
        }
        let der = parse_certificates(made.cert.der()).unwrap_err().to_string();
        assert!(der.contains("openssl x509 -inform der"), "{der}");
        let der = parse_key(made.signing_key.serialized_der());
        let der = der.unwrap_err().to_string();
        assert!(der.contains("openssl pkey -inform der"), "{der}");
    }
}
