//! The audit's files: one a day (UTC), and more where a day is busy, so that a peer that is refused a
//! thousand times a second fills no disk.
//!
//! A file ends with its day, or when it has an eighth of what all may have. Then the oldest ones go:
//! those of days that are over their time, and as many as it takes for the new one to fit. What is
//! gone before its time is counted and said.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::Counts;

/// Of what all files may have, the part that one may: so much goes at once.
const PARTS: u64 = 8;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Days of which there are files.
    pub days: usize,
    /// Bytes of all files together.
    pub bytes: u64,
}

/// Files that are appended to.
pub(super) struct Files {
    directory: PathBuf,
    bounds: Bounds,
    counts: Arc<Counts>,
    name: Name,
    file: File,
    size: u64,
}

/// A file's place in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    /// `2026-11-23`.
    day: String,
    /// From 0 in each day.
    part: u32,
}

impl Files {
    /// Goes on where the newest file of this day ends. What is made is for its owner alone.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn open(
        directory: &Path,
        bounds: Bounds,
        counts: Arc<Counts>,
        now: SystemTime,
    ) -> io::Result<Self> {
        if !directory.is_dir() {
            if let Some(parent) = directory.parent() {
                fs::create_dir_all(parent)?;
            }
            DirBuilder::new().mode(0o700).create(directory)?;
        }
        let day = day_of(now);
        let newest = names_in(directory)?.into_iter().max();
        let part = newest.filter(|newest| newest.day == day);
        let name = Name {
            part: part.map_or(0, |newest| newest.part),
            day,
        };
        let file = append_to(&name.path(directory))?;
        let size = file.metadata()?.len();
        let files = Self {
            directory: directory.to_owned(),
            bounds,
            counts,
            name,
            file,
            size,
        };
        files.prune()?;
        Ok(files)
    }

    /// Appends lines.
    ///
    /// # Errors
    /// What the system says; they may have been written in part.
    pub(super) fn append(&mut self, lines: &[u8], now: SystemTime) -> io::Result<()> {
        let day = day_of(now);
        let is_full = self.size > 0 && self.size + lines.len() as u64 > self.bounds.part();
        // A clock that was set back goes on in the file that is there.
        if day > self.name.day {
            self.begin(Name { day, part: 0 })?;
        } else if is_full {
            let (day, part) = (self.name.day.clone(), self.name.part.saturating_add(1));
            self.begin(Name { day, part })?;
        }
        self.file.write_all(lines)?;
        self.size += lines.len() as u64;
        Ok(())
    }

    fn begin(&mut self, name: Name) -> io::Result<()> {
        let file = append_to(&name.path(&self.directory))?;
        self.size = file.metadata()?.len();
        (self.name, self.file) = (name, file);
        self.prune()
    }

    /// Removes the oldest, so that the one in use may become as large as it may.
    fn prune(&self) -> io::Result<()> {
        let mut names = names_in(&self.directory)?;
        names.sort();
        names.retain(|name| *name < self.name);
        let mut days = 1;
        let mut room = self.bounds.bytes.saturating_sub(self.bounds.part());
        let mut day = self.name.day.as_str();
        let mut is_over = false;
        for name in names.iter().rev() {
            if name.day != day {
                (day, days) = (&name.day, days + 1);
            }
            let path = name.path(&self.directory);
            if days > self.bounds.days {
                fs::remove_file(&path)?;
                continue;
            }
            let size = fs::metadata(&path)?.len();
            is_over |= size > room;
            if is_over {
                self.lose(&path)?;
            } else {
                room -= size;
            }
        }
        Ok(())
    }

    /// Removes a file before its time.
    fn lose(&self, path: &Path) -> io::Result<()> {
        let records = count_lines(path)?;
        fs::remove_file(path)?;
        self.counts.removed.fetch_add(records, Ordering::Relaxed);
        tracing::warn!(
            file = %path.display(), records,
            "audit records are removed before their time, there are too many: raise audit.max_bytes"
        );
        Ok(())
    }
}

impl Bounds {
    fn part(&self) -> u64 {
        self.bytes / PARTS
    }
}

impl Name {
    fn path(&self, directory: &Path) -> PathBuf {
        let Self { day, part } = self;
        directory.join(match part {
            0 => format!("audit.{day}.jsonl"),
            part => format!("audit.{day}.{part}.jsonl"),
        })
    }

