use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tunnel_fake_kubernetes::FakeKubernetes;

use super::super::tests::{client_of, lease};
use super::*;

const SOON: Duration = Duration::from_secs(10);

/// Starts a holder that renews ten times a second. Returns its task, and the sender that stops it.
async fn holder(api: &FakeKubernetes, ids: &[&str]) -> (JoinHandle<()>, oneshot::Sender<()>) {
    let labels = "app=us".parse().unwrap();
    let ids = ids.iter().map(|&id| id.into()).collect();
    let client = client_of(api).await;
    let mut holder = LeaseHolder::new(client, "n", labels, ids, Arc::new(()));
    holder.interval = Duration::from_millis(100);
    let (stop, stopped) = oneshot::channel();
    let run = holder.run(async { drop(stopped.await) });
    (tokio::spawn(run), stop)
}

fn find(api: &FakeKubernetes, name: &str) -> Option<Value> {
    let mut leases = api.leases().into_iter();
    leases.find(|lease| lease["metadata"]["name"] == name)
}

async fn until(what: impl Fn() -> bool) {
    let seen = async {
        while !what() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, seen).await.unwrap();
}

#[tokio::test]
async fn leases_are_made_renewed_and_given_up() {
    let api = FakeKubernetes::start().unwrap();
    let (running, stop) = holder(&api, &["a", "a-2"]).await;
    let names = [
        "konnectivity-proxy-server-a",
        "konnectivity-proxy-server-a-2",
    ];
    until(|| names.iter().all(|name| find(&api, name).is_some())).await;
    let first = find(&api, names[1]).unwrap();
    assert_eq!(first["spec"]["holderIdentity"], "a-2");
    assert_eq!(first["spec"]["leaseDurationSeconds"], 30);
    assert_eq!(first["metadata"]["labels"]["app"], "us");
    assert_eq!(first["metadata"]["namespace"], "n");
    let renewed = |lease: Value| lease["spec"]["renewTime"].as_str().unwrap().to_owned();
    let made = renewed(first);
    until(|| renewed(find(&api, names[1]).unwrap()) > made).await;
    // Renewals need no read.
    assert_eq!(
        api.count("GET /apis/coordination.k8s.io/v1/namespaces/n/leases/"),
        2
    );

    stop.send(()).unwrap();
    timeout(SOON, running).await.unwrap().unwrap();
    assert_eq!(api.leases(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_lease_that_others_change_or_take_comes_back() {
    let api = FakeKubernetes::start().unwrap();
    let name = "konnectivity-proxy-server-a";
    api.put_lease(lease(name, "else", 100, 30));
    let (_running, _stop) = holder(&api, &["a"]).await;
    let ours = |lease: Option<Value>| lease.is_some_and(|l| l["metadata"]["labels"]["app"] == "us");
    until(|| ours(find(&api, name))).await;
    api.put_lease(lease(name, "else", 100, 30));
    until(|| ours(find(&api, name))).await;
    api.delete_lease("n", name);
    until(|| ours(find(&api, name))).await;
    api.fail_with(503);
    sleep(Duration::from_millis(300)).await;
    api.delete_lease("n", name);
    api.fail_with(None);
    until(|| ours(find(&api, name))).await;
}

#[tokio::test]
async fn what_has_run_out_is_cleared_away() {
    let api = FakeKubernetes::start().unwrap();
    api.put_lease(lease("gone", "us", 31, 30));
    api.put_lease(lease("other", "else", 31, 30));
    api.put_lease(lease("held", "us", 5, 30));
    let (_running, _stop) = holder(&api, &["a"]).await;
    until(|| find(&api, "gone").is_none()).await;
    sleep(Duration::from_millis(300)).await;
    assert!(find(&api, "other").is_some());
    assert!(find(&api, "held").is_some());
    assert_eq!(api.count("DELETE"), 1);
}

#[tokio::test]
async fn an_end_without_an_api_server_does_not_take_long() {
    let api = FakeKubernetes::start().unwrap();
    let (running, stop) = holder(&api, &["a"]).await;
    until(|| !api.leases().is_empty()).await;
    drop(api);
    stop.send(()).unwrap();
    timeout(DELETE_TIMEOUT + SOON / 2, running)
        .await
        .unwrap()
        .unwrap();
}
