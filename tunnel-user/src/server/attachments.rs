//! Puts the configured attachments of the redirect in place: programs, listeners, followers.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::server::{AttachmentConfig, FailMode, RedirectConfig};
use crate::process::inherited::{self, Inherited};
use crate::redirect::{
    self, Attachment, AttachmentSpec, Flows, Follower, Heartbeat, Presence, Redirect,
    RedirectError, Routes, Shortcuts, Verdict, tenant_number,
};
use crate::server::routes;
use crate::telemetry::audit::events as audit;
use crate::tls::TrustDomain;

/// Why an attachment is not in place.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel side.
    #[error("redirect attachment {name}")]
    Redirect {
        /// Its name.
        name: String,
        /// What is wrong.
        #[source]
        why: RedirectError,
    },
    /// The listener.
    #[error("redirect attachment {name}: listening on {addr}: {why}")]
    Listen {
        /// Its name.
        name: String,
        /// Where.
        addr: SocketAddr,
        /// What the system says.
        why: io::Error,
    },
    /// The cgroup can't be watched.
    #[error("redirect attachment {name}: watching its cgroup: {why}")]
    Follow {
        /// Its name.
        name: String,
        /// What the system says.
        why: io::Error,
    },
}

/// What the accepting shard gets of an attachment.
pub(super) struct Accepting {
    /// Its name.
    pub name: String,
    /// Its tenant.
    pub tenant: TrustDomain,
    /// Where redirected connections arrive.
    pub listeners: Vec<TcpListener>,
    /// What they had wanted.
    pub flows: Flows,
    /// Their way past TCP on loopback, where it is wanted.
    pub shortcuts: Option<Shortcuts>,
    /// Our sign of life.
    pub heartbeat: Heartbeat,
}

/// Attachments that are in place for as long as this lives, and pinned beyond it.
pub(super) struct Attachments {
    attached: Vec<Running>,
    _followers: Vec<Follower>,
}

/// An attachment as it was put in place.
struct Running {
    spec: AttachmentSpec,
    kernel: Arc<Mutex<Attachment>>,
}

/// Translates a configured attachment.
pub fn spec(config: &AttachmentConfig, own: &TrustDomain) -> AttachmentSpec {
    let rules = |rules: &[crate::config::Rule]| {
        let rule = |rule: &crate::config::Rule| redirect::Rule {
            cidr: rule.cidr,
            ports: rule
                .ports
                .iter()
                .map(|range| range.first..=range.last)
                .collect(),
        };
        rules.iter().map(rule).collect()
    };
    let (mut listen4, mut listen6) = (None, None);
    for addr in &config.listen {
        match addr {
            SocketAddr::V4(addr) => listen4 = Some(*addr),
            SocketAddr::V6(addr) => listen6 = Some(*addr),
        }
    }
    AttachmentSpec {
        name: config.name.clone(),
        tenant: tenant_number(tenant(config, own).as_str()),
        cgroup: config.cgroup.clone(),
        netns: config.netns.clone(),
        listen4,
        listen6,
        capture: rules(&config.capture),
        exclude: rules(&config.exclude),
        fail: match config.fail {
            FailMode::Closed => redirect::FailMode::Closed,
            FailMode::Open => redirect::FailMode::Open,
        },
        shortcut: config.shortcut,
    }
}

fn tenant(config: &AttachmentConfig, own: &TrustDomain) -> TrustDomain {
    config.tenant.clone().unwrap_or_else(|| own.clone())
}

impl Attachments {
    /// Puts every attachment in place. Listeners come before programs, so that nothing is
    /// redirected to where nobody listens.
    ///
    /// # Errors
    /// [`AttachError`] naming the attachment.
    pub(super) fn attach(
        config: &RedirectConfig,
        own: &TrustDomain,
        inherited: &mut Inherited,
    ) -> Result<(Self, Vec<Accepting>), AttachError> {
        let redirect = Redirect::new(&config.pin);
        let mut all = Self {
            attached: Vec::new(),
            _followers: Vec::new(),
        };
        let mut accepting = Vec::new();
        for attachment in &config.attachments {
            let name = &attachment.name;
            let failed = |why| AttachError::Redirect {
                name: name.clone(),
                why,
            };
            let spec = spec(attachment, own);
            let prepared = redirect.prepare(&spec).map_err(failed)?;
            let listeners = listeners(attachment, inherited)?;
            let mut heartbeat = redirect.heartbeat(name).map_err(failed)?;
            heartbeat.beat().map_err(failed)?;
            let flows = redirect.flows(name).map_err(failed)?;
            let shortcuts = attachment
                .shortcut
                .then(|| redirect.shortcuts(name).map_err(failed))
                .transpose()?;
            if attachment.shortcut {
                tracing::warn!(
                    attachment = name,
                    "the shortcut past TCP on loopback is on: it breaks programs that read from \
                     blocking sockets or have TLS in the kernel (kTLS), and hides bytes from \
                     tcpdump and ss"
                );
            }
            let (kernel, follower) = follow(attachment, prepared)?;
            all.attached.push(Running { spec, kernel });
            all._followers.push(follower);
            let (name, tenant) = (name.clone(), tenant(attachment, own));
            accepting.push(Accepting {
                name,
                tenant,
                listeners,
                flows,
                shortcuts,
                heartbeat,
            });
        }
        Ok((all, accepting))
    }

