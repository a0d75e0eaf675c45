//! The page of metrics in either of the two text formats that Prometheus reads: its own, version
//! 0.0.4, and OpenMetrics 1.0.0.
//!
//! The registry writes OpenMetrics. In version 0.0.4 a counter's name has its `_total` in the type
//! line too, there is no end mark, and the type `unknown` is written `counter`: the one metric of
//! that type is a counter whose name stands as it is (`Exact` in cpc-konnectivity). Bounds of buckets are
//! written as Prometheus' client for Go writes them, behind the other labels.

use std::fmt::{self, Write};

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

/// Format of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    /// Chooses the format by the values of a request's Accept fields (RFC 9110, section 12.5.1):
    /// OpenMetrics where one names it and prefers no kind of text to it.
    pub fn accepted<'a>(accept: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut text, mut open_metrics) = (0.0, 0.0);
        for range in accept.into_iter().flat_map(|field| field.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0, None);
            for (key, value) in parts.filter_map(|part| part.split_once('=')) {
                match key.trim_end().to_ascii_lowercase().as_str() {
                    "q" => quality = value.trim().parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim().trim_matches('"')),
                    _ => {}
                }
            }
            let best: &mut f64 = match (kind.as_str(), version) {
                ("application/openmetrics-text", None | Some("0.0.1" | "1.0.0")) => {
                    &mut open_metrics
                }
                ("text/plain", None | Some("0.0.4")) => &mut text,
                _ => continue,
            };
            *best = best.max(quality);
        }
        if open_metrics > 0.0 && open_metrics >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// Returns the value of Content-Type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes all metrics in `registry`.
    ///
    /// # Errors
    /// A metric can't be written.
    pub fn page(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut written = String::new();
        encode(&mut written, registry)?;
        let mut page = String::with_capacity(written.len());
        let mut help = "";
        for line in written.lines() {
            if let Some(bucket) = Bucket::parse(line) {
                bucket.write(self, &mut page)?;
            } else if self == Self::OpenMetrics {
                writeln!(page, "{line}")?;
            } else if let Some(text) = line.strip_prefix("# HELP ") {
                help = text;
            } else if let Some(family) = line.strip_prefix("# TYPE ") {
                write_family(family, help, &mut page)?;
            } else if !line.starts_with('#') {
                writeln!(page, "{line}")?;
            }
        }
        Ok(page)
    }
}

/// Writes a family. `family` and `help` are the texts behind `# TYPE` and `# HELP`, the name first.
fn write_family(family: &str, help: &str, page: &mut String) -> fmt::Result {
    let (name, kind) = family.split_once(' ').unwrap_or((family, "untyped"));
    let text = help.split_once(' ').map_or("", |(_, text)| text);
    let (suffix, kind) = match kind {
        "counter" => ("_total", "counter"),
        "unknown" => ("", "counter"),
        kind => ("", kind),
    };
    writeln!(page, "# HELP {name}{suffix} {text}")?;
    writeln!(page, "# TYPE {name}{suffix} {kind}")
}

/// A line of a histogram: `name_bucket{le="0.005",other="label"} 3`.
struct Bucket<'a> {
    name: &'a str,
    bound: &'a str,
    labels: &'a str,
    count: &'a str,
}

impl<'a> Bucket<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (name, rest) = line.split_once("_bucket{le=\"")?;
        let (bound, rest) = rest.split_once('"')?;
        let (labels, count) = rest.rsplit_once("} ")?;
        Some(Self {
            name,
            bound,
            labels: labels.trim_start_matches(','),
            count,
        })
    }

    fn write(&self, format: Format, page: &mut String) -> fmt::Result {
        let Self {
            name,
            labels,
            count,
            ..
        } = self;
        let comma = if labels.is_empty() { "" } else { "," };
        let bound = match self.bound.parse() {
            Ok(bound) if f64::is_finite(bound) => go_float(bound, format),
            _ => self.bound.to_owned(),
        };
        writeln!(
            page,
            "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}"
        )
    }
}

/// Formats a finite number as Go does in its shortest form (`strconv`, format `g`). OpenMetrics
/// requires a fraction or exponent.
fn go_float(number: f64, format: Format) -> String {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = number.to_string();
    if format == Format::OpenMetrics && !plain.contains('.') {
        return plain + ".0";
    }
    plain
}

#[cfg(test)]
mod tests;