    fn parse(name: &str) -> Option<Self> {
        let middle = name.strip_prefix("audit.")?.strip_suffix(".jsonl")?;
        let (day, part) = match middle.split_once('.') {
            Some((day, part)) => (day, part.parse().ok().filter(|part| *part > 0)?),
            None => (middle, 0),
        };
        let is_day = day.len() == 10 && day.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        is_day.then(|| Self {
            day: day.to_owned(),
            part,
        })
    }
}

/// Those that are ours; others are nobody's business.
fn names_in(directory: &Path) -> io::Result<Vec<Name>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.extend(entry?.file_name().to_str().and_then(Name::parse));
    }
    Ok(names)
}

fn append_to(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).open(path)
}

fn count_lines(path: &Path) -> io::Result<u64> {
    let (mut file, mut chunk, mut lines) = (File::open(path)?, vec![0; 64 << 10], 0);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(lines),
            n => lines += chunk[..n].iter().filter(|b| **b == b'\n').count() as u64,
        }
    }
}

/// `2026-11-23`, in UTC.
fn day_of(now: SystemTime) -> String {
    let mut text = humantime::format_rfc3339_seconds(now).to_string();
    text.truncate("2026-11-23".len());
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const BOUNDS: Bounds = Bounds { days: 3, bytes: 80 };

    fn at(day: u32) -> SystemTime {
        // 2026-11-23.
        SystemTime::UNIX_EPOCH + DAY * (20_780 + day)
    }

    fn open(directory: &Path, day: u32) -> Files {
        Files::open(directory, BOUNDS, Arc::default(), at(day)).unwrap()
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    fn bytes(directory: &Path) -> u64 {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum()
    }

    fn removed(files: &Files) -> u64 {
        files.counts.removed.load(Ordering::Relaxed)
    }

    #[test]
    fn a_day_has_a_file_and_old_days_go() {
        let place = tempfile::tempdir().unwrap();
        let mut files = open(place.path(), 0);
        for day in 0..5 {
            files.append(b"{}\n", at(day)).unwrap();
        }
        let kept = [
            "audit.2026-11-25.jsonl",
            "audit.2026-11-26.jsonl",
            "audit.2026-11-27.jsonl",
        ];
        assert_eq!(names(place.path()), kept);
        assert_eq!(removed(&files), 0, "it was their time");
        // Set back: no file is begun that stands before others.
        files.append(b"{}\n", at(0)).unwrap();
        assert_eq!(names(place.path()), kept);
    }

    #[test]
    fn a_busy_day_stays_within_its_bytes_and_the_newest_remain() {
        let place = tempfile::tempdir().unwrap();
        let mut files = open(place.path(), 0);
        for n in 0..200 {
            files.append(format!("{n:04}\n").as_bytes(), at(0)).unwrap();
            assert!(bytes(place.path()) <= BOUNDS.bytes);
        }
        let left = bytes(place.path()) / 5;
        assert_eq!(removed(&files), 200 - left);
        assert!(left > 10, "{left} are left");
        let newest = fs::read_to_string(files.name.path(place.path())).unwrap();
        assert!(newest.ends_with("0199\n"), "{newest}");
    }

    #[test]
    fn a_process_goes_on_where_another_ended() {
        let place = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            let mut files = open(place.path(), 0);
            files.append(b"{}{}\n", at(0)).unwrap();
        }
        let parts = ["audit.2026-11-23.1.jsonl", "audit.2026-11-23.jsonl"];
        assert_eq!(names(place.path()), parts);
        fs::write(place.path().join("notes.txt"), "not ours").unwrap();
        open(place.path(), 9);
        assert!(names(place.path()).contains(&"notes.txt".to_owned()));
    }

    #[test]
    fn parts_are_in_the_order_of_their_numbers() {
        let parse = |name| Name::parse(name).unwrap();
        let tenth = parse("audit.2026-11-23.10.jsonl");
        assert!(parse("audit.2026-11-23.jsonl") < parse("audit.2026-11-23.2.jsonl"));
        assert!(parse("audit.2026-11-23.2.jsonl") < tenth);
        assert!(tenth < parse("audit.2026-11-24.jsonl"));
        for other in [
            "audit.jsonl",
            "audit.2026-11-23.0.jsonl",
            "audit.2026-11-23.x.jsonl",
        ] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
