//! Files that are read again while the process runs.

use std::path::PathBuf;
use std::time::Duration;

use super::material_error::MaterialError;
use cpc_observe::error_dedup::ErrorDedup;

/// Polling interval of the files.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// Calls `reload` every [`RELOAD_INTERVAL`], without end, and `on_error` once for each kind of failure.
pub async fn watch(
    mut reload: impl FnMut() -> Result<(), MaterialError>,
    on_error: impl Fn(&MaterialError),
) {
    let mut dedup = ErrorDedup::default();
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        match reload() {
            Ok(()) => dedup.clear(),
            Err(error) if dedup.is_new(&error.to_string()) => {
                on_error(&error);
            }
            Err(_) => {}
        }
    }
}

/// Returns a fingerprint of the content of files; an unreadable file counts as empty.
pub fn fingerprint<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Vec<u8> {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    for path in paths {
        let content = std::fs::read(path).unwrap_or_default();
        digest.update(&(content.len() as u64).to_be_bytes());
        digest.update(&content);
    }
    digest.finish().as_ref().to_vec()
}
