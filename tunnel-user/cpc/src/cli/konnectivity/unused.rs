//! Flags without effect: they configure parts of Konnectivity that this program lacks.
//!
//! Tables list them, because only two things matter: a wrong value is an error, and the log names the
//! given ones.

use std::marker::PhantomData;

use clap::builder::ValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

use super::go;

/// Type of a flag's value.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Switch,
    Integer,
    Positive,
    Duration,
    Text,
}

/// One flag, without its dashes, and its meaning in Konnectivity.
pub(super) type Flag = (&'static str, Kind, &'static str);

/// Flags of both commands of Konnectivity: klog's, and those for debugging a process.
const COMMON: &[Flag] = &[
    (
        "add-dir-header",
        Kind::Switch,
        "Folder of the source file in log lines",
    ),
    (
        "alsologtostderr",
        Kind::Switch,
        "Log to files and standard error",
    ),
    (
        "alsologtostderrthreshold",
        Kind::Text,
        "Minimum severity for that",
    ),
    (
        "legacy-stderr-threshold-behavior",
        Kind::Switch,
        "Meaning of --stderrthreshold",
    ),
    (
        "log-backtrace-at",
        Kind::Text,
        "Source line at which stacks are logged",
    ),
    ("log-dir", Kind::Text, "Folder of log files"),
    ("log-file", Kind::Text, "Log file"),
    (
        "log-file-max-size",
        Kind::Integer,
        "Megabytes of a log file",
    ),
    (
        "logtostderr",
        Kind::Switch,
        "Log to standard error; always on here",
    ),
    (
        "one-output",
        Kind::Switch,
        "Each line only in the file of its severity",
    ),
    (
        "skip-headers",
        Kind::Switch,
        "No time and source in log lines",
    ),
    ("skip-log-headers", Kind::Switch, "No headers in log files"),
    (
        "stderrthreshold",
        Kind::Text,
        "Minimum severity for standard error",
    ),
    ("vmodule", Kind::Text, "Verbosity by source file"),
    (
        "enable-profiling",
        Kind::Switch,
        "Go's profiles on the admin port",
    ),
    (
        "enable-contention-profiling",
        Kind::Switch,
        "Go's profile of locks",
    ),
    (
        "kube-api-content-type",
        Kind::Text,
        "Encoding towards the API server",
    ),
    (
        "warn-on-channel-limit",
        Kind::Switch,
        "Warnings of full queues",
    ),
    (
        "xfr-channel-size",
        Kind::Positive,
        "Packets in a queue; queues have bytes here",
    ),
];

/// The tables of a command.
pub(super) trait Tables {
    /// Flags of this command alone.
    const OWN: &'static [Flag];
}

/// Flags of a command without effect.
#[derive(Debug)]
pub(super) struct Unused<T> {
    given: Vec<&'static str>,
    _of: PhantomData<T>,
}

impl<T: Tables> Unused<T> {
    /// Returns the given flags, with their dashes, in the order of the tables.
    pub(super) fn given(&self) -> Vec<String> {
        self.given.iter().map(|name| format!("--{name}")).collect()
    }

    fn flags() -> impl Iterator<Item = &'static Flag> {
        T::OWN.iter().chain(COMMON)
    }
}

impl<T: Tables> clap::Args for Unused<T> {
    fn augment_args(command: Command) -> Command {
        command
            .next_help_heading("Accepted, without effect")
            .args(Self::flags().map(arg))
            .mut_arg("enable-contention-profiling", |arg| {
                arg.requires_if("true", "enable-profiling")
            })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<T: Tables> clap::FromArgMatches for Unused<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
        let names = Self::flags().map(|(name, ..)| *name);
        Ok(Self {
            given: names.filter(|name| given(name)).collect(),
            _of: PhantomData,
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn arg(&(name, kind, help): &Flag) -> Arg {
    let arg = Arg::new(name).long(name).help(help);
    let (parser, value): (ValueParser, _) = match kind {
        Kind::Switch => return switch(arg),
        Kind::Integer => (ValueParser::new(go::integer), "N"),
        Kind::Positive => (ValueParser::new(go::positive), "N"),
        Kind::Duration => (ValueParser::new(go::duration), "DURATION"),
        Kind::Text => (ValueParser::string(), "TEXT"),
    };
    arg.value_parser(parser).value_name(value)
}

/// A boolean flag of Go: `--flag` or `--flag=false`, never `--flag false`.
fn switch(arg: Arg) -> Arg {
    arg.num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .value_parser(ValueParser::new(go::boolean))
        .value_name("BOOL")
}
