use std::path::Path;

use tempfile::TempDir;
use tunnel_fake_kubernetes::{FakeKubernetes, Review};

use super::*;
use crate::credential::{Credential, Expected, PendingCredential};
use crate::join::issue_records::Ticket;
use crate::{KeyHash, TrustDomain, provider};
use cpc_config::TlsFiles;
use cpc_config::kubernetes::{Access, TokenRules};
use cpc_kubernetes::client;

const DAY: Duration = Duration::from_secs(86_400);

/// An issuer with its directory.
struct IssuerFixture {
    place: TempDir,
    issuer: Arc<Issuer>,
}

fn fixture(pods: Option<Pods>) -> IssuerFixture {
    let place = tempfile::tempdir().unwrap();
    let (ca, own) = (place.path().join("ca"), place.path().join("s1"));
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    Authority::create(&ca, &domain, SystemTime::now() + 20 * DAY).unwrap();
    let request = Request {
        role: Role::Server,
        name: "s1".into(),
        dns: vec![],
        addresses: vec![],
        not_after: SystemTime::now() + DAY,
    };
    Authority::open(&ca).unwrap().issue(&request, &own).unwrap();
    let files = TlsFiles {
        cert: own.join("server.crt"),
        key: own.join("server.key"),
        ca: own.join("ca.crt"),
        trust: vec![],
        revoked: Some(place.path().join("revoked")),
    };
    std::fs::write(
        place.path().join("revoked"),
        "spiffe://cluster.local/agent/w9\n",
    )
    .unwrap();
    let material = Material::load(files, Role::Server, provider()).unwrap();
    let issuer = issuer(&place, material, pods);
    IssuerFixture { place, issuer }
}

fn issuer(place: &TempDir, material: Arc<Material>, pods: Option<Pods>) -> Arc<Issuer> {
    let log = IssueLog::open(&place.path().join("join")).unwrap();
    Arc::new(Issuer {
        clock: Clock::resume(log.read().unwrap().settled),
        log,
        ca: place.path().join("ca"),
        validity: 30 * DAY,
        revocations: material.revocations(),
        material,
        pods,
        metrics: JoinMetrics::default(),
        jobs: Jobs::default(),
    })
}

impl IssuerFixture {
    /// Reopens the file, as a restart of the server does.
    fn opened_again(self) -> Self {
        let files = self.issuer.material.files().clone();
        let material = Material::load(files, Role::Server, provider()).unwrap();
        let issuer = issuer(&self.place, material, None);
        Self { issuer, ..self }
    }

    fn token(&self, uses: u32) -> Token {
        let token = Token::generate().unwrap();
        let ticket = Ticket {
            digest: token.digest(),
            nodes: "w*".into(),
            addresses: vec!["10.99.0.0/16".parse().unwrap()],
            uses,
            created: None,
            expires: SystemTime::now() + DAY,
            used: Vec::new(),
        };
        let put = self.issuer.log.change(|records| {
            records.tokens.insert(token.id().into(), ticket);
            Ok::<_, IssueLogError>(())
        });
        put.unwrap();
        token
    }

    async fn join(&self, token: &str, node: &str, pending: &PendingCredential) -> Answer {
        self.join_at(token, node, "10.99.0.7", pending).await
    }

    async fn join_at(
        &self,
        token: &str,
        node: &str,
        addr: &str,
        pending: &PendingCredential,
    ) -> Answer {
        let join = Join {
            token: token.into(),
            node: node.into(),
            addresses: vec![addr.parse().unwrap()],
            csr: pending.request("anybody at all").unwrap(),
        };
        let remote = "192.0.2.1:1".parse().unwrap();
        self.issuer.join(join, remote).await
    }

    fn complete(&self, pending: &PendingCredential, issued: Issued, name: &str) -> Credential {
        let roots = self.issuer.material.roots();
        let pins = [KeyHash::of(&roots[0]).unwrap()];
        let expected = Expected::Join { name, pins: &pins };
        pending.complete(issued, &expected, &provider()).unwrap()
    }

