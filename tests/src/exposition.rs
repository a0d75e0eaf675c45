//! A strict parser of Prometheus' text format, version 0.0.4. It refuses everything that the parser
//! of Prometheus' library for Go refuses, and everything that would mislead a reader.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, bail, ensure};

/// One family: its type, and the names of its samples.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Samples: name and labels as written, with the value.
    pub samples: HashMap<String, f64>,
    helped: bool,
    histograms: HashMap<String, Histogram>,
}

/// The samples of a histogram that have the same labels.
#[derive(Clone, Debug, Default)]
struct Histogram {
    buckets: Vec<(f64, f64)>,
    sum: Option<f64>,
    count: Option<f64>,
}

/// A page that has been read.
#[derive(Clone, Debug, Default)]
pub struct Page {
    families: HashMap<String, Family>,
    ended: HashSet<String>,
    current: String,
}

impl Page {
    /// Reads all of `text`.
    ///
    /// # Errors
    ///
    /// The first line that is not of the format, or a family that is not whole.
    pub fn read(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line has no end");
        let mut page = Self::default();
        for line in text.lines() {
            page.line(line).with_context(|| format!("in {line:?}"))?;
        }
        for (name, family) in &page.families {
            family
                .check()
                .with_context(|| format!("{name} in {text}"))?;
        }
        Ok(page)
    }

    /// Returns the families, by name.
    #[must_use]
    pub fn families(&self) -> &HashMap<String, Family> {
        &self.families
    }

    fn line(&mut self, line: &str) -> Result<()> {
        if let Some(comment) = line.strip_prefix('#') {
            let words: Vec<_> = comment.trim_start().splitn(3, ' ').collect();
            return match words[..] {
                ["HELP", name, help] => self.help(name, help),
                ["TYPE", name, kind] => self.kind(name, kind),
                ["HELP" | "TYPE", ..] => bail!("incomplete"),
                _ => bail!("a comment, which no line of ours is"),
            };
        }
        self.sample(line)
    }

    /// Begins a family, or continues it.
    fn family(&mut self, name: &str) -> Result<&mut Family> {
        ensure!(is_name(name, ":"), "not a name of a metric: {name}");
        if self.current != name {
            self.ended.insert(std::mem::take(&mut self.current));
            ensure!(!self.ended.contains(name), "{name} is in several places");
            name.clone_into(&mut self.current);
        }
        Ok(self.families.entry(name.to_owned()).or_default())
    }

    fn help(&mut self, name: &str, help: &str) -> Result<()> {
        unescape(help, "\\n")?;
        ensure!(help.len() > 5, "help that says nothing");
        let family = self.family(name)?;
        ensure!(!family.helped, "a second HELP");
        family.helped = true;
        Ok(())
    }

    fn kind(&mut self, name: &str, kind: &str) -> Result<()> {
        let family = self.family(name)?;
        ensure!(family.kind.is_empty(), "a second TYPE");
        ensure!(family.samples.is_empty(), "TYPE after a sample");
        let known = ["counter", "gauge", "histogram"].contains(&kind);
        ensure!(known, "no type of ours: {kind}");
        kind.clone_into(&mut family.kind);
        Ok(())
    }

    fn sample(&mut self, line: &str) -> Result<()> {
        let (series, value) = line.rsplit_once(' ').context("no value")?;
        let value = number(value)?;
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, labels(rest)?),
            None => (series, Vec::new()),
        };
        ensure!(is_name(name, ":"), "not a name of a metric: {name}");
        let suffixes = ["_bucket", "_sum", "_count"];
        let part = suffixes.iter().find_map(|suffix| {
            let family = name.strip_suffix(suffix)?;
            let kind = &self.families.get(family)?.kind;
            (kind == "histogram").then_some((family, *suffix))
        });
        let (family, part) = part.unwrap_or((name, ""));
        let family = self.family(family)?;
        ensure!(!family.kind.is_empty(), "a sample without a TYPE");
        ensure!(
            (family.kind == "histogram") != part.is_empty(),
            "not a sample of a {}",
            family.kind
        );
        ensure!(family.kind == "gauge" || value >= 0.0, "below zero");
        if !part.is_empty() {
            family.of_histogram(part, &labels, value)?;
        }
        let twice = family.samples.insert(series.to_owned(), value).is_some();
        ensure!(!twice, "a second time");
        Ok(())
    }
}

