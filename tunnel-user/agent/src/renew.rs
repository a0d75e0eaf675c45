//! Renewal of our certificate, over any tunnel, at two thirds of its validity.

mod pace;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, timeout};
use tunnel_proto::certificate::Answer;

use self::pace::{CLOCK_HOLD, Moment, Pace, clock_error};
use cpc_host::report::report;
use cpc_identity::credential::{Credential, CredentialError, Expected, PendingCredential};
use cpc_identity::reloading::RELOAD_INTERVAL;
use cpc_identity::validity::validity;
use cpc_identity::{Material, provider};

/// Timeout of the answer: a server without one is of an earlier release, or gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Shortest delay between attempts; it doubles.
const SHORTEST: Duration = Duration::from_secs(15);

/// Longest delay between attempts.
const LONGEST: Duration = Duration::from_secs(1800);

/// Maximum interval between reads of the clock, which may be set.
const LOOK: Duration = Duration::from_secs(60);

/// Queue of requests for the tunnels. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Renewals(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    request: Mutex<Option<Request>>,
    there: Notify,
}

/// A request, with the receiver of its answer.
pub(super) struct Request {
    /// PKCS #10, DER.
    pub csr: Vec<u8>,
    /// Sender of the answer, with the name of the server. Dropped with the tunnel that carries the
    /// request.
    pub answer: oneshot::Sender<(Arc<str>, Answer)>,
}

/// Reason why the renewal failed.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("no server has answered within {} s", PATIENCE.as_secs())]
    Silence,
    #[error("the tunnel has ended meanwhile")]
    Ended,
    #[error("refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Credential(#[from] CredentialError),
}

impl Renewals {
    /// Waits for a request. One tunnel gets each request, another one each time.
    pub(super) async fn next(&self) -> Request {
        loop {
            self.0.there.notified().await;
            if let Some(request) = self.put(None) {
                return request;
            }
        }
    }

    fn put(&self, request: Option<Request>) -> Option<Request> {
        let place = self.0.request.lock();
        let mut place = place.unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *place, request)
    }

    async fn ask(&self, csr: Vec<u8>) -> Result<(Arc<str>, Answer), RenewError> {
        let (answer, answered) = oneshot::channel();
        self.put(Some(Request { csr, answer }));
        self.0.there.notify_one();
        let answered = timeout(PATIENCE, answered).await;
        self.put(None);
        answered
            .map_err(|_| RenewError::Silence)?
            .map_err(|_| RenewError::Ended)
    }
}

/// Renews without end. The watch on the files puts the saved certificate in force.
pub(super) async fn keep(material: Arc<Material>, renewals: Renewals) {
    let files = material.files().clone();
    let folder = files.cert.parent().unwrap_or(Path::new("/"));
    if let Err(error) = tempfile::tempfile_in(folder) {
        tracing::warn!(
            folder = %folder.display(), error = report(&error),
            "the certificate can't be renewed (tls.renew): this process must be able to write its directory"
        );
    }
    let (mut pace, mut delays) = (Pace::default(), tries());
    loop {
        let wait = wait(&material, &pace);
        if !wait.is_zero() {
            sleep(wait.min(LOOK)).await;
            continue;
        }
        match renew(&material, &renewals).await {
            Ok((server, credential)) => {
                pace.issued(announce(&server, &credential), Moment::now());
                delays = tries();
                sleep(2 * RELOAD_INTERVAL).await;
            }
            Err(error) => {
                let again = match &error {
                    RenewError::Credential(CredentialError::Clock(_)) => CLOCK_HOLD,
                    _ => delays.next().unwrap_or(LONGEST),
                };
                let left = left(&material);
                tracing::warn!(
                    error = report(&error),
                    ?left,
                    ?again,
                    "certificate not renewed"
                );
                pace.failed(again, Moment::now());
            }
        }
    }
}

fn tries() -> <ExponentialBuilder as BackoffBuilder>::Backoff {
    let delays = ExponentialBuilder::new().with_min_delay(SHORTEST);
    delays
        .with_max_delay(LONGEST)
        .without_max_times()
        .with_jitter()
        .build()
}

async fn renew(
    material: &Material,
    renewals: &Renewals,
) -> Result<(Arc<str>, Credential), RenewError> {
    let (me, files) = (material.identity(), material.files());
    let draft = PendingCredential::generate()?;
    let (server, answer) = renewals.ask(draft.request(&me.name)?).await?;
    let issued = answer.map_err(RenewError::Refused)?;
    let expected = Expected::Renewal {
        identity: &me,
        anchors: &material.anchors(),
    };
    let credential = draft.complete(issued, &expected, &provider())?;
    credential.save(&files.cert, &files.ca)?;
    Ok((server, credential))
}

/// Logs the renewal. Returns the validity of the certificate.
fn announce(server: &str, credential: &Credential) -> Duration {
    let (from, until) = (credential.not_before, credential.not_after);
    tracing::info!(server, until = %humantime::format_rfc3339_seconds(until), "certificate renewed");
    for (ca, why) in &credential.refused {
        tracing::warn!(
            server, ca = ca.subject(), key = %ca.key(), %why,
            "a CA that the server offers is not trusted"
        );
        cpc_identity::audit::ca_refused(server, ca, why);
    }
    if let Some((off, ahead)) = clock_error(from, SystemTime::now()) {
        let off = humantime::format_duration(Duration::from_secs(off.as_secs()));
        tracing::warn!(
            server,
            "this host's clock is {off} {} the server's, by the certificate that it just issued: correct \
             the wrong one (NTP)",
            if ahead { "ahead of" } else { "behind" }
        );
    }
    until.duration_since(from).unwrap_or_default()
}

/// Returns the time until the next renewal.
fn wait(material: &Material, pace: &Pace) -> Duration {
    let key = material.key();
    let leaf = key.cert.first();
    let Some((leaf, validity)) = leaf.and_then(|leaf| Some((leaf, validity(leaf)?))) else {
        return LONGEST;
    };
    // Many are issued in the same minute, and the end of a signature is as good as a die.
    let share = leaf.last().copied().unwrap_or_default();
    pace.wait(validity, share, Moment::now())
}

fn left(material: &Material) -> Duration {
    let key = material.key();
    let end = key.cert.first().and_then(validity);
    let left = end.map(|(_, until)| until.duration_since(SystemTime::now()));
    Duration::from_secs(left.and_then(Result::ok).unwrap_or_default().as_secs())
}
