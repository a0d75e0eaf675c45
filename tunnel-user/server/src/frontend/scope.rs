//! Tenant and allow-list of a frontend's clients.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::Destination;

use crate::dial::error::DialError;
use cpc_config::allow_list::AllowList;
use cpc_config::frontend::FrontendConfig;
use cpc_config::server::AttachmentConfig;
use cpc_config::{AllowRule, ServerConfig};
use cpc_identity::TrustDomain;
use cpc_observe::audit::events as audit;
use cpc_observe::metrics::Closer;

/// Scope of one frontend, or of one attachment of the redirect.
#[derive(Debug)]
pub struct Scope {
    /// Name of the frontend or attachment, for people.
    name: String,
    /// Tenant of the clients.
    pub tenant: TrustDomain,
    /// Allow-list; `None` allows everything that agents serve.
    allow: ArcSwapOption<AllowList>,
}

impl Scope {
    /// Creates the scope of a frontend that speaks `protocol`. Its clients belong to the tenant `own`
    /// where none is configured.
    pub(crate) fn of_frontend(
        protocol: &str,
        config: &FrontendConfig,
        own: &TrustDomain,
    ) -> Arc<Self> {
        let name = frontend_name(protocol, config);
        Self::new(name, config.tenant().unwrap_or(own), config.allow())
    }

    /// Creates the scope of an attachment.
    pub(crate) fn of_attachment(config: &AttachmentConfig, own: &TrustDomain) -> Arc<Self> {
        let tenant = config.tenant.as_ref().unwrap_or(own);
        Self::new(attachment_name(config), tenant, config.allow.as_deref())
    }

    fn new(name: String, tenant: &TrustDomain, allow: Option<&[AllowRule]>) -> Arc<Self> {
        Arc::new(Self {
            name,
            tenant: tenant.clone(),
            allow: ArcSwapOption::new(list(allow)),
        })
    }

    /// Checks that clients may request `destination`.
    ///
    /// # Errors
    /// [`CloseReason::PolicyDenied`].
    pub(super) fn check(&self, destination: &Destination) -> Result<(), DialError> {
        match &*self.allow.load() {
            Some(allow) if !allow.allows(destination) => Err(DialError::new(
                CloseReason::PolicyDenied,
                Closer::Server,
                format!(
                    "{destination} is not in the server's allow-list for {}",
                    self.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Replaces the allow-list, for later requests. Returns whether there is one.
    fn set(&self, allow: Option<&[AllowRule]>) -> bool {
        let fresh = list(allow);
        let is_other = fresh != *self.allow.load();
        if is_other {
            self.allow.store(fresh);
        }
        is_other
    }
}

fn list(rules: Option<&[AllowRule]>) -> Option<Arc<AllowList>> {
    rules.map(|rules| Arc::new(AllowList::new(rules.to_vec())))
}

fn frontend_name(protocol: &str, config: &FrontendConfig) -> String {
    match config {
        FrontendConfig::Unix(unix) => format!("{protocol} {}", unix.unix.display()),
        FrontendConfig::Tcp(tcp) => format!("{protocol} {}", tcp.tcp),
    }
}

fn attachment_name(config: &AttachmentConfig) -> String {
    format!("redirect {}", config.name)
}

/// Replaces the allow-lists by those of `config`. A frontend that is no longer configured keeps its own
/// until the next restart.
pub(crate) fn reload(scopes: &[Arc<Scope>], config: &ServerConfig) {
    let frontends = &config.frontends;
    let connect = frontends.http_connect.iter().map(|it| (HTTP_CONNECT, it));
    let grpc = frontends.grpc.iter().map(|it| (GRPC, it));
    let frontends = connect.chain(grpc);
    let attachments = config.redirect.attachments.iter();
    let lists = frontends
        .map(|(protocol, it)| (frontend_name(protocol, it), it.allow()))
        .chain(attachments.map(|it| (attachment_name(it), it.allow.as_deref())));
    for (name, allow) in lists {
        let mut scopes = scopes.iter();
        if scopes.any(|scope| scope.name == name && scope.set(allow)) {
            tracing::info!(frontend = name, "allow-list reloaded");
            audit::changed("allow-list of a frontend", Ok(()));
        }
    }
}

/// Name in the configuration, `frontends.http_connect`.
pub(crate) const HTTP_CONNECT: &str = "http_connect";

/// Name in the configuration, `frontends.grpc`.
pub(crate) const GRPC: &str = "grpc";

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(text: &str) -> ServerConfig {
        serde_json::from_str(text).unwrap()
    }

    fn allows(scope: &Scope, text: &str) -> bool {
        scope.check(&text.parse().unwrap()).is_ok()
    }

    const WITHOUT: &str =
        r#"{"frontends": {"http_connect": [{"unix": "/a"}], "grpc": [{"unix": "/b"}]}}"#;
    const WITH: &str = r#"{"frontends": {
        "http_connect": [{"unix": "/a", "allow": [{"cidr": "10.0.0.0/8", "ports": [10250]}]}],
        "grpc": [{"unix": "/b", "allow": []}]
    }}"#;

    #[test]
    fn each_frontend_has_a_list_of_its_own() {
        let own: TrustDomain = "cluster.local".parse().unwrap();
        let config = configured(WITHOUT);
        let connect = Scope::of_frontend(HTTP_CONNECT, &config.frontends.http_connect[0], &own);
        let grpc = Scope::of_frontend(GRPC, &config.frontends.grpc[0], &own);
        let scopes = [connect.clone(), grpc.clone()];
        assert_eq!(connect.tenant, own);
        assert!(allows(&connect, "127.0.0.1:1") && allows(&grpc, "web.svc:80"));

        reload(&scopes, &configured(WITH));
        assert!(allows(&connect, "10.1.2.3:10250"));
        assert!(!allows(&connect, "10.1.2.3:10251"));
        assert!(!allows(&connect, "web.svc:10250"));
        assert!(!allows(&grpc, "10.1.2.3:10250"));
        let error = connect.check(&"192.0.2.1:80".parse().unwrap()).unwrap_err();
        assert_eq!(error.reason, CloseReason::PolicyDenied);
        let text = error.to_string();
        assert!(
            text.contains("192.0.2.1:80") && text.contains("http_connect /a"),
            "{text}"
        );

        // It is no longer configured: nothing is opened by that.
        reload(&scopes, &configured("{}"));
        assert!(!allows(&grpc, "10.1.2.3:10250"));
        reload(&scopes, &configured(WITHOUT));
        assert!(allows(&connect, "192.0.2.1:80") && allows(&grpc, "10.1.2.3:10250"));
    }
}
