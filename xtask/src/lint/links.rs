//! The relative links of the documentation, checked against the tracked files. No I/O.
//!
//! A link resolves when its path is a tracked file or a folder of one, and its anchor is a heading of that
//! page or an explicit `id`. Anchors follow GitHub's rule. External links are not checked.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// A link that does not resolve.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken {
    file: String,
    line: usize,
    link: String,
    fault: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            link,
            fault,
        } = self;
        write!(f, "{file}:{line}: {link}: {fault}")
    }
}

/// Returns the links of `pages` (path and text) that resolve neither to a page nor to one of `files`.
///
/// All paths are relative to the top of the repository, with `/` between their parts.
pub(super) fn broken(pages: &BTreeMap<String, String>, files: &BTreeSet<String>) -> Vec<Broken> {
    let anchors: HashMap<&str, BTreeSet<String>> = pages
        .iter()
        .map(|(path, text)| (path.as_str(), anchors(text)))
        .collect();
    let mut broken = Vec::new();
    for (page, text) in pages {
        for (line, link) in links(text) {
            if let Some(fault) = fault(page, &link, files, &anchors) {
                broken.push(Broken {
                    file: page.clone(),
                    line,
                    link,
                    fault,
                });
            }
        }
    }
    broken
}

fn fault(
    page: &str,
    link: &str,
    files: &BTreeSet<String>,
    anchors: &HashMap<&str, BTreeSet<String>>,
) -> Option<&'static str> {
    if is_external(link) {
        return None;
    }
    let (path, anchor) = match link.split_once('#') {
        Some((path, anchor)) => (path, Some(anchor)),
        None => (link, None),
    };
    let target = if path.is_empty() {
        page.to_owned()
    } else {
        match resolve(page, path) {
            Some(target) => target,
            None => return Some("leaves the repository"),
        }
    };
    if !files.contains(&target) && !is_folder(&target, files) {
        return Some("no tracked file or folder has this path");
    }
    // The anchors of other files are line numbers.
    let known = anchors.get(target.as_str())?;
    (!known.contains(anchor?)).then_some("the page has no such anchor")
}

/// Whether the link has a scheme or a host (RFC 3986, 4.2).
fn is_external(link: &str) -> bool {
    let scheme = link.split(['/', '#', '?']).next().unwrap_or_default();
    link.starts_with("//") || scheme.contains(':')
}

/// Returns `path` relative to the top, or `None` if it leaves the repository.
fn resolve(page: &str, path: &str) -> Option<String> {
    let (folder, path) = match path.strip_prefix('/') {
        Some(path) => ("", path),
        None => (page.rsplit_once('/').map_or("", |it| it.0), path),
    };
    let mut parts = Vec::new();
    for part in folder.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn is_folder(path: &str, files: &BTreeSet<String>) -> bool {
    let prefix = format!("{path}/");
    path.is_empty()
        || files
            .range(prefix.clone()..)
            .next()
            .is_some_and(|file| file.starts_with(&prefix))
}

/// Returns the targets of the inline links, images and link definitions of a page, with their line numbers.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (index, line) in without_code(text).lines().enumerate() {
        let mut add = |target: &str| {
            let target = target.trim_start();
            let end = if target.starts_with('<') {
                target.find('>')
            } else {
                target.find(|c: char| c.is_whitespace() || c == ')')
            };
            let target = &target[..end.unwrap_or(target.len())];
            links.push((index + 1, target.trim_start_matches('<').to_owned()));
        };
        for (at, opening) in line.match_indices("](") {
            add(&line[at + opening.len()..]);
        }
        if let Some((label, target)) = line.split_once("]:")
            && label.starts_with('[')
        {
            add(target);
        }
    }
    links
}

/// Returns the anchors of a page: those that GitHub derives from headings (`# ..`), and explicit ones.
///
/// GitHub drops every character of a heading but letters, digits, `_`, `-` and spaces, writes it in lower
/// case with `-` for spaces, and numbers repetitions from 1.
fn anchors(text: &str) -> BTreeSet<String> {
    let code = without_code(text);
    let mut anchors: BTreeSet<String> = ["id=\"", "name=\""]
        .iter()
        .flat_map(|attribute| code.split(attribute).skip(1))
        .filter_map(|rest| Some(rest.split_once('"')?.0.to_owned()))
        .collect();
    // A heading's own code counts, the lines of a code block do not.
    for (line, visible) in text.lines().zip(code.lines()) {
        let title = line.trim_start_matches('#');
        let depth = line.len() - title.len();
        if !visible.starts_with('#') || depth > 6 || !title.starts_with(' ') {
            continue;
        }
        let anchor = slug(&link_texts(title.trim().trim_end_matches('#').trim_end()));
        let mut unique = anchor.clone();
        for number in 1.. {
            if anchors.insert(unique) {
                break;
            }
            unique = format!("{anchor}-{number}");
        }
    }
    anchors
}

fn slug(title: &str) -> String {
    let kept = title
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | ' '));
    kept.map(|c| if c == ' ' { '-' } else { c })
        .flat_map(char::to_lowercase)
        .collect()
}

