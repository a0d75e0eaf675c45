//! Texts of errors for people: each error with its causes, none twice.

use std::error::Error;
use std::iter;

/// Returns the text of `error`, followed by each of its causes that the text does not contain.
pub fn report(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(error.source(), |cause| (**cause).source());
    let mut text = error.to_string();
    for cause in causes.map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::{fs, io};

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("shown: {0}")]
        Shown(#[source] io::Error),
        #[error("kept")]
        Kept(#[source] io::Error),
        #[error(transparent)]
        Same(#[from] Box<Outer>),
    }

    /// Returns the sources of all user-space crates and of the protocol's, with their paths.
    fn sources() -> Vec<(PathBuf, String)> {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut folders = vec![crates.join("../proto/src"), crates];
        let mut sources = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|it| it == "rs") {
                    let text = fs::read_to_string(&path).unwrap();
                    sources.push((path, text));
                }
            }
        }
        sources
    }

    /// A variant that shows its cause in its own text does not keep it as its source as well.
    #[test]
    fn no_error_shows_a_cause_that_it_keeps() {
        let mut both = Vec::new();
        for (path, text) in sources() {
            // A variant ends with the comma of its own line, or of its closing brace.
            for variant in text.split("\n    #[error(").skip(1) {
                let (shown, rest) = variant.split_once(")]\n").unwrap();
                let ends = |line: &&str| {
                    line.starts_with("    ") && !line.starts_with("     ") && line.ends_with(',')
                };
                let last = rest.lines().find(ends).unwrap_or_default();
                let fields = rest.split(last).next().unwrap_or_default().to_owned() + last;
                let keeps = ["#[from]", "#[source]"]
                    .iter()
                    .any(|it| fields.contains(it));
                let shows = ["{0", "{why", "{source", "{error", "(.0"]
                    .iter()
                    .any(|it| shown.contains(it));
                if keeps && shows {
                    both.push(format!("{}: {shown}", path.display()));
                }
            }
        }
        assert_eq!(both, [""; 0]);
    }

    /// `%` shows an error without its causes: an error of the redirect would lose its errno.
    #[test]
    fn no_log_line_loses_a_cause() {
        let mut lost = Vec::new();
        for (path, text) in sources() {
            let lines = text.lines().filter(|line| {
                let code = line.trim_start();
                let is_shown = |field: &str| code.contains(field) && !code.starts_with("//");
                // In two parts, so that this file has none.
                is_shown(concat!("%", "error")) || is_shown(concat!("error = ", "%"))
            });
            lost.extend(lines.map(|line| format!("{}: {line}", path.display())));
        }
        assert_eq!(lost, [""; 0], "take `error = report(&error)`");
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = || io::Error::other("the cause");
        assert_eq!(report(&Outer::Shown(cause())), "shown: the cause");
        assert_eq!(report(&Outer::Kept(cause())), "kept: the cause");
        let deep = Outer::Same(Box::new(Outer::Kept(cause())));
        assert_eq!(report(&deep), "kept: the cause");
        let error = anyhow::Error::new(Outer::Shown(cause())).context("outside");
        assert_eq!(report(error.as_ref()), "outside: shown: the cause");
    }
}