impl Family {
    fn of_histogram(&mut self, part: &str, labels: &[(&str, String)], value: f64) -> Result<()> {
        let mut others: Vec<_> = labels.iter().filter(|(key, _)| *key != "le").collect();
        others.sort();
        let histogram = self.histograms.entry(format!("{others:?}")).or_default();
        let bound = labels.iter().find(|(key, _)| *key == "le");
        match (part, bound) {
            ("_bucket", Some((_, bound))) => {
                let bound = number(bound)?;
                let last = histogram.buckets.last();
                let rises = last.is_none_or(|(last, count)| *last < bound && *count <= value);
                ensure!(rises, "bounds and counts must rise");
                histogram.buckets.push((bound, value));
            }
            ("_bucket", None) => bail!("a bucket without a bound"),
            ("_sum", None) => histogram.sum = Some(value),
            ("_count", None) => histogram.count = Some(value),
            _ => bail!("a bound where there is no bucket"),
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        ensure!(self.helped && !self.kind.is_empty(), "without HELP or TYPE");
        for (labels, histogram) in &self.histograms {
            let last = histogram.buckets.last();
            let all = last.filter(|(bound, _)| *bound == f64::INFINITY);
            let all = all.map(|(_, count)| *count);
            ensure!(
                all.is_some() && all == histogram.count && histogram.sum.is_some(),
                "not a whole histogram: {labels} {histogram:?}"
            );
        }
        Ok(())
    }
}

fn is_name(name: &str, also: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphabetic() || c == '_' || also.contains(c);
    let mut chars = name.chars();
    chars.next().is_some_and(fits) && chars.all(|c| fits(c) || c.is_ascii_digit())
}

/// Parses a number as Go does; no page of ours has anything else.
fn number(text: &str) -> Result<f64> {
    if text == "+Inf" {
        return Ok(f64::INFINITY);
    }
    let digits = text.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    ensure!(digits, "not a number: {text:?}");
    Ok(text.parse()?)
}

/// Labels with the brace that ends them.
fn labels(mut rest: &str) -> Result<Vec<(&str, String)>> {
    let mut labels: Vec<(&str, String)> = Vec::new();
    loop {
        let (key, value) = rest.split_once("=\"").context("a label without a value")?;
        ensure!(is_name(key, ""), "not a name of a label: {key:?}");
        let known = labels.iter().any(|(other, _)| *other == key);
        ensure!(!known, "two labels {key}");
        let end = end_of(value).context("a value without an end")?;
        labels.push((key, unescape(&value[..end], "\\\"n")?));
        match &value[end + 1..] {
            "}" => return Ok(labels),
            more => rest = more.strip_prefix(',').context("no comma behind a label")?,
        }
    }
}

/// Returns the position of the quotation mark that ends a value.
fn end_of(value: &str) -> Option<usize> {
    let mut escaped = false;
    value.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })
}

/// Removes the backslashes, which stand before one of `escapes` alone.
fn unescape(text: &str, escapes: &str) -> Result<String> {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        let next = chars.next().filter(|c| escapes.contains(*c));
        match next.context("not an escape of this place")? {
            'n' => plain.push('\n'),
            other => plain.push(other),
        }
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total Things.\n# TYPE a_total counter\na_total{b=\"x\\\"}\"} 1\n\
                        # HELP h How long.\n# TYPE h histogram\nh_sum{l=\"1\"} 0.5\nh_count{l=\"1\"} 2\n\
                        h_bucket{l=\"1\",le=\"1e-06\"} 1\nh_bucket{l=\"1\",le=\"+Inf\"} 2\n";

    #[test]
    fn a_page_is_read_whole() -> Result<()> {
        let page = Page::read(GOOD)?;
        let family = &page.families()["a_total"];
        assert_eq!(family.kind, "counter");
        assert_eq!(family.samples["a_total{b=\"x\\\"}\"}"], 1.0);
        assert_eq!(page.families()["h"].samples.len(), 4);
        Ok(())
    }

    #[test]
    fn what_is_not_the_format_is_refused() {
        for (from, to) in [
            ("counter", "unknown"),
            ("a_total{", "a{"),
            ("# TYPE a_total", "# TYPE a"),
            ("# HELP h How long.\n", ""),
            ("x\\\"}", "x\"}"),
            ("\"} 1\n", "\"} one\n"),
            ("\"} 1\n", "\"} -1\n"),
            ("\"} 1\n", "\"} 1\na_total{b=\"x\\\"}\"} 1\n"),
            ("\"} 1\n", "\"} 1\n# EOF\n"),
            ("le=\"+Inf\"} 2", "le=\"2\"} 2"),
            ("le=\"+Inf\"} 2", "le=\"+Inf\"} 3"),
            (",le=\"+Inf\"", ""),
            ("h_sum{l=\"1\"} 0.5\n", ""),
            ("+Inf\"} 2\n", "+Inf\"} 2\na_total{b=\"y\"} 1\n"),
        ] {
            let bad = GOOD.replacen(from, to, 1);
            assert_ne!(bad, GOOD);
            assert!(Page::read(&bad).is_err(), "{bad}");
        }
    }
}
