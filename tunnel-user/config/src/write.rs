//! Writes a configuration as YAML that reads back as the same configuration.

use serde::Serialize;

use super::ConfigError;

/// Writes `config` as YAML, defaults included.
///
/// # Errors
/// [`ConfigError::Write`] when a path is not UTF-8, which YAML can't hold.
pub fn to_yaml<T: Serialize>(config: &T) -> Result<String, ConfigError> {
    // Block scalars fold long lines, which a path or a label may be.
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    serde_saphyr::to_string_with_options(config, options).map_err(|why| ConfigError::Write {
        why: why.to_string(),
    })
}

#[cfg(test)]
pub(crate) mod tests;
