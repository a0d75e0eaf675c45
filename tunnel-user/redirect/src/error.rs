//! Errors of the redirect, with their remedies.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError};
use ipnet::IpNet;
use tunnel_ebpf_common::{MAX_ATTACHMENTS, MAX_RANGES, MAX_ROUTES, NAME_LENGTH};

use super::LinkState;

/// Reason why a redirect could not be created, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// See [`super::object()`].
    #[error(
        "this cpc was built without the redirect's kernel programs: \
         run `cargo xtask build-ebpf` and build again"
    )]
    NotBuiltIn,

    /// The name is not a file name on a BPF file system, where dots are invalid.
    #[error(
        "attachment name {0:?} is not usable: \
         take 1 to {NAME_LENGTH} characters out of a-z, A-Z, 0-9, - and _"
    )]
    Name(String),

    /// The attachment has no listener.
    #[error("attachment {0} has no listener: give it an IPv4 or an IPv6 address to redirect to")]
    NoListener(String),

    /// A prefix needs too many separate port ranges.
    #[error(
        "capture and exclude leave {count} separate port ranges for {cidr}, \
         {MAX_RANGES} are possible: use wider ranges"
    )]
    TooManyRanges {
        /// The prefix.
        cidr: IpNet,
        /// Number of ranges.
        count: usize,
    },

    /// All numbers are in use.
    #[error(
        "all {MAX_ATTACHMENTS} attachments are in use: \
         detach one (`cpc redirect status` lists them)"
    )]
    Full,

    /// The pin directory is on some other file system.
    #[error(
        "{0} is not on a BPF file system: mount one (`mount -t bpf bpf /sys/fs/bpf`) \
         or choose a pin directory on one"
    )]
    NotBpffs(PathBuf),

    /// The cgroup is missing, or not of version 2.
    #[error("cgroup {path} can't be attached to: it must be a directory of a cgroup2 hierarchy")]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },

    /// The namespace can't be entered or read.
    #[error("network namespace {path} can't be entered")]
    Netns {
        /// The namespace, or this process's own.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },

    /// A file or directory below the pin directory can't be used.
    #[error("{path} can't be created, opened or removed")]
    Pin {
        /// The file.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },

    /// The pins can't be given to the group.
    #[error(
        "{path} can't be given to group {group} (redirect.group): this needs a process that is in it \
         (systemd: `Group=` of cpc-redirect.service), or CAP_CHOWN"
    )]
    Share {
        /// The file.
        path: PathBuf,
        /// Number of the group.
        group: u32,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },

    /// No attachment of this name is pinned.
    #[error(
        "no attachment named {0} here: attach it first (`cpc redirect attach`), with a \
         `redirect.group` that this user is in"
    )]
    NotAttached(String),

    /// The attachment differs from the configuration.
    #[error(
        "attachment {name} was attached with another {what} than is configured: \
         attach it again (`cpc redirect attach`)"
    )]
    Outdated {
        /// Name of the attachment.
        name: String,
        /// The difference.
        what: &'static str,
    },

    /// A program of the attachment is not where it should be.
    #[error(
        "of attachment {name} the program {hook} is {state}: attach it again (`cpc redirect attach`)"
    )]
    Incomplete {
        /// The attachment.
        name: String,
        /// The program.
        hook: &'static str,
        /// State of its link.
        state: LinkState,
    },

    /// The cgroup is another one than when the programs were attached.
    #[error(
        "the cgroup of attachment {0} was created after the programs were attached: until `cpc redirect attach` runs again (systemd: `systemctl restart cpc-redirect`), its connections take the ordinary route"
    )]
    OtherCgroup(String),

    /// Other attachments of this program decide over the same connections.
    #[error(
        "{0} decides over the same connections, and refuses them while its server is away: \
         `cpc redirect list` shows it, `cpc redirect detach --pin DIRECTORY NAME` removes it, or `cpc redirect detach --all` one that is pinned elsewhere. A process that attached and stays notices \
         within seconds; after `cpc redirect attach` alone attach again"
    )]
    Rivals(String),

    /// This process did not attach, and may not change the capture set.
    #[error(
        "without capabilities the capture set can't be changed: \
         run `cpc redirect attach` (systemd: `systemctl reload cpc-redirect`)"
    )]
    NotOurs,

    /// The group does not exist.
    #[error("there is no group {0} (redirect.group): create it, or use a number")]
    Group(String),

    /// More routes than the kernel's table holds.
    #[error(
        "{missing} routes have no room in the kernel's table of {MAX_ROUTES}: their destinations are refused as \
         without a route. `limits.routes` bounds the accepted routes"
    )]
    RoutesFull {
        /// Number of missing routes.
        missing: usize,
    },

    /// A map has no room for another entry.
    #[error("the kernel's table {0} is full: name fewer or wider ranges")]
    TableFull(&'static str),

    /// A map can't be opened, read or written.
    #[error(
        "the map {name} can't be opened, read or written (this needs root or a member of `redirect.group`, and CAP_BPF before Linux 5.19)"
    )]
    Map {
        /// Name of the map.
        name: &'static str,
        /// Error of aya.
        #[source]
        source: MapError,
    },

    /// The object can't be read, or its maps can't be created.
    #[error("the kernel programs can't be prepared (this needs CAP_BPF and CAP_NET_ADMIN)")]
    Prepare(#[source] Box<EbpfError>),

    /// The kernel refuses a program.
    #[error(
        "the kernel refuses the program {name} (this needs Linux 5.15, CAP_BPF, CAP_NET_ADMIN and \
         CAP_PERFMON): {why}"
    )]
    Load {
        /// Name of the program.
        name: &'static str,
        /// Error of the system call, and the last line of the verifier.
        why: String,
    },

    /// The kernel is older than the redirect needs.
    #[error("the redirect needs Linux 5.15, and this is {release}")]
    OldKernel {
        /// Release of the kernel.
        release: String,
        /// The failure.
        #[source]
        source: Box<RedirectError>,
    },

    /// The object lacks a program: it was built from other sources.
    #[error("the built-in object has no program {0}: run `cargo xtask build-ebpf` and build again")]
    Mismatch(&'static str),

    /// A program can't be attached to its cgroup.
    #[error("program {name} can't be attached to {cgroup}")]
    Link {
        /// Name of the program.
        name: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },

    /// The programs' log can't be read.
    #[error("the kernel programs' log can't be read (this needs CAP_SYS_ADMIN)")]
    Log(#[source] Box<dyn std::error::Error + Send + Sync>),
}
