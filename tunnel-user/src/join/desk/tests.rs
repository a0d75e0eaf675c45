use std::collections::BTreeMap;
use std::path::Path;

use tempfile::TempDir;
use tunnel_fake_kubernetes::{FakeKubernetes, Review};

use super::*;
use crate::join::admit::Ticket;
use crate::kubernetes::token::TokenRules;
use crate::kubernetes::{Access, client};
use crate::tls::credential::{Credential, Draft, Expected, validity};
use crate::tls::{Files, KeyHash, TrustDomain, provider};

const DAY: Duration = Duration::from_secs(86_400);

/// A desk, and where its files are.
struct Office {
    place: TempDir,
    desk: Arc<Desk>,
}

fn office(pods: Option<Pods>) -> Office {
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
    let files = Files {
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
    let desk = Arc::new(Desk {
        book: Book::open(&place.path().join("join")).unwrap(),
        ca,
        validity: 30 * DAY,
        revocations: material.revocations(),
        material,
        pods,
        metrics: JoinMetrics::default(),
    });
    Office { place, desk }
}

impl Office {
    fn token(&self, uses: u32) -> Token {
        let token = Token::generate().unwrap();
        let ticket = Ticket {
            digest: token.digest(),
            nodes: "w*".into(),
            addresses: vec!["10.99.0.0/16".parse().unwrap()],
            uses,
            expires: SystemTime::now() + DAY,
            used: BTreeMap::new(),
        };
        let put = self.desk.book.change(|pages| {
            pages.tokens.insert(token.id().into(), ticket);
            Ok::<_, BookError>(())
        });
        put.unwrap();
        token
    }

    async fn join(&self, token: &str, node: &str, draft: &Draft) -> Answer {
        let join = Join {
            token: token.into(),
            node: node.into(),
            addresses: vec!["10.99.0.7".parse().unwrap()],
            csr: draft.request("anybody at all").unwrap(),
        };
        let remote = "192.0.2.1:1".parse().unwrap();
        self.desk.join(join, remote).await
    }

    fn complete(&self, draft: &Draft, issued: Issued, name: &str) -> Credential {
        let roots = self.desk.material.roots();
        let pins = [KeyHash::of(&roots[0]).unwrap()];
        let expected = Expected::Join { name, pins: &pins };
        draft.complete(issued, &expected, &provider()).unwrap()
    }

    fn ca(&self) -> &Path {
        &self.desk.ca
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
    let office = office(None);
    let draft = Draft::generate().unwrap();
    let token = office.token(1).reveal();
    let issued = office.join(&token, "w1", &draft).await.unwrap();
    let credential = office.complete(&draft, issued.clone(), "w1");
    let expected = agent("cluster.local", "w1", &["10.99.0.7"]);
    assert_eq!(credential.identity, expected);
    // The CA ends before 30 days are over.
    let leaf = CertificateDer::from(issued.chain[0].clone());
    let (_, until) = validity(&leaf).unwrap();
    assert_eq!(until, Authority::open(office.ca()).unwrap().not_after());
    let pages = office.desk.book.read().unwrap();
    assert_eq!(pages.issued["w1"].serial, serial(&leaf));
    // An answer that was lost is given again, by another serial number.
    let again = office.join(&token, "w1", &draft).await.unwrap();
    assert_ne!(again.chain, issued.chain);
    let other = Draft::generate().unwrap();
    let why = office.join(&token, "w2", &other).await.unwrap_err();
    assert!(
        why.contains("used up") || why.contains("10.99.0.7"),
        "{why}"
    );
}

#[tokio::test]
async fn who_is_revoked_gets_nothing_and_nothing_is_used() {
    let office = office(None);
    let token = office.token(1);
    let draft = Draft::generate().unwrap();
    let why = office
        .join(&token.reveal(), "w9", &draft)
        .await
        .unwrap_err();
    assert!(why.contains("has been revoked"), "{why}");
    let w9 = agent("cluster.local", "w9", &[]);
    let why = office.desk.renew(w9, draft.request("").unwrap()).await;
    assert!(why.unwrap_err().contains("has been revoked"));
    let book = Book::open(&office.place.path().join("join")).unwrap();
    assert_eq!(book.read().unwrap().tokens[token.id()].uses, 1);
}

#[tokio::test]
async fn our_own_trouble_is_not_told_and_costs_nothing() {
    let office = office(None);
    let token = office.token(1);
    let draft = Draft::generate().unwrap();
    let key = office.ca().join("ca.key");
    let aside = office.ca().join("aside");
    std::fs::rename(&key, &aside).unwrap();
    let why = office
        .join(&token.reveal(), "w1", &draft)
        .await
        .unwrap_err();
    assert!(why.contains("its log says why"), "{why}");
    std::fs::rename(&aside, &key).unwrap();
    office.join(&token.reveal(), "w1", &draft).await.unwrap();
}

/// Agents would refuse it: better to say so where it can be put right.
#[tokio::test]
async fn a_ca_that_agents_would_not_know_issues_nothing() {
    let office = office(None);
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    let other = office.place.path().join("other");
    Authority::create(&other, &domain, SystemTime::now() + 20 * DAY).unwrap();
    for file in ["ca.crt", "ca.key"] {
        std::fs::copy(other.join(file), office.ca().join(file)).unwrap();
    }
    let applicant = Draft::generate().unwrap().request("w1").unwrap();
    let applicant = Applicant::read(&applicant).unwrap();
    let now = SystemTime::now();
    let issued = office.desk.issue("w1", &[], &applicant, ("x", now));
    assert!(matches!(issued, Err(DeskError::UnknownCa)));
}

#[tokio::test]
async fn a_renewal_is_for_who_asks_and_of_what_is_still_theirs() {
    let office = office(None);
    let draft = Draft::generate().unwrap();
    let csr = draft.request("w1").unwrap();
    let w1 = agent("cluster.local", "w1", &["10.99.0.1", "10.99.0.7"]);
    let issued = office.desk.renew(w1.clone(), csr.clone()).await.unwrap();
    let credential = office.complete(&draft, issued, "w1");
    assert_eq!(credential.identity, w1);
    let soon = office.desk.renew(w1.clone(), csr.clone()).await;
    assert!(soon.unwrap_err().contains("younger than"));
    let foreign = agent("elsewhere", "w2", &[]);
    let foreign = office.desk.renew(foreign, csr.clone()).await;
    assert!(foreign.unwrap_err().contains("come from elsewhere"));
    let garbage = office
        .desk
        .renew(agent("cluster.local", "w3", &[]), vec![1]);
    assert!(garbage.await.unwrap_err().contains("of no use"));
    // Of a stolen certificate nothing comes but its own name and addresses.
    let thief = office
        .desk
        .renew(agent("cluster.local", "w4", &["10.99.0.7"]), csr);
    let thief = office.complete(&draft, thief.await.unwrap(), "w4");
    assert_eq!(thief.identity, agent("cluster.local", "w4", &[]));
}

#[tokio::test]
async fn a_pod_joins_as_its_own_node() {
    let api = FakeKubernetes::start().unwrap();
    for (token, node) in [("pod-on-w1", Some("w1")), ("old", None)] {
        let mut review = Review::of("cpc-system", "cpc-agent", "cpc-join");
        review.node = node.map(Into::into);
        api.set_token(token, review);
    }
    api.set_token("other", Review::of("cpc-system", "default", "cpc-join"));
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
    let office = office(Some(Pods {
        reviewer: TokenReviewer::new(client(&access).await.unwrap(), rules),
        addresses: vec!["10.99.0.0/16".parse().unwrap()],
    }));
    let draft = Draft::generate().unwrap();
    for (token, node, named) in [
        ("pod-on-w1", "w2", "nodes called w1"),
        ("old", "w1", "1.32"),
        ("other", "w1", "service account"),
        ("unknown", "w1", "not valid"),
    ] {
        let why = office.join(token, node, &draft).await.unwrap_err();
        assert!(why.contains(named), "{token}: {why}");
    }
    let issued = office.join("pod-on-w1", "w1", &draft).await.unwrap();
    office.complete(&draft, issued, "w1");
    // A pod's key is a new one each time.
    let draft = Draft::generate().unwrap();
    office.join("pod-on-w1", "w1", &draft).await.unwrap();
}
