//! The check of a configuration, as a start does it and as `cpc config check` does.

use cpc_config::{ConfigError, ServerConfig};

use crate::grants::Grants;
use crate::start::own_identity;

/// Checks everything of a configuration that can be checked without opening anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn check(config: &ServerConfig) -> Result<(), ConfigError> {
    config.check()?;
    Grants::new(&config.policy)?;
    match config.tls.cert {
        Some(_) => drop(config.tls.files()?),
        None => drop(own_identity(config, None)?),
    }
    for (at, attachment) in config.redirect.attachments.iter().enumerate() {
        cpc_redirect::check_name(&attachment.name).map_err(|error| {
            ConfigError::value(
                format!("redirect.attachments[{at}].name"),
                error.to_string(),
            )
        })?;
    }
    Ok(())
}
