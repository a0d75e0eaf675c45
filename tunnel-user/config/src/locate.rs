//! Finds the line of a key in the text of a configuration.

use std::fmt;

use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::{Location, Spanned};

/// The keys of a file, with their places.
enum Node {
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Scalar,
}

/// Returns the line and the column of `key`, which is written `tls.cert` or `servers[1].address`. Where
/// the last parts of it are not in the text, those of the part above count.
pub(super) fn locate(text: &str, key: &str) -> Option<(u64, u64)> {
    let root: Spanned<Node> = serde_saphyr::from_str(text).ok()?;
    let mut found = None;
    let mut node = &root.value;
    for step in key.split(['.', '[']) {
        let next = match (node, step.strip_suffix(']')) {
            (Node::List(items), Some(index)) => {
                let index = index.parse::<usize>().ok();
                let item = index.and_then(|index| items.get(index));
                item.map(|item| (item.referenced, item))
            }
            (Node::Map(keys), None) => {
                let mut keys = keys.iter();
                let of_key = keys.find(|(key, _)| key.value == step);
                of_key.map(|(key, value)| (key.referenced, value))
            }
            _ => None,
        };
        let Some((location, value)) = next else { break };
        if location != Location::UNKNOWN {
            found = Some((location.line(), location.column()));
        }
        node = &value.value;
    }
    found
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(AnyNode)
    }
}

struct AnyNode;

impl<'de> Visitor<'de> for AnyNode {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut keys = Vec::new();
        while let Some(entry) = map.next_entry()? {
            keys.push(entry);
        }
        Ok(Node::Map(keys))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
}

#[cfg(test)]
mod tests {
    use super::locate;

    const TEXT: &str = "\
# A comment.
version: 1
tls: {cert: a,
  key: b}
servers:
  - a:1
  - address: b:2
    protocol: quic
  - {address: c}
limits:
  drain: 1h
log:
";

    #[test]
    fn keys_have_lines() {
        for (key, line) in [
            ("version", 2),
            ("tls", 3),
            ("tls.cert", 3),
            ("tls.key", 4),
            ("servers", 5),
            ("servers[0]", 6),
            ("servers[1]", 7),
            ("servers[1].protocol", 8),
            ("servers[2].address", 9),
            ("limits.drain", 11),
            ("log", 12),
            // Not there, or not of that kind: the part above.
            ("tls.ca", 3),
            ("servers[3]", 5),
            ("servers.address", 5),
            ("limits.drain.x", 11),
            ("limits[0]", 10),
            ("log.filter", 12),
        ] {
            assert_eq!(locate(TEXT, key).map(|at| at.0), Some(line), "{key}");
        }
        assert_eq!(locate(TEXT, "shards"), None);
        assert_eq!(locate("tls: [", "tls"), None);
        assert_eq!(locate("", "tls"), None);
        assert_eq!(
            locate("a: 1\n  \nb: &x {c: 1}\nd: *x\n", "d.c"),
            Some((4, 4))
        );
    }
}