    /// Puts changed capture sets and fail modes in force. What else changed waits for a restart,
    /// since listeners, namespace and tenant are the running server's.
    pub(super) fn update(&self, config: &RedirectConfig, own: &TrustDomain) {
        for attachment in &config.attachments {
            let name = &attachment.name;
            let Some(running) = self.attached.iter().find(|a| a.spec.name == *name) else {
                tracing::warn!(attachment = name, "a new attachment waits for a restart");
                continue;
            };
            let wanted = spec(attachment, own);
            let changed = AttachmentSpec {
                capture: wanted.capture,
                exclude: wanted.exclude,
                fail: wanted.fail,
                ..running.spec.clone()
            };
            let mut attached = running
                .kernel
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match attached.update(&changed) {
                Ok(()) => {
                    tracing::info!(attachment = name, "capture set reloaded");
                    audit::changed("capture set", Ok(()));
                }
                Err(error) => {
                    tracing::warn!(attachment = name, %error, "capture set not reloaded");
                    audit::changed("capture set", Err(&error));
                }
            }
        }
    }
}

fn listeners(
    config: &AttachmentConfig,
    inherited: &mut Inherited,
) -> Result<Vec<TcpListener>, AttachError> {
    let fd_name = format!("redirect-{}", config.name);
    let open = |addr: &SocketAddr| {
        if let Some(listener) = inherited.tcp(*addr, Some(&fd_name)) {
            return Ok(listener);
        }
        let listener = redirect::listen(config.netns.as_deref(), *addr).map_err(|why| {
            AttachError::Listen {
                name: config.name.clone(),
                addr: *addr,
                why,
            }
        })?;
        inherited::keep(&listener, &fd_name);
        Ok(listener)
    };
    config.listen.iter().map(open).collect()
}

/// Attaches now if the cgroup is there, and again whenever it is made anew.
fn follow(
    config: &AttachmentConfig,
    attachment: Attachment,
) -> Result<(Arc<Mutex<Attachment>>, Follower), AttachError> {
    if config.cgroup.is_dir() {
        let failed = |why| AttachError::Redirect {
            name: config.name.clone(),
            why,
        };
        attachment.link().map_err(failed)?;
    }
    let attachment = Arc::new(Mutex::new(attachment));
    let (followed, name, cgroup) = (
        attachment.clone(),
        config.name.clone(),
        config.cgroup.clone(),
    );
    let changed = move |presence| match presence {
        Presence::Absent => {
            tracing::warn!(attachment = name, cgroup = %cgroup.display(), "the cgroup is not there");
        }
        Presence::Present(_) => {
            let linked = followed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .link();
            match linked {
                Ok(linked) => tracing::info!(attachment = name, ?linked, "redirect in place"),
                Err(error) => tracing::error!(attachment = name, %error, "redirect NOT in place"),
            }
        }
    };
    let follower = Follower::spawn(&config.cgroup, changed).map_err(|why| AttachError::Follow {
        name: config.name.clone(),
        why,
    })?;
    Ok((attachment, follower))
}

/// What the control task calls to carry routes to the kernel.
pub(super) fn kernel_routes(mut kernel: Routes) -> super::control::Publish {
    Box::new(move |routes: &routes::Routes| {
        let verdicts: Vec<_> = routes
            .verdicts()
            .map(|(tenant, net, served)| {
                let verdict = if served {
                    Verdict::Serve
                } else {
                    Verdict::NoAgent
                };
                (tenant_number(tenant.as_str()), net, verdict)
            })
            .collect();
        if let Err(error) = kernel.replace(&verdicts) {
            tracing::error!(%error, "routes could not be given to the kernel");
        }
    })
}

/// Writes what the kernel programs log, for ever; all attachments share one log.
pub(super) async fn forward_log(config: RedirectConfig) {
    let Some(attachment) = config.attachments.first() else {
        return;
    };
    if let Err(error) = Redirect::new(&config.pin)
        .forward_log(&attachment.name)
        .await
    {
        tracing::debug!(%error, "what the kernel programs log is not seen here");
    }
}
