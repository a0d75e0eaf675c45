//! Agents that show a service account's token: reviewed by the API server, and refused in the
//! peer's words.

use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use tonic::Code;
use tunnel_fake_kubernetes::{FakeKubernetes, Review};
use tunnel_tests::lab;

use crate::program::Maker;
use crate::scene::Scene;
use crate::script::SOON;

const AUDIENCE: &str = "system:konnectivity-server";

fn review(username: &str, audience: &str) -> Review {
    Review {
        username: username.to_owned(),
        audiences: vec![audience.to_owned()],
        id: None,
        node: None,
        error: None,
    }
}

/// Some tokens are accepted; the others are refused with the cause.
#[test]
fn a_token_decides_who_comes_in() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for peers in [true, false] {
        let scene = Scene::new(1)?;
        let maker = match (peers, Maker::peer()) {
            (true, Some(peer)) => peer,
            (true, None) => continue,
            (false, _) => scene.ours()?,
        };
        let listen = || Ok(TcpListener::bind("127.0.0.1:0")?);
        let kubernetes = FakeKubernetes::serve(scene.lab.control_plane.netns.enter(listen)?)?;
        let right = "system:serviceaccount:kube-system:konnectivity-agent";
        kubernetes.set_token("right", review(right, AUDIENCE));
        let other_namespace = "system:serviceaccount:default:konnectivity-agent";
        kubernetes.set_token("namespace", review(other_namespace, AUDIENCE));
        let other_account = "system:serviceaccount:kube-system:default";
        kubernetes.set_token("account", review(other_account, AUDIENCE));
        kubernetes.set_token(
            "user",
            review("a:b:kube-system:konnectivity-agent", AUDIENCE),
        );
        kubernetes.set_token("person", review("kubernetes-admin", AUDIENCE));
        kubernetes.set_token("expired", Review::error("token has expired"));
        kubernetes.set_token("audience", review(right, "https://kubernetes.default.svc"));

        let kubeconfig = scene.lab.folder().join("kubeconfig");
        std::fs::write(&kubeconfig, kubernetes.kubeconfig())?;
        let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
        let audience = format!("--authentication-audience={AUDIENCE}");
        let flags = [
            "--cluster-ca-cert=",
            "--agent-namespace=kube-system",
            "--agent-service-account=konnectivity-agent",
            "--kube-api-content-type=application/json",
            &audience,
            &kubeconfig,
        ];
        let mut server = scene.proxy_server(&maker, "grpc", &flags)?;
        server.wait_healthy(SOON)?;
        let connect = |entries: &[(&'static str, &str)]| {
            let all = [&[("agentid", "a"), ("agentidentifiers", "")], entries].concat();
            scene.agent_stream(1, &all, scene.agent.anonymous()?)
        };
        let told = || format!("beside {maker:?}, which said:\n{}", server.log());

        let mut agent = connect(&[("authorization", "Bearer right")])?;
        agent.headers().with_context(told)?;

        let refused = |entries: &[(&'static str, &str)], text: &str| {
            let status = connect(entries)?.ended()?;
            ensure!(
                status.code() == Code::Unknown,
                "{maker:?}: {entries:?}: {status:?}"
            );
            ensure!(
                status.message().starts_with(text),
                "{maker:?}: {entries:?}: {status:?}"
            );
            Ok(())
        };
        refused(&[], "Authentication context was not found in metadata")?;
        let twice = [
            ("authorization", "Bearer right"),
            ("authorization", "Bearer right"),
        ];
        refused(&twice, "too many (2) tokens are received")?;
        let prefix = "received token does not have \"Bearer \" prefix";
        refused(&[("authorization", "Basic right")], prefix)?;
        for (token, why) in [
            ("unknown", "lookup failed: service account jwt not valid"),
            ("expired", "lookup failed: token has expired"),
            ("audience", "lookup failed: token audiences"),
            ("person", "lookup failed: unexpected username format"),
            (
                "user",
                "lookup failed: username returned is not a service account",
            ),
            (
                "namespace",
                "lookup failed: incoming request from \"default\" namespace. Expected \
                 \"kube-system\"",
            ),
            (
                "account",
                "lookup failed: incoming request from \"default\" service account. Expected \
                 \"konnectivity-agent\"",
            ),
        ] {
            let text = format!("Failed to validate authentication token, err:{why}");
            refused(&[("authorization", &format!("Bearer {token}"))], &text)?;
        }
        // While the API server can't be asked, nobody new comes in; who is there stays.
        kubernetes.fail_with(500);
        refused(
            &[("authorization", "Bearer another")],
            "Failed to validate authentication token, err:Failed to authenticate request. err:",
        )?;
        agent.quiet()?;
    }
    Ok(())
}
