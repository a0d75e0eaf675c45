//! The language of the documentation and of doc comments, as far as a list of words can check it
//! (CONTRIBUTING.md, "Language"). No I/O.
//!
//! Code spans and code blocks are not checked: names of tests may contain any word.

use std::collections::BTreeMap;
use std::fmt;

use super::links::without_code;

/// Words without a subject that a reader can search for, and old ones, with their replacement.
const WORDS: [(&str, &str); 7] = [
    ("anew", "write `again`"),
    ("anybody", "name the party"),
    ("for ever", "write `without end`"),
    (
        "nobody",
        "name the party: no client, no agent, no other process",
    ),
    ("somebody", "name the party"),
    ("whoever", "name the party"),
    ("whomever", "name the party"),
];

/// Words that do not open a doc comment: its first sentence says what the item is or does.
const OPENINGS: [&str; 19] = [
    "He", "His", "How", "It", "Its", "She", "Their", "They", "What", "Whatever", "When", "Where",
    "Which", "Who", "Whoever", "Whom", "Whose", "Why", "Of",
];

/// A place that breaks the rule.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    file: String,
    line: usize,
    word: &'static str,
    remedy: &'static str,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            word,
            remedy,
        } = self;
        write!(f, "{file}:{line}: {word}: {remedy}")
    }
}

/// Returns the faults of Markdown pages (path and text).
pub(super) fn in_pages(pages: &BTreeMap<String, String>) -> Vec<Fault> {
    let each = pages.iter();
    each.flat_map(|(page, text)| words(page, 1, &without_code(text)))
        .collect()
}

/// Returns the faults of the doc comments of Rust files (path and text).
pub(super) fn in_comments(files: &BTreeMap<String, String>) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (file, text) in files {
        for (line, comment) in comments(text) {
            let visible = without_code(&comment);
            if let Some(word) = opening(&visible) {
                faults.push(Fault {
                    file: file.clone(),
                    line,
                    word,
                    remedy: "begin with a noun or a verb in the third person",
                });
            }
            faults.extend(words(file, line, &visible));
        }
    }
    faults
}

/// Returns the doc comments of a Rust file, each with the number of its first line.
fn comments(text: &str) -> Vec<(usize, String)> {
    let mut comments: Vec<(usize, String)> = Vec::new();
    let mut before = None;
    for (index, line) in text.lines().enumerate() {
        let found = doc_comment(line);
        match (found, comments.last_mut()) {
            (Some((marker, text)), Some((_, comment))) if before == Some(marker) => {
                comment.push_str(text);
                comment.push('\n');
            }
            (Some((_, text)), _) => comments.push((index + 1, format!("{text}\n"))),
            (None, _) => {}
        }
        before = found.map(|(marker, _)| marker);
    }
    comments
}

/// Returns the marker and the text of a line of a doc comment.
fn doc_comment(line: &str) -> Option<(&'static str, &str)> {
    let line = line.trim_start();
    ["///", "//!"]
        .into_iter()
        .find_map(|marker| Some((marker, line.strip_prefix(marker)?)))
}

/// Returns the word that opens `text`, if it is one of [`OPENINGS`], also in a contraction.
fn opening(text: &str) -> Option<&'static str> {
    let first = text.split_whitespace().next()?;
    let first = first.split(|c: char| !c.is_alphanumeric()).next()?;
    OPENINGS.into_iter().find(|word| *word == first)
}

/// Returns the words of [`WORDS`] in a text whose first line has the number `first`, in their order.
fn words(file: &str, first: usize, text: &str) -> Vec<Fault> {
    let text = text.to_ascii_lowercase();
    let is_part = |c: char| c == '_' || c.is_alphanumeric();
    let mut faults = Vec::new();
    for (word, remedy) in WORDS {
        let (head, tail) = word.split_once(' ').unwrap_or((word, ""));
        for (at, _) in text.match_indices(head) {
            let rest = &text[at + head.len()..];
            // A line may end between the two.
            let next = rest.trim_start();
            let rest = match tail {
                "" => rest,
                _ if next.len() == rest.len() => continue,
                tail => match next.strip_prefix(tail) {
                    Some(rest) => rest,
                    None => continue,
                },
            };
            if !text[..at].ends_with(is_part) && !rest.starts_with(is_part) {
                faults.push(Fault {
                    file: file.to_owned(),
                    line: first + text[..at].matches('\n').count(),
                    word,
                    remedy,
                });
            }
        }
    }
    faults.sort_by_key(|fault| fault.line);
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(path: &str, text: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(path.to_owned(), text.to_owned())])
    }

    fn lines(faults: &[Fault]) -> Vec<(usize, &str)> {
        faults.iter().map(|it| (it.line, it.word)).collect()
    }

    #[test]
    fn words_count_outside_of_code_and_as_whole_words() {
        let page = "Whoever asks waits for ever.\n\n```sh\nnobody\n```\n\n`nobody` and anewly, `anew`\n\
                    nobody_is_asked\nNobody.\n";
        let faults = in_pages(&one("a.md", page));
        assert_eq!(
            lines(&faults),
            [(1, "for ever"), (1, "whoever"), (9, "nobody")]
        );
        assert_eq!(
            faults[0].to_string(),
            "a.md:1: for ever: write `without end`"
        );
    }

    #[test]
    fn only_the_first_line_of_a_doc_comment_is_an_opening() {
        let code = [
            "//! What it does.",
            "//! It goes on.",
            "",
            "    /// Returns.",
            "    /// It is long.",
            "    fn a() {}",
            "/// Of old.",
            "/// `nobody`",
            "// nobody, What",
            "/// Read anew.",
            "//! Its.",
            "let nobody = 1;",
        ]
        .join("\n");
        assert_eq!(
            lines(&in_comments(&one("src/a.rs", &code))),
            [(1, "What"), (7, "Of"), (10, "anew"), (11, "Its")]
        );
    }

    #[test]
    fn a_comment_is_read_as_a_whole() {
        let code = [
            "/// It's so.",
            "fn a() {}",
            "/// Waits for",
            "///   ever.",
            "///",
            "/// ```",
            "/// let nobody = anew;",
            "/// ```",
            "/// `a span",
            "/// for nobody`",
            "fn b() {}",
        ]
        .join("\n");
        assert_eq!(
            lines(&in_comments(&one("src/a.rs", &code))),
            [(1, "It"), (3, "for ever")]
        );
        assert!(in_pages(&one("a.md", "forever, before everything\n")).is_empty());
    }
}