    fn ca(&self) -> &Path {
        &self.issuer.ca
    }
}

fn agent(domain: &str, name: &str, addresses: &[&str]) -> Identity {
    Identity {
        trust_domain: domain.parse().unwrap(),
        role: Role::Agent,
        name: name.into(),
        addresses: addresses.iter().map(|addr| addr.parse().unwrap()).collect(),
    }
}

#[tokio::test]
async fn a_certificate_says_what_was_judged_and_nothing_of_the_request() {
    let fixture = fixture(None);
    let pending = PendingCredential::generate().unwrap();
    let token = fixture.token(1).reveal();
    let issued = fixture.join(&token, "w1", &pending).await.unwrap();
    let credential = fixture.complete(&pending, issued.clone(), "w1");
    let expected = agent("cluster.local", "w1", &["10.99.0.7"]);
    assert_eq!(credential.identity, expected);
    // The CA ends before 30 days are over.
    let leaf = CertificateDer::from(issued.chain[0].clone());
    let (_, until) = validity(&leaf).unwrap();
    assert_eq!(until, Authority::open(fixture.ca()).unwrap().not_after());
    let records = fixture.issuer.log.read().unwrap();
    assert_eq!(records.issued["w1"][0].serial, serial_of(&leaf));
    // An answer that was lost is given again, the same, and for nothing else.
    let again = fixture.join(&token, "w1", &pending).await.unwrap();
    assert_eq!(again, issued);
    for addr in ["10.99.0.8", "10.99.0.9"] {
        let why = fixture.join_at(&token, "w1", addr, &pending).await;
        assert!(why.unwrap_err().contains("ask for the same"));
    }
    assert_eq!(fixture.issuer.log.read().unwrap().holders().count(), 1);
    // An address is one, however it is written.
    let mapped = fixture.join_at(&token, "w1", "::ffff:10.99.0.7", &pending);
    assert_eq!(mapped.await.unwrap(), issued);
    let other = PendingCredential::generate().unwrap();
    let why = fixture.join(&token, "w2", &other).await.unwrap_err();
    assert!(
        why.contains("used up") || why.contains("10.99.0.7"),
        "{why}"
    );
}

#[tokio::test]
async fn who_is_revoked_gets_nothing_and_nothing_is_used() {
    let fixture = fixture(None);
    let token = fixture.token(1);
    let pending = PendingCredential::generate().unwrap();
    let why = fixture
        .join(&token.reveal(), "w9", &pending)
        .await
        .unwrap_err();
    assert!(why.contains("has been revoked"), "{why}");
    let w9 = agent("cluster.local", "w9", &[]);
    let why = fixture
        .issuer
        .renew(w9, None, pending.request("").unwrap())
        .await;
    assert!(why.unwrap_err().contains("has been revoked"));
    let log = IssueLog::open(&fixture.place.path().join("join")).unwrap();
    assert_eq!(log.read().unwrap().tokens[token.id()].uses, 1);
}

#[tokio::test]
async fn a_job_has_its_place_until_it_ends_and_not_until_its_caller_does() {
    let jobs = Jobs::default();
    let (free, is_free) = std::sync::mpsc::channel::<()>();
    let is_free = Arc::new(std::sync::Mutex::new(is_free));
    for _ in 0..MAX_JOBS {
        let (started, is_started) = tokio::sync::oneshot::channel();
        let (jobs, is_free) = (jobs.clone(), is_free.clone());
        let caller = tokio::spawn(async move {
            let job = move || {
                started.send(()).unwrap();
                let _ = is_free.lock().unwrap().recv();
            };
            jobs.run(job).await
        });
        is_started.await.unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
    }
    assert_eq!(jobs.0.available_permits(), 0);
    drop(free);
    assert_eq!(jobs.run(|| 1).await.unwrap(), 1);
}

