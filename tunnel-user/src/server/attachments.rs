//! Puts the configured attachments of the redirect in place: programs, listeners, followers.
//!
//! A process that may load programs does so. One that may not takes what `cpc redirect attach` has
//! put in place, compares it, and says where it is not what it should be.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::{Gid, Group};

use crate::config::server::{AttachmentConfig, FailMode, GroupConfig, RedirectConfig};
use crate::process::inherited::{self, Inherited};
use crate::process::listen::is_family_missing;
use crate::process::privileges::{self, CapabilitySet};
use crate::redirect::{
    self, Attachment, AttachmentSpec, Flows, Follower, Heartbeat, Presence, Redirect,
    RedirectError, Routes, Shortcuts, Verdict, tenant_number,
};
use crate::report::report;
use crate::server::frontend::Scope;
use crate::server::routes;
use crate::telemetry::audit::events as audit;
use crate::tls::TrustDomain;

/// What to do about a cgroup that the programs are not in, where we may not put them there.
const ATTACH: &str = "run `cpc redirect attach` (systemd: `systemctl reload cpc-redirect`); until then its \
     connections take the ordinary route";

/// Why an attachment is not in place.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel side of all of them.
    #[error("redirect: {0}")]
    All(#[from] RedirectError),
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
    /// Whose sockets are redirected, and what they may ask for.
    pub scope: Arc<Scope>,
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
    redirect: Redirect,
    attached: Vec<Running>,
    followers: Vec<Follower>,
}

/// An attachment as it was put in place.
struct Running {
    spec: AttachmentSpec,
    /// `None`: somebody else attached.
    kernel: Option<Arc<Mutex<Attachment>>>,
}

/// The redirect that is configured.
///
/// # Errors
/// [`RedirectError::Group`].
pub fn redirect(config: &RedirectConfig) -> Result<Redirect, RedirectError> {
    let group = match &config.group {
        None => None,
        Some(GroupConfig::Id(id)) => Some(Gid::from_raw(*id)),
        Some(GroupConfig::Name(name)) => {
            let found = Group::from_name(name).ok().flatten();
            let missing = || RedirectError::Group(name.clone());
            Some(found.ok_or_else(missing)?.gid)
        }
    };
    Ok(Redirect::new(&config.pin).shared_with(group))
}

