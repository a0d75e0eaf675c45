//! The configured attachments of the redirect: programs, listeners, followers.
//!
//! A process that may load programs attaches. One that may not uses the attachments of `cpc redirect
//! attach`, compares them with the configuration, and logs differences.

mod health;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::unistd::{Gid, Group};

pub(super) use self::health::Health;
use self::health::{LinkError, Look, Watch, no_cgroup};
use crate::frontend::Scope;
use crate::frontend::redirect::Origins;
use crate::routes;
use cpc_config::server::{AttachmentConfig, FailMode, GroupConfig, RedirectConfig};
use cpc_host::inherited::{self, Inherited};
use cpc_host::listen::is_family_missing;
use cpc_host::privileges::{self, CapabilitySet};
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_observe::audit::events as audit;
use cpc_redirect::{
    self, AddressWatch, Attachment, AttachmentSpec, Follower, Heartbeat, Presence, Redirect,
    RedirectError, Routes, Verdict, tenant_number,
};

/// Time for the attaching process to follow, before it counts as one that does not.
const PATIENCE: Duration = Duration::from_millis(500);

/// Reason why an attachment is not in place.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel side of all attachments failed.
    #[error("redirect")]
    All(#[from] RedirectError),
    /// The kernel side of one attachment failed.
    #[error("redirect attachment {name}")]
    Redirect {
        /// Name of the attachment.
        name: String,
        /// The failure.
        #[source]
        why: RedirectError,
    },
    /// The listener can't be opened.
    #[error("redirect attachment {name}: listening on {addr}: {why}")]
    Listen {
        /// Name of the attachment.
        name: String,
        /// Address of the listener.
        addr: SocketAddr,
        /// Error of the system call.
        why: io::Error,
    },
    /// The cgroup can't be watched.
    #[error("redirect attachment {name}: watching its cgroup: {why}")]
    Follow {
        /// Name of the attachment.
        name: String,
        /// Error of the system call.
        why: io::Error,
    },
}

/// The part of an attachment that the accepting shard needs.
pub(super) struct Accepting {
    /// Name of the attachment.
    pub name: String,
    /// Tenant and allow-list of its clients.
    pub scope: Arc<Scope>,
    /// Listeners of redirected connections.
    pub listeners: Vec<TcpListener>,
    /// Origins of the connections.
    pub origins: Box<dyn Origins>,
    /// Heartbeat of this server, for the kernel programs.
    pub heartbeat: Option<Heartbeat>,
    /// Whether the service manager keeps the listeners open after the end of this process.
    pub listeners_kept: bool,
}

impl Accepting {
    /// Opens the listeners of an attachment to which no kernel program leads.
    ///
    /// # Errors
    /// [`AttachError::Listen`].
    pub(super) fn embedded(
        attachment: &AttachmentConfig,
        own: &TrustDomain,
        origins: Box<dyn Origins>,
    ) -> Result<Self, AttachError> {
        let (listeners, listeners_kept) = listeners(attachment, &mut Inherited::default())?;
        Ok(Self {
            name: attachment.name.clone(),
            scope: Scope::of_attachment(attachment, own),
            listeners,
            origins,
            heartbeat: None,
            listeners_kept,
        })
    }
}

/// Attachments that this value keeps in place, and whose pins outlive it.
pub struct Attachments {
    redirect: Redirect,
    attached: Vec<Running>,
    followers: Vec<Follower>,
    address_watches: Vec<AddressWatch>,
    health: Health,
}

/// An attachment that is in place.
struct Running {
    spec: AttachmentSpec,
    /// Attachment of this process; `None` if another process attached.
    kernel: Option<Arc<Mutex<Attachment>>>,
    link_error: LinkError,
}

/// Opens the configured redirect.
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

/// Whether this process may load programs and attach them; all processes that may have this capability
/// among others.
fn may_attach() -> bool {
    privileges::have(CapabilitySet::NET_ADMIN)
}

/// Translates a configured attachment.
pub fn spec(config: &AttachmentConfig, own: &TrustDomain) -> AttachmentSpec {
    let rules = |rules: &[cpc_config::Rule]| {
        let rule = |rule: &cpc_config::Rule| cpc_redirect::Rule {
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
            FailMode::Closed => cpc_redirect::FailMode::Closed,
            FailMode::Open => cpc_redirect::FailMode::Open,
        },
    }
}

