//! The answer of an agent in the words of Go's dialler, which programs search.

use std::borrow::Cow;

use tunnel_proto::konnectivity::text::go_error;

use cpc_server::extension::DialError;

/// Returns what the agent answered, if it refused: the text of an agent of Konnectivity as it is, that of
/// ours in words of Go.
pub(super) fn words(error: &DialError) -> Option<Cow<'_, str>> {
    let answer = error.answer()?;
    if !answer.kind.is_native() {
        return Some(answer.detail.as_str().into());
    }
    let destination = answer.destination.to_string();
    Some(go_error(&destination, error.reason, &answer.detail).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::TunnelKind;
    use tunnel_proto::close::CloseReason;

    fn refused(kind: TunnelKind, detail: &str) -> DialError {
        let destination = "web.svc:443".parse().unwrap();
        let reason = CloseReason::NameNotFound;
        DialError::refused((kind, "w1"), &destination, reason, detail.into())
    }

    #[test]
    fn what_an_agent_of_konnectivity_says_is_kept_as_it_is() {
        let said = "dial tcp: lookup web.svc on 10.96.0.10:53:\tno such host";
        let error = refused(TunnelKind::Konnectivity, said);
        assert_eq!(words(&error).as_deref(), Some(said));
    }

    #[test]
    fn what_ours_says_is_put_in_words_of_go() {
        let error = refused(TunnelKind::Quic, "");
        assert_eq!(
            words(&error).as_deref(),
            Some("dial tcp: lookup web.svc: no such host")
        );
    }
}