/// Whether this process may load programs and attach them; everything that does takes this
/// capability among others.
fn may_attach() -> bool {
    privileges::have(CapabilitySet::NET_ADMIN)
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
        tenant: tenant_number(config.tenant.as_ref().unwrap_or(own).as_str()),
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
        let may_attach = may_attach();
        let redirect = match may_attach {
            true => redirect(config)?,
            false => Redirect::new(&config.pin),
        };
        let mut attached = Vec::new();
        let mut accepting = Vec::new();
        for attachment in &config.attachments {
            let name = &attachment.name;
            let failed = |why| AttachError::Redirect {
                name: name.clone(),
                why,
            };
            let spec = spec(attachment, own);
            let prepared = match may_attach {
                true => Some(redirect.prepare(&spec).map_err(failed)?),
                false => {
                    for differs in redirect.compare(&spec).map_err(failed)? {
                        tracing::warn!(
                            attachment = name,
                            differs,
                            "what is attached is not what is configured; {}",
                            RedirectError::NotOurs
                        );
                    }
                    None
                }
            };
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
            if let Some(prepared) = &prepared
                && attachment.cgroup.is_dir()
            {
                prepared.link().map_err(failed)?;
            }
            let kernel = prepared.map(Mutex::new).map(Arc::new);
            attached.push(Running { spec, kernel });
            let (name, scope) = (name.clone(), Scope::of_attachment(attachment, own));
            accepting.push(Accepting {
                name,
                scope,
                listeners,
                flows,
                shortcuts,
                heartbeat,
            });
        }
        let all = Self {
            redirect,
            attached,
            followers: Vec::new(),
        };
        Ok((all, accepting))
    }

    /// Whether the programs were attached by this process.
    pub(super) fn ours(&self) -> bool {
        self.attached.iter().any(|running| running.kernel.is_some())
    }

    /// Starts to follow the cgroups, on threads that keep the capabilities of the calling one:
    /// putting programs that are loaded into a cgroup takes none.
    ///
    /// # Errors
    /// [`AttachError`] naming the attachment.
    pub(super) fn follow(&mut self) -> Result<(), AttachError> {
        for running in &self.attached {
            let follower = running.follow(&self.redirect);
            let follower = follower.map_err(|why| AttachError::Follow {
                name: running.spec.name.clone(),
                why,
            })?;
            self.followers.push(follower);
        }
        Ok(())
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
            let spec = &running.spec;
            let is_same = (&wanted.capture, &wanted.exclude, wanted.fail)
                == (&spec.capture, &spec.exclude, spec.fail);
            let changed = AttachmentSpec {
                capture: wanted.capture,
                exclude: wanted.exclude,
                fail: wanted.fail,
                ..spec.clone()
            };
            let updated = match &running.kernel {
                Some(kernel) => lock(kernel).update(&changed),
                None if is_same => continue,
                None => Err(RedirectError::NotOurs),
            };
            match updated {
                Ok(()) => {
                    tracing::info!(attachment = name, "capture set reloaded");
                    audit::changed("capture set", Ok(()));
                }
                Err(error) => {
                    let error = report(&error);
                    tracing::warn!(attachment = name, error, "capture set not reloaded");
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
    let (mut listeners, mut missing) = (Vec::new(), None);
    for opened in config.listen.iter().map(open) {
        match opened {
            Ok(listener) => listeners.push(listener),
            // By default there is one of each family, and a host may have one alone.
            Err(AttachError::Listen { name, addr, why }) if is_family_missing(&why) => {
                tracing::warn!(
                    attachment = name, %addr, %why,
                    "this host has nothing of the address's family: what is captured of it is refused"
                );
                missing = Some(AttachError::Listen { name, addr, why });
            }
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

fn lock(attachment: &Mutex<Attachment>) -> MutexGuard<'_, Attachment> {
    attachment.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Attaches whenever the cgroup is made anew, or says that somebody should.
    fn follow(&self, redirect: &Redirect) -> io::Result<Follower> {
        let (kernel, redirect) = (self.kernel.clone(), redirect.clone());
        let (name, cgroup) = (self.spec.name.clone(), self.spec.cgroup.clone());
        let changed = move |presence| match (presence, &kernel) {
            (Presence::Absent, _) => {
                tracing::warn!(attachment = name, cgroup = %cgroup.display(), "the cgroup is not there");
            }
            (Presence::Present(_), Some(kernel)) => match lock(kernel).link() {
                Ok(linked) => tracing::info!(attachment = name, ?linked, "redirect in place"),
                Err(error) => tracing::error!(
                    attachment = name,
                    error = report(&error),
                    "redirect NOT in place"
                ),
            },
            (Presence::Present(id), None) if redirect.cgroup(&name) == Some(id) => {
                tracing::info!(attachment = name, "redirect in place");
            }
            (Presence::Present(_), None) => tracing::error!(
                attachment = name, cgroup = %cgroup.display(),
                "redirect NOT in place: the cgroup was made after the programs were attached; {ATTACH}"
            ),
        };
        Follower::spawn(&self.spec.cgroup, changed)
    }
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

/// Opens the kernel programs' log, where we may; what is returned writes it to ours, for ever.
pub(super) fn kernel_log(config: &RedirectConfig) -> impl Future<Output = ()> + Send + use<> {
    let log = config.attachments.first().map(|attachment| {
        let redirect = Redirect::new(&config.pin);
        redirect.forward_log(&attachment.name)
    });
    async {
        let written = match log {
            Some(Ok(forwarding)) => forwarding.await,
            Some(Err(error)) => Err(error),
            None => return,
        };
        if let Err(error) = written {
            tracing::debug!(%error, "what the kernel programs log is not seen here");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(listen: &str) -> Result<Vec<TcpListener>, AttachError> {
        let text = format!(
            r#"{{"name": "x", "cgroup": "/x", "capture": [{{"cidr": "10.0.0.0/8"}}], "listen": {listen}}}"#
        );
        listeners(
            &serde_json::from_str(&text).unwrap(),
            &mut Inherited::default(),
        )
    }

    /// An address that no interface has stands in for one of a family that is not there.
    #[test]
    fn a_family_that_is_missing_is_left_out() {
        let both = opened(r#"["127.0.0.1:0", "[fd00:dead::1]:1"]"#).unwrap();
        assert_eq!(both.len(), 1);
        let error = opened(r#"["[fd00:dead::1]:1"]"#).unwrap_err().to_string();
        assert!(error.contains("[fd00:dead::1]:1"), "{error}");
        let taken = both[0].local_addr().unwrap();
        assert!(opened(&format!(r#"["{taken}", "[::1]:0"]"#)).is_err());
    }
}