/// Other requests wait for the lock.
#[tokio::test]
async fn a_wrong_token_takes_no_lock() {
    let fixture = fixture(None);
    let pending = PendingCredential::generate().unwrap();
    let wrong = Token::generate().unwrap().reveal();
    let log = fixture.issuer.log.clone();
    let (locked, is_locked) = std::sync::mpsc::channel();
    let (free, is_free) = std::sync::mpsc::channel::<()>();
    let holding = std::thread::spawn(move || {
        let held = log.change(|_| {
            locked.send(()).unwrap();
            let _ = is_free.recv();
            Ok::<_, IssueLogError>(())
        });
        held.unwrap();
    });
    is_locked.recv().unwrap();
    let why = fixture.join(&wrong, "w1", &pending).await.unwrap_err();
    drop(free);
    holding.join().unwrap();
    assert!(why.contains("the token is unknown"), "{why}");
}

#[tokio::test]
async fn our_own_trouble_is_not_told_and_costs_nothing() {
    let fixture = fixture(None);
    let token = fixture.token(1);
    let pending = PendingCredential::generate().unwrap();
    let key = fixture.ca().join("ca.key");
    let aside = fixture.ca().join("aside");
    std::fs::rename(&key, &aside).unwrap();
    let why = fixture
        .join(&token.reveal(), "w1", &pending)
        .await
        .unwrap_err();
    assert!(why.contains("its log says why"), "{why}");
    std::fs::rename(&aside, &key).unwrap();
    fixture.join(&token.reveal(), "w1", &pending).await.unwrap();
}

/// Agents would refuse it: better to say so where it can be put right.
#[tokio::test]
async fn a_ca_that_agents_would_not_know_issues_nothing() {
    let fixture = fixture(None);
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    let other = fixture.place.path().join("other");
    Authority::create(&other, &domain, SystemTime::now() + 20 * DAY).unwrap();
    for file in ["ca.crt", "ca.key"] {
        std::fs::copy(other.join(file), fixture.ca().join(file)).unwrap();
    }
    let csr = PendingCredential::generate()
        .unwrap()
        .request("w1")
        .unwrap();
    let csr = SigningRequest::read(&csr).unwrap();
    let now = SystemTime::now();
    let issued = fixture.issuer.issue("w1", &[], &csr, ("x", now));
    assert!(matches!(issued, Err(IssuerError::UnknownCa)));
}

#[tokio::test]
async fn a_renewal_is_for_who_asks_and_of_what_is_still_theirs() {
    let fixture = fixture(None);
    let pending = PendingCredential::generate().unwrap();
    let csr = pending.request("w1").unwrap();
    let w1 = agent("cluster.local", "w1", &["10.99.0.1", "10.99.0.7"]);
    let issued = fixture
        .issuer
        .renew(w1.clone(), None, csr.clone())
        .await
        .unwrap();
    let credential = fixture.complete(&pending, issued, "w1");
    assert_eq!(credential.identity, w1);
    let soon = fixture.issuer.renew(w1.clone(), None, csr.clone()).await;
    assert!(soon.unwrap_err().contains("younger than"));
    let foreign = agent("elsewhere", "w2", &[]);
    let foreign = fixture.issuer.renew(foreign, None, csr.clone()).await;
    assert!(foreign.unwrap_err().contains("come from elsewhere"));
    let garbage = fixture
        .issuer
        .renew(agent("cluster.local", "w3", &[]), None, vec![1]);
    assert!(garbage.await.unwrap_err().contains("request is invalid"));
    // Of a stolen certificate nothing comes but its own name and addresses.
    let thief = fixture
        .issuer
        .renew(agent("cluster.local", "w4", &["10.99.0.7"]), None, csr);
    let thief = fixture.complete(&pending, thief.await.unwrap(), "w4");
    assert_eq!(thief.identity, agent("cluster.local", "w4", &[]));
}