/// Replaces each link of a title by its text.
fn link_texts(title: &str) -> String {
    let mut parts = title.split("](");
    let mut texts = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        texts.push_str(part.split_once(')').map_or(part, |it| it.1));
    }
    texts
}

/// Returns `text` with code spans and fenced code blocks blanked, line for line.
pub(super) fn without_code(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    let mut fence: Option<&str> = None;
    let mut paragraph = String::new();
    for line in text.lines() {
        let start = line.trim_start();
        let marker = ["```", "~~~"].into_iter().find(|it| start.starts_with(it));
        if fence.is_none() && marker.is_none() && !start.is_empty() {
            paragraph.push_str(line);
            paragraph.push('\n');
            continue;
        }
        visible.push_str(&without_spans(&paragraph));
        visible.push('\n');
        paragraph.clear();
        if fence.is_none() {
            fence = marker;
        } else if marker == fence {
            fence = None;
        }
    }
    visible.push_str(&without_spans(&paragraph));
    visible
}

/// Returns one paragraph with its code spans blanked. A run of backticks without a second one stays.
fn without_spans(paragraph: &str) -> String {
    let mut visible = String::with_capacity(paragraph.len());
    let mut rest = paragraph;
    while let Some(at) = rest.find('`') {
        let (before, from) = rest.split_at(at);
        let body = from.trim_start_matches('`');
        let run = &from[..from.len() - body.len()];
        visible.push_str(before);
        match closing(body, run.len()) {
            Some(end) => {
                visible.extend(body[..end].chars().map(|c| if c == '\n' { c } else { ' ' }));
                rest = &body[end + run.len()..];
            }
            None => {
                visible.push_str(run);
                rest = body;
            }
        }
    }
    visible.push_str(rest);
    visible
}

/// Returns the place of the first run of exactly `length` backticks.
fn closing(body: &str, length: usize) -> Option<usize> {
    let mut at = 0;
    while let Some(found) = body[at..].find('`') {
        let start = at + found;
        let run = body[start..].len() - body[start..].trim_start_matches('`').len();
        if run == length {
            return Some(start);
        }
        at = start + run;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pages: &[(&str, &str)]) -> Vec<String> {
        let pages: BTreeMap<String, String> = pages
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
            .collect();
        let mut files: BTreeSet<String> = pages.keys().cloned().collect();
        files.insert("deploy/agent/unit.service".to_owned());
        broken(&pages, &files)
            .iter()
            .map(Broken::to_string)
            .collect()
    }

    fn set(of: &[&str]) -> BTreeSet<String> {
        of.iter().map(|&it| it.to_owned()).collect()
    }

    #[test]
    fn anchors_follow_githubs_rule() {
        let page = "# Übersicht, and `limits.drain`!\n## A -- b\n## A -- b\n### [Links](x.md) count_too ##\n\
                    #none\n```sh\n# a comment\n```\n<a id=\"by-hand\"></a>\n";
        let expected = set(&[
            "übersicht-and-limitsdrain",
            "a----b",
            "a----b-1",
            "links-count_too",
            "by-hand",
        ]);
        assert_eq!(anchors(page), expected);
    }

    #[test]
    fn a_repetition_never_takes_the_anchor_of_another_heading() {
        let page = "# a\n# a-1\n# a\n";
        assert_eq!(anchors(page), set(&["a", "a-1", "a-2"]));
    }

    #[test]
    fn links_are_found_outside_of_code_only() {
        let page = "[a](one.md) ![b](two.png \"title\") `[c](no.md)`\n\n```\n[d](no.md)\n```\n\
                    [a text over\ntwo lines `with code`](three.md#x) ``a ` b [e](no.md)``\n\n\
                    a lone ` before [f](<four.md>)\n\n[label]: five.md\n";
        let expected = [
            (1, "one.md"),
            (1, "two.png"),
            (7, "three.md#x"),
            (9, "four.md"),
            (11, "five.md"),
        ];
        assert_eq!(
            links(page),
            expected.map(|(line, it)| (line, it.to_owned()))
        );
    }

    #[test]
    fn links_that_resolve_are_not_reported() {
        let page = "# Top\n[a](#top) [b](b.md#part-1) [c](../deploy/) [d](/deploy/agent/unit.service#L3)\n\
                    [e](https://example.com/x.md#y) [f](mailto:a@example.com) [g](..)\n";
        assert_eq!(
            check(&[("docs/a.md", page), ("docs/b.md", "# Part\n# Part\n")]),
            [""; 0]
        );
    }

    #[test]
    fn links_that_do_not_resolve_are_reported_with_file_and_line() {
        let page =
            "# Top\n\n[a](#tops)\n[b](b.md)\n[c](../../x.md)\n[d](../README.md#Top) [e](../dep)\n";
        assert_eq!(
            check(&[("README.md", "# Top\n"), ("docs/a.md", page)]),
            [
                "docs/a.md:3: #tops: the page has no such anchor",
                "docs/a.md:4: b.md: no tracked file or folder has this path",
                "docs/a.md:5: ../../x.md: leaves the repository",
                "docs/a.md:6: ../README.md#Top: the page has no such anchor",
                "docs/a.md:6: ../dep: no tracked file or folder has this path",
            ]
        );
    }
}
