//! Comparison of a review with the rules, in the order of proxy-server.

use k8s_openapi::api::authentication::v1::TokenReviewStatus;

use super::{ReviewError, ServiceAccount, Verdict};
use cpc_config::kubernetes::TokenRules;

/// Key under which the API server names the node of the pod that a token was issued to.
const NODE: &str = "authentication.kubernetes.io/node-name";

/// Key under which the API server names the unique id of a token.
const CREDENTIAL: &str = "authentication.kubernetes.io/credential-id";

/// Returns the account of a reviewed token.
///
/// # Errors
/// [`ReviewError`], the first rule that it breaks.
pub(super) fn judge(status: TokenReviewStatus, rules: &TokenRules) -> Verdict {
    if let Some(error) = status.error.filter(|error| !error.is_empty()) {
        return Err(ReviewError::Lookup(error));
    }
    if status.authenticated != Some(true) {
        return Err(ReviewError::NotValid);
    }
    // Without this check an API server that ignores audiences would vouch for tokens of other
    // audiences.
    if !status
        .audiences
        .unwrap_or_default()
        .contains(&rules.audience)
    {
        return Err(ReviewError::Audience(rules.audience.clone()));
    }
    let user = status.user.unwrap_or_default();
    let username = user.username.unwrap_or_default();
    let parts: Vec<_> = username.split(':').collect();
    let [system, kind, namespace, name] = parts[..] else {
        return Err(ReviewError::Format);
    };
    if (system, kind) != ("system", "serviceaccount") {
        return Err(ReviewError::NotServiceAccount);
    }
    if namespace != rules.namespace {
        return Err(ReviewError::Namespace {
            found: namespace.into(),
            expected: rules.namespace.clone(),
        });
    }
    if name != rules.service_account {
        return Err(ReviewError::ServiceAccount {
            found: name.into(),
            expected: rules.service_account.clone(),
        });
    }
    let mut extra = user.extra.unwrap_or_default();
    let mut only = |key| extra.remove(key)?.into_iter().next();
    Ok(ServiceAccount {
        namespace: namespace.into(),
        name: name.into(),
        node: only(NODE),
        credential: only(CREDENTIAL),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn rules() -> TokenRules {
        TokenRules {
            audience: "us".into(),
            namespace: "kube-system".into(),
            service_account: "agent".into(),
        }
    }

    fn status(username: &str) -> TokenReviewStatus {
        TokenReviewStatus {
            audiences: Some(vec!["others".into(), "us".into()]),
            authenticated: Some(true),
            error: None,
            user: Some(UserInfo {
                username: Some(username.into()),
                ..UserInfo::default()
            }),
        }
    }

    fn text_of(status: TokenReviewStatus) -> String {
        judge(status, &rules()).unwrap_err().to_string()
    }

    const GOOD: &str = "system:serviceaccount:kube-system:agent";

    #[test]
    fn the_service_account_and_its_node() {
        let mut bound = status(GOOD);
        let extra = [(NODE, "w1"), (CREDENTIAL, "JTI=1")];
        let extra = extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()]));
        bound.user.as_mut().unwrap().extra = Some(extra.into());
        let account = judge(bound, &rules()).unwrap();
        assert_eq!(
            (&*account.namespace, &*account.name),
            ("kube-system", "agent")
        );
        assert_eq!(account.node.as_deref(), Some("w1"));
        assert_eq!(account.credential.as_deref(), Some("JTI=1"));
        assert_eq!(judge(status(GOOD), &rules()).unwrap().node, None);
    }

    #[test]
    fn each_rule_has_its_text() {
        let nobody = TokenReviewStatus::default();
        assert_eq!(
            text_of(nobody),
            "lookup failed: service account jwt not valid"
        );
        let mut unsure = status(GOOD);
        unsure.error = Some("token has expired".into());
        assert_eq!(text_of(unsure), "lookup failed: token has expired");
        let mut foreign = status(GOOD);
        foreign.audiences = Some(vec!["others".into()]);
        assert!(text_of(foreign).contains("audience \"us\""));
        let mut unaware = status(GOOD);
        unaware.audiences = None;
        assert!(text_of(unaware).contains("audience \"us\""));
        for (username, text) in [
            ("admin", "lookup failed: unexpected username format"),
            (
                "system:node:kube-system:agent",
                "lookup failed: username returned is not a service account",
            ),
            (
                "system:serviceaccount:default:agent",
                "lookup failed: incoming request from \"default\" namespace. Expected \"kube-system\"",
            ),
            (
                "system:serviceaccount:kube-system:x",
                "lookup failed: incoming request from \"x\" service account. Expected \"agent\"",
            ),
        ] {
            assert_eq!(text_of(status(username)), text);
        }
    }
}
