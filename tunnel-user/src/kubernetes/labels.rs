//! Labels by which leases are told from others: `key=value`, several with commas between.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Labels, each key once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

/// Why a text names no labels.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not key=value; labels are written key=value,key=value")]
pub struct LabelError(String);

impl FromStr for Labels {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let label = |pair: &str| match pair.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() && !value.contains('=') => {
                Ok((key.trim().to_owned(), value.trim().to_owned()))
            }
            _ => Err(LabelError(pair.to_owned())),
        };
        text.split(',')
            .map(label)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl Labels {
    /// As they stand on an object.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.0.clone()
    }
}

/// A selector for what bears all of them.
impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, value)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{key}={value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairs() {
        let labels: Labels = " b = 2,a=1".parse().unwrap();
        assert_eq!(labels.to_string(), "a=1,b=2");
        assert_eq!(labels.to_map()["b"], "2");
        for wrong in ["", "a", "a=1,", "=1", "a=b=c"] {
            assert!(wrong.parse::<Labels>().is_err(), "{wrong:?}");
        }
    }
}