impl Attachments {
    /// Puts every attachment in place. Listeners come before programs, so that no connection is
    /// redirected to an address without listener.
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
        let health = Health::default();
        let mut attached = Vec::new();
        let mut accepting = Vec::new();
        let names: Vec<_> = { config.attachments.iter() }
            .map(|attachment| attachment.name.clone())
            .collect();
        for attachment in &config.attachments {
            let name = &attachment.name;
            let failed = |why| AttachError::Redirect {
                name: name.clone(),
                why,
            };
            let spec = spec(attachment, own);
            let running = Running::prepare(&redirect, spec, may_attach).map_err(failed)?;
            let (listeners, listeners_kept) = listeners(attachment, inherited)?;
            let mut heartbeat = redirect.heartbeat(name).map_err(failed)?;
            for listener in &listeners {
                heartbeat.listen(listener).map_err(failed)?;
            }
            heartbeat.beat().map_err(failed)?;
            let origins = Box::new(redirect.flows(name).map_err(failed)?);
            running.link(&redirect, &names).map_err(failed)?;
            health.add(name);
            attached.push(running);
            let (name, scope) = (name.clone(), Scope::of_attachment(attachment, own));
            accepting.push(Accepting {
                name,
                scope,
                listeners,
                origins,
                heartbeat: Some(heartbeat),
                listeners_kept,
            });
        }
        let all = Self {
            redirect,
            attached,
            followers: Vec::new(),
            address_watches: Vec::new(),
            health,
        };
        all.report_strays(&names);
        Ok((all, accepting))
    }

    /// Puts every attachment in place, for another process to serve.
    ///
    /// # Errors
    /// [`AttachError`] naming the attachment.
    pub fn hold(config: &RedirectConfig, own: &TrustDomain) -> Result<Self, AttachError> {
        let redirect = redirect(config)?;
        let health = Health::default();
        let names = { config.attachments.iter() }.map(|it| it.name.clone());
        let names: Vec<_> = names.collect();
        let mut attached = Vec::new();
        for attachment in &config.attachments {
            let failed = |why| AttachError::Redirect {
                name: attachment.name.clone(),
                why,
            };
            let spec = spec(attachment, own);
            let running = Running::prepare(&redirect, spec, true).map_err(failed)?;
            running.link(&redirect, &names).map_err(failed)?;
            health.add(&attachment.name);
            attached.push(running);
        }
        Ok(Self {
            redirect,
            attached,
            followers: Vec::new(),
            address_watches: Vec::new(),
            health,
        })
    }

    /// Logs attachments that are pinned beside ours without being configured.
    fn report_strays(&self, configured: &[String]) {
        if configured.is_empty() {
            return;
        }
        let Ok(pinned) = self.redirect.status() else {
            return;
        };
        for stray in pinned.iter().filter(|it| !configured.contains(&it.name)) {
            tracing::warn!(
                attachment = stray.name,
                "an unconfigured attachment is pinned here: its captured connections are refused. \
                 `cpc redirect detach NAME` removes it"
            );
        }
    }

    /// Returns the health of all attachments.
    pub(super) fn health(&self) -> Health {
        self.health.clone()
    }

    /// Watches the attachments without end.
    pub fn watch(&self) -> impl Future<Output = ()> + Send + use<> {
        let look = |running: &Running| (self.look(running), running.link_error.clone());
        Watch::new(self.health.clone(), self.attached.iter().map(look)).run()
    }

    fn look(&self, running: &Running) -> Look {
        let names: Vec<_> = self
            .attached
            .iter()
            .map(|it| it.spec.name.clone())
            .collect();
        let ours = running.kernel.is_some();
        Look::new(&self.redirect, &running.spec, &names, ours)
    }

    /// Whether this process attached the programs.
    pub(super) fn ours(&self) -> bool {
        self.attached.iter().any(|running| running.kernel.is_some())
    }

    /// Starts to follow the cgroups, on threads that keep the capabilities of the calling one:
    /// attaching loaded programs to a cgroup takes none.
    ///
    /// # Errors
    /// [`AttachError`] naming the attachment.
    pub fn follow(&mut self) -> Result<(), AttachError> {
        for running in &self.attached {
            let follower = running.follow(self.look(running), self.health.clone());
            let follower = follower.map_err(|why| AttachError::Follow {
                name: running.spec.name.clone(),
                why,
            })?;
            self.followers.push(follower);
            match running.follow_addresses(&self.redirect) {
                Ok(watch) => self.address_watches.push(watch),
                Err(error) => tracing::warn!(
                    attachment = running.spec.name,
                    error = report(&error),
                    "the host's addresses are not followed: a later one is captured until a reload"
                ),
            }
        }
        Ok(())
    }

    /// Puts changed capture sets and fail modes in force. Other changes wait for a restart, because
    /// listeners, namespace and tenant belong to the running server. Returns whether all possible
    /// changes are in force; failures are logged.
    pub fn update(&self, config: &RedirectConfig, own: &TrustDomain) -> bool {
        let mut is_in_force = true;
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
                    tracing::warn!(
                        attachment = name,
                        error = report(&error),
                        "capture set not reloaded"
                    );
                    audit::changed("capture set", Err(&error));
                    is_in_force = false;
                }
            }
        }
        is_in_force
    }
}