/// Returns an issuer that pods may join at: `pod-on-w1` is the token of a pod on w1, and so on.
async fn fixture_of(api: &FakeKubernetes) -> IssuerFixture {
    for (token, node) in [
        ("pod-on-w1", Some("w1")),
        ("pod-on-w2", Some("w2")),
        ("old", None),
    ] {
        let mut review = Review::of("cpc-system", "cpc-agent", "cpc-join");
        review.node = node.map(Into::into);
        api.set_token(token, review);
    }
    api.set_token("other", Review::of("cpc-system", "default", "cpc-join"));
    api.put_node_at("w1", "10.99.0.7".parse().unwrap());
    let kubeconfig = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(kubeconfig.path(), api.kubeconfig()).unwrap();
    let access = Access {
        kubeconfig: Some(kubeconfig.path().into()),
        rate: None,
    };
    let rules = TokenRules {
        audience: "cpc-join".into(),
        namespace: "cpc-system".into(),
        service_account: "cpc-agent".into(),
    };
    let client = client(&access).await.unwrap();
    fixture(Some(Pods {
        reviewer: TokenReviewer::new(client.clone(), rules),
        nodes: Nodes::new(client),
        addresses: vec!["10.99.0.0/16".parse().unwrap()],
    }))
}

#[tokio::test]
async fn a_pod_joins_as_its_own_node() {
    let api = FakeKubernetes::start().unwrap();
    let fixture = fixture_of(&api).await;
    let pending = PendingCredential::generate().unwrap();
    for (token, node, named) in [
        ("pod-on-w1", "w2", "nodes called w1"),
        ("old", "w1", "1.32"),
        ("other", "w1", "service account"),
        ("unknown", "w1", "not valid"),
    ] {
        let why = fixture.join(token, node, &pending).await.unwrap_err();
        assert!(why.contains(named), "{token}: {why}");
        assert!(!why.contains("default"), "{token}: {why}");
    }
    let issued = fixture.join("pod-on-w1", "w1", &pending).await.unwrap();
    fixture.complete(&pending, issued.clone(), "w1");
    let again = fixture.join("pod-on-w1", "w1", &pending).await.unwrap();
    assert_eq!(again, issued);
    // Another key needs another token, as another pod has one.
    let pending = PendingCredential::generate().unwrap();
    let why = fixture.join("pod-on-w1", "w1", &pending).await.unwrap_err();
    assert!(why.contains("used up"), "{why}");
    let mut review = Review::of("cpc-system", "cpc-agent", "cpc-join");
    review.node = Some("w1".into());
    api.set_token("next-on-w1", review);
    fixture.join("next-on-w1", "w1", &pending).await.unwrap();
}

/// Kubernetes knows the addresses of a node; a hint about tokens of ours would mislead.
#[tokio::test]
async fn a_pod_joins_with_the_addresses_of_its_node() {
    let api = FakeKubernetes::start().unwrap();
    let fixture = fixture_of(&api).await;
    let pending = PendingCredential::generate().unwrap();
    let w2 = async |addr| fixture.join_at("pod-on-w2", "w2", addr, &pending).await;
    let why = w2("10.99.0.8").await.unwrap_err();
    assert!(why.contains("Kubernetes does not say that w2"), "{why}");
    api.put_node_at("w2", "10.99.0.8".parse().unwrap());
    let why = w2("10.99.0.7").await.unwrap_err();
    assert!(why.contains("Kubernetes does not say that w2"), "{why}");
    assert!(!why.contains("cpc token create"), "{why}");
    api.put_node_at("w2", "10.1.1.1".parse().unwrap());
    let why = w2("10.1.1.1").await.unwrap_err();
    assert!(why.contains("join.kubernetes.addresses"), "{why}");
    assert!(!why.contains("cpc token create"), "{why}");
    api.put_node_at("w2", "10.99.0.8".parse().unwrap());
    w2("10.99.0.8").await.unwrap();
}

