//! `cpc proxy-server` and `cpc proxy-agent`: the command lines of Konnectivity's two programs, so
//! that a manifest needs no other change than its image.
//!
//! Flags, defaults, environment variables and checks are Konnectivity's; each command translates
//! them into the configuration of our server or agent, on top of a file if one is named, and runs
//! that. Flags without effect are accepted and logged once ([`unused`]).

mod common;
mod go;
pub(super) mod proxy_agent;
pub(super) mod proxy_server;
mod unused;

use std::ffi::OsString;
use std::path::Path;

/// The names under which Konnectivity's images start their programs.
const NAMES: [&str; 2] = ["proxy-server", "proxy-agent"];

/// Puts the subcommand behind a first argument that names it: `/proxy-agent --v=2` is
/// `cpc proxy-agent --v=2`.
pub(super) fn by_name(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<_> = arguments.collect();
    let called = arguments.first().map(Path::new).and_then(Path::file_name);
    if let Some(name) = NAMES.iter().find(|name| called == Some(name.as_ref())) {
        arguments.splice(..1, ["cpc".into(), name.into()]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::by_name;

    #[test]
    fn the_first_argument_may_name_the_command() {
        for (given, expected) in [
            (
                &["/proxy-server", "--v=2"][..],
                &["cpc", "proxy-server", "--v=2"][..],
            ),
            (&["proxy-agent"], &["cpc", "proxy-agent"]),
            (
                &["/usr/local/bin/cpc", "proxy-agent"],
                &["/usr/local/bin/cpc", "proxy-agent"],
            ),
            (&["/proxy-server/cpc"], &["/proxy-server/cpc"]),
            (&[], &[]),
        ] {
            let arguments = by_name(given.iter().map(Into::into));
            assert_eq!(arguments, expected);
        }
    }
}