/// Opens an attachment's listeners, or takes those that the service manager has kept. Returns whether
/// they outlive this process.
fn listeners(
    config: &AttachmentConfig,
    inherited: &mut Inherited,
) -> Result<(Vec<TcpListener>, bool), AttachError> {
    let fd_name = format!("redirect-{}", config.name);
    let mut kept = false;
    let mut open = |addr: &SocketAddr| {
        let failed = |why| AttachError::Listen {
            name: config.name.clone(),
            addr: *addr,
            why,
        };
        if let Some(listener) = inherited.tcp(*addr, Some(&fd_name)) {
            kept = true;
            inherited.note(&fd_name, &listener).map_err(failed)?;
            return Ok(listener);
        }
        let opened = match cpc_redirect::listen(config.netns.as_deref(), *addr) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                elsewhere(config, *addr, inherited.tcp_elsewhere(*addr, &fd_name))
            }
            opened => opened,
        };
        let listener = opened.map_err(failed)?;
        inherited.note(&fd_name, &listener).map_err(failed)?;
        kept |= inherited::keep(&listener, &fd_name);
        Ok(listener)
    };
    let (mut listeners, mut missing) = (Vec::new(), None);
    for opened in config.listen.iter().map(&mut open) {
        match opened {
            Ok(listener) => listeners.push(listener),
            // By default there is one of each family, and a host may have one alone.
            Err(AttachError::Listen { name, addr, why }) if is_family_missing(&why) => {
                tracing::warn!(
                    attachment = name, %addr, %why,
                    "this host lacks the address family: its captured connections are refused"
                );
                missing = Some(AttachError::Listen { name, addr, why });
            }
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok((listeners, kept)),
    }
}

/// Listens on a port that the kernel chooses, because another program has the configured one: any local
/// program can take that while no server runs, and must not keep the next one from starting.
fn elsewhere(
    config: &AttachmentConfig,
    addr: SocketAddr,
    kept: Option<TcpListener>,
) -> io::Result<TcpListener> {
    let any = SocketAddr::new(addr.ip(), 0);
    let listener = kept.map_or_else(|| cpc_redirect::listen(config.netns.as_deref(), any), Ok)?;
    tracing::warn!(
        attachment = config.name, %addr, instead = %listener.local_addr()?,
        "another program listens at the redirect's address: captured connections go to another port \
         of ours, never to that program. `ss -ltnp` names it; reserve the port \
         (net.ipv4.ip_local_reserved_ports) and let the service manager keep the listener"
    );
    Ok(listener)
}