/// A fault between server and API server appears in the server's log alone.
#[tokio::test]
async fn trouble_with_kubernetes_stays_with_the_server() {
    let api = FakeKubernetes::start().unwrap();
    let fixture = fixture_of(&api).await;
    let pending = PendingCredential::generate().unwrap();
    api.fail_with(403);
    for token in ["pod-on-w1", "unknown"] {
        let why = fixture.join(token, "w1", &pending).await.unwrap_err();
        assert_eq!(
            why,
            "the server could not issue a certificate; its log says why"
        );
    }
    let failed = IssuerError::Review(ReviewError::Lookup("no RBAC for the reviewer".into()));
    assert!(!public_reason(&failed, "w1", None).contains("RBAC"));
}

/// An address becomes free: its node was deleted, has another address, or is revoked.
#[tokio::test]
async fn a_certificate_of_a_node_that_is_gone_keeps_nothing() {
    let api = FakeKubernetes::start().unwrap();
    let fixture = fixture_of(&api).await;
    let first = PendingCredential::generate().unwrap();
    fixture.join("pod-on-w1", "w1", &first).await.unwrap();
    // Two Nodes with one address: a kubelet writes its own.
    api.put_node_at("w2", "10.99.0.7".parse().unwrap());
    let pending = PendingCredential::generate().unwrap();
    let why = fixture.join("pod-on-w2", "w2", &pending).await.unwrap_err();
    assert!(why.contains("cpc token release --ip 10.99.0.7"), "{why}");
    api.delete_node("w1");
    fixture.join("pod-on-w2", "w2", &pending).await.unwrap();
    // By a token of ours too: w2 has moved, and is then deleted.
    let token = fixture.token(3).reveal();
    let third = PendingCredential::generate().unwrap();
    let why = fixture.join(&token, "w3", &third).await.unwrap_err();
    assert!(why.contains("certificate of w2"), "{why}");
    api.put_node_at("w2", "10.99.0.9".parse().unwrap());
    fixture.join(&token, "w3", &third).await.unwrap();
    let other = PendingCredential::generate().unwrap();
    let why = fixture.join_at(&token, "w2", "10.99.0.9", &other).await;
    assert!(why.unwrap_err().contains("cpc token release w2"));
    api.delete_node("w2");
    fixture
        .join_at(&token, "w2", "10.99.0.9", &other)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_node_that_did_not_join_by_kubernetes_need_not_be_in_it() {
    let api = FakeKubernetes::start().unwrap();
    let fixture = fixture_of(&api).await;
    let token = fixture.token(1).reveal();
    let pending = PendingCredential::generate().unwrap();
    fixture.join(&token, "w9-vm", &pending).await.unwrap();
    let pending = PendingCredential::generate().unwrap();
    let why = fixture.join("pod-on-w1", "w1", &pending).await.unwrap_err();
    assert!(why.contains("certificate of w9-vm"), "{why}");
}

#[tokio::test]
async fn a_revoked_certificate_keeps_nothing() {
    let fixture = fixture(None);
    let token = fixture.token(2).reveal();
    let pending = PendingCredential::generate().unwrap();
    fixture.join(&token, "w1", &pending).await.unwrap();
    let other = PendingCredential::generate().unwrap();
    assert!(fixture.join(&token, "w2", &other).await.is_err());
    let list = fixture.place.path().join("revoked");
    let records = fixture.issuer.log.read().unwrap();
    std::fs::write(
        &list,
        format!("serial:{}\n", records.issued["w1"][0].serial),
    )
    .unwrap();
    let fixture = fixture.opened_again();
    fixture.join(&token, "w2", &other).await.unwrap();
    // What was issued is not given again either.
    let why = fixture.join(&token, "w1", &pending).await.unwrap_err();
    assert!(why.contains("has been revoked"), "{why}");
}

/// The tunnel of the agent may still be open.
#[tokio::test]
async fn a_revoked_certificate_is_not_renewed() {
    let fixture = fixture(None);
    let pending = PendingCredential::generate().unwrap();
    let csr = pending.request("w1").unwrap();
    let w1 = agent("cluster.local", "w1", &["10.99.0.7"]);
    let token = fixture.token(1).reveal();
    let issued = fixture.join(&token, "w1", &pending).await.unwrap();
    let leaf = CertificateDer::from(issued.chain[0].clone());
    let list = fixture.place.path().join("revoked");
    std::fs::write(&list, format!("serial:{}\n", serial_of(&leaf))).unwrap();
    let fixture = fixture.opened_again();
    let before = fixture.issuer.log.read().unwrap();
    let why = fixture.issuer.renew(w1, Some(leaf), csr).await.unwrap_err();
    assert!(why.contains("has been revoked"), "{why}");
    assert_eq!(fixture.issuer.log.read().unwrap(), before);
}

/// A server starts while its clock is ahead. By that clock a certificate has ended, though its
/// holder is alive.
#[tokio::test]
async fn a_start_with_a_clock_that_is_ahead_gives_nothing_away() {
    for (settled, is_kept) in [(Some(2 * DAY), true), (Some(DAY / 2), false), (None, false)] {
        let fixture = fixture(None);
        let now = SystemTime::now();
        let holder = Holder {
            addresses: vec!["10.99.0.7".parse().unwrap()],
            key: "sha256:00".into(),
            serial: "4A".into(),
            since: now - 3 * DAY,
            until: now - DAY,
            token: "x".into(),
        };
        let put = fixture.issuer.log.change(|records| {
            records.record("w8", holder);
            records.settled = settled.map(|ago| now - ago);
            Ok::<_, IssueLogError>(())
        });
        put.unwrap();
        let fixture = fixture.opened_again();
        let token = fixture.token(1).reveal();
        let pending = PendingCredential::generate().unwrap();
        let joined = fixture.join(&token, "w1", &pending).await;
        match is_kept {
            true => assert!(joined.unwrap_err().contains("certificate of w8")),
            false => drop(joined.unwrap()),
        }
    }
}

#[tokio::test]
async fn the_settled_time_is_on_record_and_a_clock_that_is_ahead_moves_it_not() {
    let fixture = fixture(None);
    let settled = |fixture: &IssuerFixture| fixture.issuer.log.read().unwrap().settled;
    assert_eq!(settled(&fixture), None);
    fixture.issuer.note_time().unwrap();
    let now = SystemTime::now();
    let ago = now.duration_since(settled(&fixture).unwrap()).unwrap();
    assert!(ago < DAY);
    let long_ago = SystemTime::UNIX_EPOCH + 20_000 * DAY;
    let put = fixture.issuer.log.change(|records| {
        records.settled = Some(long_ago);
        Ok::<_, IssueLogError>(())
    });
    put.unwrap();
    let fixture = fixture.opened_again();
    fixture.issuer.note_time().unwrap();
    assert!(settled(&fixture).unwrap() < long_ago + DAY);
}

#[tokio::test]
async fn what_cpc_pki_issued_is_known() {
    let fixture = fixture(None);
    let holder = Holder {
        addresses: vec!["10.99.0.7".parse().unwrap()],
        key: "sha256:00".into(),
        serial: "4A".into(),
        since: SystemTime::now(),
        until: SystemTime::now() + DAY,
        token: "pki".into(),
    };
    let put = IssueLog::of_ca(fixture.ca()).change(|records| {
        records.record("w8", holder);
        Ok::<_, IssueLogError>(())
    });
    put.unwrap();
    let token = fixture.token(1).reveal();
    let pending = PendingCredential::generate().unwrap();
    let why = fixture.join(&token, "w1", &pending).await.unwrap_err();
    assert!(why.contains("certificate of w8"), "{why}");
    let why = fixture.join_at(&token, "w8", "10.99.0.1", &pending).await;
    assert!(why.unwrap_err().contains("another key"));
}
