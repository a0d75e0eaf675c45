//! Checks of a configuration, as a start does them and as `cpc config check` does.

use cpc_config::frontend::{Answers, FrontendConfig};
use cpc_config::{ConfigError, ServerConfig};
use cpc_identity::identity::{IdentityError, name_of};
use cpc_identity::{Identity, Role};

use crate::grants::Grants;

/// Tenant of a server without a certificate that names one.
const DEFAULT_TENANT: &str = "cluster.local";

/// Checks everything of a configuration that can be checked without opening anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn check(config: &ServerConfig) -> Result<(), ConfigError> {
    config.check()?;
    Grants::new(&config.policy)?;
    match config.tls.cert {
        Some(_) => drop(config.tls.files()?),
        None => drop(identity_without_certificate(config)?),
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

/// Returns the identity of a server that has no certificate.
///
/// # Errors
/// [`ConfigError::Value`] where `server_id` is no name.
pub(crate) fn identity_without_certificate(config: &ServerConfig) -> Result<Identity, ConfigError> {
    let tenant = config.konnectivity.as_ref().and_then(|k| k.tenant.clone());
    let tenant = tenant.map_or_else(|| DEFAULT_TENANT.parse(), Ok);
    let identity = tenant.map_err(IdentityError::from).and_then(|tenant| {
        let name = name_of(config.server_id.as_deref().unwrap_or_default());
        Identity::new(tenant, Role::Server, &name)
    });
    identity.map_err(|e| ConfigError::value("server_id", e.to_string()))
}

/// Whether the configuration uses a protocol that an extension has to bring.
pub(crate) fn needs_extension(config: &ServerConfig) -> bool {
    let mut frontends = config.frontends.http_connect.iter();
    let is_foreign = |frontend: &FrontendConfig| frontend.answers() == Answers::Konnectivity;
    config.is_konnectivity() || config.health.is_some() || frontends.any(is_foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_protocols_need_an_extension() {
        for (text, expected) in [
            ("{}", false),
            (
                r#"{"frontends": {"http_connect": [{"unix": "/a"}]}}"#,
                false,
            ),
            (r#"{"frontends": {"grpc": [{"unix": "/a"}]}}"#, true),
            (r#"{"health": "127.0.0.1:1"}"#, true),
            (
                r#"{"frontends": {"http_connect": [{"unix": "/a", "answers": "konnectivity"}]}}"#,
                true,
            ),
        ] {
            let config = serde_json::from_str(text).unwrap();
            assert_eq!(needs_extension(&config), expected, "{text}");
        }
    }
}