fn lock(attachment: &Mutex<Attachment>) -> MutexGuard<'_, Attachment> {
    attachment.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Loads the programs, or compares those of another process.
    fn prepare(
        redirect: &Redirect,
        spec: AttachmentSpec,
        may_attach: bool,
    ) -> Result<Self, RedirectError> {
        let name = &spec.name;
        if let Some(warning) = spec.fleeting_cgroup() {
            tracing::warn!(attachment = name, "{warning}");
        }
        let prepared = match may_attach {
            true => Some(redirect.prepare(&spec)?),
            false => {
                for differs in redirect.compare(&spec)? {
                    tracing::warn!(
                        attachment = name,
                        differs,
                        "the attachment differs from the configuration; {}",
                        RedirectError::NotOurs
                    );
                }
                None
            }
        };
        Ok(Self {
            kernel: prepared.map(Mutex::new).map(Arc::new),
            spec,
            link_error: LinkError::default(),
        })
    }

    /// Attaches, where this process has loaded the programs and the cgroup exists.
    fn link(&self, redirect: &Redirect, configured: &[String]) -> Result<(), RedirectError> {
        if let Some(kernel) = &self.kernel
            && self.spec.cgroup.is_dir()
        {
            lock(kernel).link()?;
            // Now: later this process sees less of what others have attached.
            let names: Vec<_> = configured.iter().map(String::as_str).collect();
            redirect.rivals(&self.spec, &names)?;
        }
        Ok(())
    }

    /// Keeps the host's own addresses out of the capture set, or logs that this takes another process.
    fn follow_addresses(&self, redirect: &Redirect) -> io::Result<AddressWatch> {
        let (kernel, redirect) = (self.kernel.clone(), redirect.clone());
        let (spec, netns) = (self.spec.clone(), self.spec.netns.clone());
        let changed = move || {
            let name = &spec.name;
            let followed = match &kernel {
                Some(kernel) => lock(kernel).follow_addresses(),
                // A process that stays (`cpc redirect attach --stay`) does it about now.
                None => {
                    thread::sleep(PATIENCE);
                    let differs = redirect.compare(&spec);
                    differs.map(|differs| differs.contains(&cpc_redirect::CAPTURE_SET))
                }
            };
            match (followed, &kernel) {
                (Ok(false), _) => {}
                (Ok(true), Some(_)) => tracing::info!(
                    attachment = name,
                    "the host's own addresses have changed, and the capture set with them"
                ),
                (Ok(true), None) => tracing::warn!(
                    attachment = name,
                    "the host's own addresses have changed since the programs were attached: a new one may be \
                     captured. {}",
                    RedirectError::NotOurs
                ),
                (Err(error), _) => tracing::warn!(
                    attachment = name,
                    error = report(&error),
                    "the host's own addresses have changed, and the capture set has not followed"
                ),
            }
        };
        AddressWatch::spawn(netns.as_deref(), changed)
    }

    /// Attaches whenever the cgroup is created again, or logs that this takes another process.
    fn follow(&self, look: Look, health: Health) -> io::Result<Follower> {
        let (kernel, link_error) = (self.kernel.clone(), self.link_error.clone());
        let (name, cgroup) = (self.spec.name.clone(), self.spec.cgroup.clone());
        let changed = move |presence| {
            if presence == Presence::Absent {
                return health.set(&name, Some(no_cgroup(&cgroup)), "");
            }
            // Held so that the watch does not look in between: it comes back later.
            let mut link_error = link_error.lock().unwrap_or_else(PoisonError::into_inner);
            let linked = kernel
                .as_ref()
                .map(|kernel| lock(kernel).link())
                .transpose();
            let detail = match &linked {
                Ok(linked) => linked.map_or(String::new(), |linked| format!("{linked:?}")),
                Err(_) => String::new(),
            };
            *link_error = linked.err().map(|error| report(&error));
            if kernel.is_none() && look.fault(false).is_some() {
                // A process that stays (`cpc redirect attach --stay`) attaches about now.
                thread::sleep(PATIENCE);
            }
            let fault = link_error.clone().or_else(|| look.fault(false));
            health.set(&name, fault, &detail);
        };
        Follower::spawn(&self.spec.cgroup, changed)
    }
}

/// Returns the function by which the control task writes routes to the kernel.
pub(super) fn kernel_routes(mut kernel: Routes) -> super::control::Publish {
    Box::new(move |routes: &routes::Routes, keeps_served| {
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
        if let Err(error) = kernel.replace(&verdicts, keeps_served) {
            tracing::error!(
                error = report(&error),
                "routes could not be written to the kernel"
            );
        }
    })
}

/// Opens the kernel programs' log, where permitted; the returned future copies it to ours, without end.
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
            tracing::debug!(
                error = report(&error),
                "the log of the kernel programs is not available here"
            );
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
        let config = serde_json::from_str(&text).unwrap();
        let opened = listeners(&config, &mut Inherited::default());
        opened.map(|(listeners, _)| listeners)
    }

    /// An address that no interface has stands in for one of a family that is not there.
    #[test]
    fn a_family_that_is_missing_is_left_out() {
        let both = opened(r#"["127.0.0.1:0", "[fd00:dead::1]:1"]"#).unwrap();
        assert_eq!(both.len(), 1);
        let error = opened(r#"["[fd00:dead::1]:1"]"#).unwrap_err().to_string();
        assert!(error.contains("[fd00:dead::1]:1"), "{error}");
        let taken = both[0].local_addr().unwrap();
        // Another program has it, and does not keep us from listening.
        let elsewhere = opened(&format!(r#"["{taken}"]"#)).unwrap();
        let elsewhere = elsewhere[0].local_addr().unwrap();
        assert_eq!(elsewhere.ip(), taken.ip());
        assert_ne!(elsewhere.port(), taken.port());
    }
}
