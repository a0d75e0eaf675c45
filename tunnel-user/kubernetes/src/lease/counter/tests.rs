use tokio::time::timeout;
use tunnel_fake_kubernetes::FakeKubernetes;

use super::super::tests::{client_of, lease};
use super::*;

const SOON: Duration = Duration::from_secs(10);

async fn counter(api: &FakeKubernetes) -> watch::Receiver<Option<u32>> {
    let client = client_of(api).await;
    let (counter, count) = LeaseCounter::new(client, "n", "app=us".into(), Arc::new(()));
    tokio::spawn(counter.run());
    count
}

async fn becomes(count: &mut watch::Receiver<Option<u32>>, wanted: u32) {
    let seen = count.wait_for(|count| *count == Some(wanted));
    assert!(timeout(SOON, seen).await.is_ok(), "not {wanted}");
}

#[tokio::test]
async fn held_leases_with_the_label_count() {
    let api = FakeKubernetes::start().unwrap();
    api.put_lease(lease("a", "us", 0, 30));
    api.put_lease(lease("old", "us", 31, 30));
    api.put_lease(lease("other", "else", 0, 30));
    let mut count = counter(&api).await;
    assert_eq!(*count.borrow(), None);
    becomes(&mut count, 1).await;
    api.put_lease(lease("b", "us", 0, 30));
    becomes(&mut count, 2).await;
    api.put_lease(lease("old", "us", 0, 30));
    becomes(&mut count, 3).await;
    api.delete_lease("n", "a");
    becomes(&mut count, 2).await;
    // All of it told by one watch.
    assert_eq!(api.count("watch=true"), 1);
}

#[tokio::test]
async fn no_lease_counts_as_one_server() {
    let api = FakeKubernetes::start().unwrap();
    let mut count = counter(&api).await;
    becomes(&mut count, 1).await;
}

#[tokio::test]
async fn a_lease_that_runs_out_is_looked_up_before_it_is_believed() {
    let api = FakeKubernetes::start().unwrap();
    api.put_lease(lease("a", "us", 0, 30));
    api.put_lease(lease("b", "us", 0, 1));
    let mut count = counter(&api).await;
    becomes(&mut count, 2).await;
    let lists = api.count("leases?");
    becomes(&mut count, 1).await;
    assert!(api.count("leases?") > lists);
}

#[tokio::test]
async fn without_an_api_server_the_count_stays() {
    let api = FakeKubernetes::start().unwrap();
    for name in ["a", "b"] {
        api.put_lease(lease(name, "us", 0, 2));
    }
    let mut count = counter(&api).await;
    becomes(&mut count, 2).await;
    api.fail_with(503);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(*count.borrow_and_update(), Some(2));
    api.put_lease(lease("b", "us", 0, 30));
    api.fail_with(None);
    becomes(&mut count, 1).await;
}
