//! Connections of another release.

use super::error::HandoverError;
use cpc_host::report::report;

/// Returns the connections that this release understands. Logs the number of the others, which end.
pub fn understood<T>(restored: impl Iterator<Item = Result<T, HandoverError>>) -> Vec<T> {
    let mut first = None;
    let mut others = 0_u64;
    let mut understood = Vec::new();
    for one in restored {
        match one {
            Ok(one) => understood.push(one),
            Err(error) => {
                others += 1;
                first.get_or_insert(error);
            }
        }
    }
    if let Some(error) = first {
        let error = report(&error);
        tracing::error!(
            connections = others,
            error,
            "connections of another release are not understood, and end"
        );
    }
    understood
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_not_understood_costs_no_other_one() {
        let malformed = || Err(HandoverError::Malformed("kind of socket"));
        let saved = [Ok(1), malformed(), Ok(2), malformed()];
        assert_eq!(understood(saved.into_iter()), [1, 2]);
    }
}
