use std::time::Duration;

use tunnel_fake_kubernetes::{FakeKubernetes, Review};

use super::claims::expiring_in;
use super::*;
use crate::client;
use cpc_config::kubernetes::{Access, TokenRules};

fn rules() -> TokenRules {
    TokenRules {
        audience: "us".into(),
        namespace: "kube-system".into(),
        service_account: "agent".into(),
    }
}

fn good() -> Review {
    Review::of("kube-system", "agent", "us")
}

async fn reviewer(api: &FakeKubernetes) -> TokenReviewer {
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kubeconfig.path(), api.kubeconfig()).unwrap();
    let access = Access {
        kubeconfig: Some(kubeconfig.path().into()),
        rate: None,
    };
    TokenReviewer::new(client(&access).await.unwrap(), rules())
}

fn unavailable(verdict: &Verdict) -> bool {
    matches!(verdict, Err(ReviewError::Unavailable(_)))
}

#[tokio::test]
async fn a_good_token_is_asked_about_once() {
    let api = FakeKubernetes::start().unwrap();
    let mut bound = good();
    bound.node = Some("w1".into());
    api.set_token("t", bound);
    let reviewer = reviewer(&api).await;
    let reviews = (0..100).map(|_| reviewer.review("t"));
    for verdict in futures_util::future::join_all(reviews).await {
        assert_eq!(verdict.unwrap().node.as_deref(), Some("w1"));
    }
    reviewer.review("t").await.unwrap();
    assert_eq!(api.count("tokenreviews"), 1);
}

#[tokio::test]
async fn bad_tokens_are_refused_and_remembered() {
    let api = FakeKubernetes::start().unwrap();
    api.set_token("elsewhere", Review::of("kube-system", "agent", "them"));
    api.set_token("another", Review::of("kube-system", "x", "us"));
    api.set_token("old", Review::error("token has expired"));
    let reviewer = reviewer(&api).await;
    for (token, text) in [
        ("unknown", "lookup failed: service account jwt not valid"),
        ("elsewhere", "lookup failed: token audiences [\"them\"]"),
        ("another", "incoming request from \"x\" service account"),
        ("old", "lookup failed: token has expired"),
    ] {
        for _ in 0..2 {
            let error = reviewer.review(token).await.unwrap_err().to_string();
            assert!(error.contains(text), "{token}: {error}");
        }
    }
    assert_eq!(api.count("tokenreviews"), 4);
}

#[tokio::test]
async fn a_token_does_not_outlive_its_expiry() {
    let api = FakeKubernetes::start().unwrap();
    let token = expiring_in(1.5);
    api.set_token(&token, good());
    let reviewer = reviewer(&api).await;
    reviewer.review(&token).await.unwrap();
    api.set_token(&token, Review::error("token has expired"));
    reviewer.review(&token).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1600)).await;
    reviewer.review(&token).await.unwrap_err();
    assert_eq!(api.count("tokenreviews"), 2);
}

#[tokio::test]
async fn without_an_api_server_what_is_known_still_counts() {
    let api = FakeKubernetes::start().unwrap();
    for token in ["known", "new"] {
        api.set_token(token, good());
    }
    let reviewer = reviewer(&api).await;
    reviewer.review("known").await.unwrap();
    api.fail_with(503);
    reviewer.review("known").await.unwrap();
    // A new one waits, and is let in when the API server is back.
    let back = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        api.fail_with(None);
    };
    let (verdict, ()) = tokio::join!(reviewer.review("new"), back);
    verdict.unwrap();
}

#[tokio::test]
async fn who_may_not_ask_is_told_at_once_and_asks_again_later() {
    let api = FakeKubernetes::start().unwrap();
    api.set_token("t", good());
    let reviewer = reviewer(&api).await;
    api.fail_with(403);
    let verdict = reviewer.review("t").await;
    assert!(unavailable(&verdict), "{verdict:?}");
    let error = verdict.unwrap_err().to_string();
    assert!(error.starts_with("Failed to authenticate request. err:"));
    assert!(error.contains("403"), "{error}");
    api.fail_with(None);
    reviewer.review("t").await.unwrap();
}

#[tokio::test]
async fn a_token_that_is_no_request_keeps_nobody_else_waiting() {
    let api = FakeKubernetes::start().unwrap();
    let reviewer = reviewer(&api).await;
    api.fail_with(400);
    let verdict = reviewer.review("").await;
    assert!(
        matches!(verdict, Err(ReviewError::Lookup(_))),
        "{verdict:?}"
    );
    assert!(lock(&reviewer.0.pause).until.is_none());
}

#[tokio::test]
async fn many_agents_do_not_storm_a_failing_api_server() {
    let api = FakeKubernetes::start().unwrap();
    let tokens: Vec<_> = (0..500).map(|n| n.to_string()).collect();
    for token in &tokens {
        api.set_token(token, good());
    }
    let reviewer = reviewer(&api).await;
    api.fail_with(500);
    let down = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let reviews = api.count("tokenreviews");
        // Pauses of at least 0.2, 0.4 and 0.8 s.
        assert!(
            (MAX_REVIEWS..=3 * MAX_REVIEWS).contains(&reviews),
            "{reviews}"
        );
        api.fail_with(None);
    };
    let all = futures_util::future::join_all(tokens.iter().map(|t| reviewer.review(t)));
    let (verdicts, ()) = tokio::join!(all, down);
    assert!(verdicts.iter().all(Result::is_ok), "{verdicts:?}");
}

#[tokio::test]
async fn a_shard_on_another_runtime_may_ask() {
    let api = FakeKubernetes::start().unwrap();
    api.set_token("t", good());
    let reviewer = reviewer(&api).await;
    // Without a clock and without sockets: whatever needs those has to happen at home.
    let mut shard = tokio::runtime::Builder::new_current_thread();
    let ask = move || shard.build().unwrap().block_on(reviewer.review("t"));
    tokio::task::spawn_blocking(ask).await.unwrap().unwrap();
}
