//! Labels that identify leases: those of a server ([`Labels`]) and the selectors of agents
//! ([`Selector`]), in the syntax of Kubernetes (labels and selectors).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The longest name or value of a label, and the longest prefix of a key.
const MAX_NAME: usize = 63;
const MAX_PREFIX: usize = 253;

/// Labels, each key once: `key=value`, several with commas between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

/// A label selector: `key=value`, `key!=value`, `key in (a, b)`, `key notin (a, b)`, `key`, `!key`,
/// `key > 1`, `key < 1`, several with commas between. Empty it selects everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector(String);

/// Reason why a text is neither labels nor a selector.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Not a label.
    #[error("{0:?} is not key=value; labels are written key=value,key=value")]
    Label(String),
    /// Not a part of a selector.
    #[error(
        "{0:?} selects nothing; write key=value, key!=value, key in (a, b), key notin (a, b), key or \
         !key, with commas between several"
    )]
    Selector(String),
}

impl FromStr for Labels {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let label = |pair: &str| match pair.split_once('=') {
            Some((key, value)) if is_key(key.trim()) && is_value(value.trim()) => {
                Ok((key.trim().to_owned(), value.trim().to_owned()))
            }
            _ => Err(LabelError::Label(pair.to_owned())),
        };
        text.split(',')
            .map(label)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl FromStr for Selector {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        if !text.trim().is_empty()
            && let Some(wrong) = requirements(text).find(|it| !is_requirement(it))
        {
            return Err(LabelError::Selector(wrong.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the requirements: the parts between commas outside of parentheses.
fn requirements(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

fn is_requirement(text: &str) -> bool {
    let text = text.trim();
    if let Some(key) = text.strip_prefix('!') {
        return is_key(key.trim());
    }
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let end = text.find(|c| !is_part(c)).unwrap_or(text.len());
    let (key, rest) = text.split_at(end);
    let rest = rest.trim_start();
    let with = |operator: &str| rest.strip_prefix(operator).map(str::trim);
    let matched = if let Some(value) = with("==").or_else(|| with("!=")).or_else(|| with("=")) {
        is_value(value)
    } else if let Some(number) = with(">").or_else(|| with("<")) {
        number.parse::<i64>().is_ok()
    } else if let Some(set) = with("in").or_else(|| with("notin")) {
        let values = set.strip_prefix('(').and_then(|set| set.strip_suffix(')'));
        values.is_some_and(|values| values.split(',').all(|value| is_value(value.trim())))
    } else {
        rest.is_empty()
    };
    is_key(key) && matched
}

/// Whether the text is a label key: a name, optionally behind a DNS subdomain and a slash.
fn is_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let is_label = |label: &str| {
        let within = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !label.is_empty()
            && label.chars().all(within)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_subdomain = |prefix: &str| prefix.len() <= MAX_PREFIX && prefix.split('.').all(is_label);
    prefix.is_none_or(is_subdomain) && !name.is_empty() && is_value(name)
}

fn is_value(value: &str) -> bool {
    let ends = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    let within = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    value.len() <= MAX_NAME
        && value.chars().all(within)
        && ends(value.chars().next())
        && ends(value.chars().next_back())
}

impl Labels {
    /// Returns the labels in the form of an object's metadata.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        self.0.clone()
    }
}

/// Writes a selector of the objects that have all of the labels.
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
        for wrong in ["", "a", "a=1,", "=1", "=", "a=b=c", "a==b", "a b=c", "a=-"] {
            assert!(wrong.parse::<Labels>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn selectors_are_those_of_kubernetes() {
        for right in [
            "",
            "k8s-app=konnectivity-server",
            "k8s-app=konnectivity-server,component=proxy",
            "a==1, b != 2,c",
            "!a",
            "example.org/a in (x, y,z),b notin (x)",
            "a=",
            "a in ()",
            "a > 1,b<2",
        ] {
            let selector = right.parse::<Selector>();
            assert_eq!(selector.map(|s| s.to_string()), Ok(right.to_owned()));
        }
        for wrong in [
            "=",
            "==",
            "!",
            "=1",
            "a=b=c",
            "a,",
            ",a",
            "a in",
            "a in (b",
            "a in b)",
            "a within (b)",
            "a > b",
            "*notavalidlabel*",
            "a=b c",
            "/a=1",
            "A_b/c=1",
            "-a=1",
            "a=\u{fc}",
        ] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong:?}");
        }
        let long = "x".repeat(64);
        assert!(long.parse::<Selector>().is_err());
        assert!(long[1..].parse::<Selector>().is_ok());
    }
}
