//! Our certificate, renewed over whichever tunnel carries the request, when two thirds of its life are over.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, timeout};
use tunnel_proto::certificate::Answer;

use crate::tls::credential::{CredentialError, Draft, validity};
use crate::tls::material::RELOAD_INTERVAL;
use crate::tls::{Material, provider};

/// A server that has not answered by then is of an earlier release, or gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between tries; doubles.
const SHORTEST: Duration = Duration::from_secs(15);

/// The longest time between tries, and between looks at the clock, which may jump.
const LONGEST: Duration = Duration::from_secs(1800);

/// What a tunnel may carry. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Renewals(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    request: Mutex<Option<Request>>,
    there: Notify,
}

/// A request, and where its answer goes.
pub(super) struct Request {
    /// PKCS #10, DER.
    pub csr: Vec<u8>,
    /// Dropped with the tunnel that was to carry it.
    pub answer: oneshot::Sender<Answer>,
}

/// Why there is no other certificate.
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
    /// Waits for a request. Each is given to one tunnel, and to another one each time.
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

    async fn ask(&self, csr: Vec<u8>) -> Result<Answer, RenewError> {
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

/// Renews for ever. What is saved is put in force by whoever watches the files.
pub(super) async fn keep(material: Arc<Material>, renewals: Renewals) {
    let files = material.files().clone();
    let folder = files.cert.parent().unwrap_or(Path::new("/"));
    if let Err(error) = tempfile::tempfile_in(folder) {
        tracing::warn!(
            folder = %folder.display(), %error,
            "the certificate can't be renewed (tls.renew): its folder has to be ours to write"
        );
    }
    let mut delays = tries();
    loop {
        let due = due(&material, SystemTime::now());
        if !due.is_zero() {
            sleep(due.min(LONGEST)).await;
            continue;
        }
        match renew(&material, &renewals).await {
            Ok(until) => {
                let until = humantime::format_rfc3339_seconds(until);
                tracing::info!(%until, "certificate renewed");
                delays = tries();
                sleep(2 * RELOAD_INTERVAL).await;
            }
            Err(error) => {
                let again = delays.next().unwrap_or(LONGEST);
                let left = left(&material);
                tracing::warn!(%error, ?left, ?again, "certificate not renewed");
                sleep(again).await;
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

async fn renew(material: &Material, renewals: &Renewals) -> Result<SystemTime, RenewError> {
    let (me, files) = (material.identity(), material.files());
    let draft = Draft::generate()?;
    let answer = renewals.ask(draft.request(&me.name)?).await?;
    let issued = answer.map_err(RenewError::Refused)?;
    let credential = draft.complete(issued, &me.name, &provider())?;
    credential.save(&files.cert, &files.ca)?;
    Ok(credential.not_after)
}

/// How long until the certificate is to be renewed: two thirds of its life, and a bit that depends on the
/// certificate, since many are issued in the same minute.
fn due(material: &Material, now: SystemTime) -> Duration {
    let key = material.key();
    let Some(leaf) = key.cert.first() else {
        return LONGEST;
    };
    let Some((from, until)) = validity(leaf) else {
        return LONGEST;
    };
    let life = until.duration_since(from).unwrap_or_default();
    // The end of a signature is as good as a die.
    let die = leaf.last().copied().unwrap_or_default();
    let bit = life / 20 * u32::from(die) / 255;
    (from + life * 2 / 3 + bit)
        .duration_since(now)
        .unwrap_or_default()
}

fn left(material: &Material) -> Duration {
    let key = material.key();
    let end = key.cert.first().and_then(validity);
    let left = end.map(|(_, until)| until.duration_since(SystemTime::now()));
    Duration::from_secs(left.and_then(Result::ok).unwrap_or_default().as_secs())
}
