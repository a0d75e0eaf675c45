//! The configured part of an agent's offer: claims beyond the node addresses in its certificate.

use tunnel_proto::preface::NameError;
use tunnel_proto::route::{Claim, MAX_CLAIMS};

use cpc_config::ConfigError;
use cpc_config::agent::ServeConfig;

/// Maximum number of configured claims, so that an offer with the node addresses stays within the
/// wire's bounds.
const MAX_SERVED: usize = MAX_CLAIMS - 64;

/// Returns the configured claims.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub(super) fn claims(config: &ServeConfig) -> Result<Vec<Claim>, ConfigError> {
    let names = config.names.iter().enumerate().map(|(at, name)| {
        let parsed = name.parse().map(Claim::Name);
        parsed
            .map_err(|e: NameError| ConfigError::value(format!("serve.names[{at}]"), e.to_string()))
    });
    let mut claims = names.collect::<Result<Vec<_>, _>>()?;
    claims.extend(config.cidrs.iter().map(|net| Claim::Cidr(net.trunc())));
    if config.default_route {
        claims.push(Claim::DefaultRoute);
    }
    if claims.len() > MAX_SERVED {
        let why = format!(
            "names {} things, {MAX_SERVED} at most; serve larger networks",
            claims.len()
        );
        return Err(ConfigError::value("serve", why));
    }
    Ok(claims)
}
