//! Errors, as people read them: each with its causes, none twice.

use std::error::Error;
use std::iter;

/// What `error` says, followed by each of its causes that it does not say itself.
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
    use std::io;

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
