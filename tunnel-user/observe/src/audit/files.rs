//! Files of the audit: one per day (UTC), more on busy days, within a bound on all of them. A peer that
//! is refused a thousand times a second fills no disk.
//!
//! A file ends with its day, or at an eighth of the bound. Then the oldest files are removed: those
//! beyond the retention time, and as many as the new one needs for its bytes. Removals before the
//! retention time are counted and logged.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::Counts;
use super::tail::{Tail, Unwritten};
use crate::line_writer::line_count;
use cpc_host::directory::Directory;
use cpc_host::report::report;

/// Divisor: the part of the bound that one file may have, and that is removed at once.
const PARTS: u64 = 8;

/// Retention of the files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Number of days with files.
    pub days: usize,
    /// Size of all files together, in bytes.
    pub bytes: u64,
}

/// Files open for appending.
pub(super) struct Files {
    /// Directory of the files, opened once: its owner can move it, but not redirect the writes.
    directory: Directory,
    /// Prefix of the names of the files.
    series: &'static str,
    bounds: Bounds,
    counts: Arc<Counts>,
    name: Name,
    tail: Tail<File>,
}

/// Position of a file in the order of all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    /// Date, such as `2026-11-23`.
    day: String,
    /// Number within the day, from 0.
    part: u32,
}

impl Files {
    /// Continues the newest file of this day. New files are readable for their owner alone.
    ///
    /// # Errors
    /// The error of the system call.
    pub(super) fn open(
        directory: &Path,
        series: &'static str,
        bounds: Bounds,
        counts: Arc<Counts>,
        now: SystemTime,
    ) -> io::Result<Self> {
        if let Some(parent) = directory.parent()
            && !directory.is_dir()
            && !parent.as_os_str().is_empty()
        {
            Directory::create(parent, 0o755)?;
        }
        // Also where it is there: root follows no link of another user's.
        let directory = Directory::create(directory, 0o700)?;
        let day = day_of(now);
        let newest = names_in(&directory, series)?.into_iter().max();
        let part = newest.filter(|newest| newest.day == day);
        let name = Name {
            part: part.map_or(0, |newest| newest.part),
            day,
        };
        let tail = append_to(&directory, &name.file(series))?;
        let files = Self {
            directory,
            series,
            bounds,
            counts,
            name,
            tail,
        };
        files.prune()?;
        Ok(files)
    }

    /// Appends lines.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub(super) fn append(&mut self, lines: &[u8], now: SystemTime) -> Result<(), Unwritten> {
        let day = day_of(now);
        let size = self.tail.size();
        let is_full = size > 0 && size + lines.len() as u64 > self.bounds.part();
        // A clock that was set back goes on in the file that is there.
        let next = match (day > self.name.day, is_full) {
            (true, _) => Some(Name { day, part: 0 }),
            (false, true) => Some(Name {
                day: self.name.day.clone(),
                part: self.name.part.saturating_add(1),
            }),
            (false, false) => None,
        };
        if let Some(Err(why)) = next.map(|next| self.begin(next)) {
            if is_full {
                return Err(Unwritten { whole: 0, why });
            }
            // There is room in yesterday's.
            tracing::warn!(why = report(&why), "no further file for the audit");
        }
        self.tail.append(lines)
    }

    fn begin(&mut self, name: Name) -> io::Result<()> {
        let tail = append_to(&self.directory, &name.file(self.series))?;
        (self.name, self.tail) = (name, tail);
        if let Err(why) = self.prune() {
            tracing::warn!(why = report(&why), "files of the audit can't be removed");
        }
        Ok(())
    }

    /// Removes the oldest files, so that the current one may grow to its bound.
    fn prune(&self) -> io::Result<()> {
        let mut names = names_in(&self.directory, self.series)?;
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
            let file = name.file(self.series);
            if days > self.bounds.days {
                self.directory.remove(&file)?;
                continue;
            }
            let size = self.directory.size(&file)?;
            is_over |= size > room;
            if is_over {
                self.lose(&file)?;
            } else {
                room -= size;
            }
        }
        Ok(())
    }

    /// Removes a file before the end of its retention time.
    fn lose(&self, file: &str) -> io::Result<()> {
        let records = count_lines(self.directory.open_to_read(file)?)?;
        self.directory.remove(file)?;
        self.counts.removed.fetch_add(records, Ordering::Relaxed);
        tracing::warn!(
            file,
            records,
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
    fn file(&self, series: &str) -> String {
        let Self { day, part } = self;
        match part {
            0 => format!("{series}.{day}.jsonl"),
            part => format!("{series}.{day}.{part}.jsonl"),
        }
    }

    fn parse(name: &str, series: &str) -> Option<Self> {
        let middle = name.strip_prefix(series)?.strip_prefix('.')?;
        let middle = middle.strip_suffix(".jsonl")?;
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

/// Returns the files of this series; other files are ignored.
fn names_in(directory: &Directory, series: &str) -> io::Result<Vec<Name>> {
    let names = directory.names()?.into_iter();
    Ok(names
        .filter_map(|name| Name::parse(&name, series))
        .collect())
}

fn append_to(directory: &Directory, file: &str) -> io::Result<Tail<File>> {
    Tail::of(directory.open_to_append(file, 0o600)?)
}

fn count_lines(mut file: File) -> io::Result<u64> {
    let (mut chunk, mut lines) = (vec![0; 64 << 10], 0);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(lines),
            n => lines += line_count(&chunk[..n]),
        }
    }
}

/// Returns the UTC date, such as `2026-11-23`.
fn day_of(now: SystemTime) -> String {
    let mut text = humantime::format_rfc3339_seconds(now).to_string();
    text.truncate("2026-11-23".len());
    text
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);
    const BOUNDS: Bounds = Bounds { days: 3, bytes: 80 };

    fn at(day: u32) -> SystemTime {
        // 2026-11-23.
        SystemTime::UNIX_EPOCH + DAY * (20_780 + day)
    }

    fn open(directory: &Path, day: u32) -> Files {
        Files::open(directory, "audit", BOUNDS, Arc::default(), at(day)).unwrap()
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
        // The clock was set back: no new file sorts before the others.
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
        let newest = fs::read_to_string(place.path().join(files.name.file("audit"))).unwrap();
        assert!(newest.ends_with("0199\n"), "{newest}");
    }

    #[test]
    fn one_series_takes_no_room_from_another() {
        let place = tempfile::tempdir().unwrap();
        let mut decisions = open(place.path(), 0);
        decisions.append(b"{}\n", at(0)).unwrap();
        let name = "connections";
        let mut busy = Files::open(place.path(), name, BOUNDS, Arc::default(), at(0)).unwrap();
        for _ in 0..200 {
            busy.append(b"{12}\n", at(0)).unwrap();
        }
        decisions.append(b"{}\n", at(0)).unwrap();
        let kept = fs::read_to_string(place.path().join("audit.2026-11-23.jsonl"));
        assert_eq!(kept.unwrap(), "{}\n{}\n");
        assert!(bytes(place.path()) <= 6 + BOUNDS.bytes);
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

    /// The owner of a parent directory replaces ours by a link to another directory.
    #[test]
    fn a_directory_that_is_moved_away_stays_the_one_that_is_written_to() {
        let place = tempfile::tempdir().unwrap();
        let (ours, moved) = (place.path().join("audit"), place.path().join("moved"));
        let victim = place.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("audit.2026-11-20.jsonl"), "another's\n").unwrap();
        let mut files = open(&ours, 0);
        fs::rename(&ours, &moved).unwrap();
        symlink(&victim, &ours).unwrap();
        for day in 0..6 {
            files.append(b"{}\n", at(day)).unwrap();
        }
        assert_eq!(names(&victim), ["audit.2026-11-20.jsonl"]);
        assert_eq!(names(&moved).len(), BOUNDS.days);
    }

    #[test]
    fn parts_are_in_the_order_of_their_numbers() {
        let parse = |name| Name::parse(name, "audit").unwrap();
        let tenth = parse("audit.2026-11-23.10.jsonl");
        assert!(parse("audit.2026-11-23.jsonl") < parse("audit.2026-11-23.2.jsonl"));
        assert!(parse("audit.2026-11-23.2.jsonl") < tenth);
        assert!(tenth < parse("audit.2026-11-24.jsonl"));
        for other in [
            "audit.jsonl",
            "audit.2026-11-23.0.jsonl",
            "audit.2026-11-23.x.jsonl",
            "connections.2026-11-23.jsonl",
        ] {
            assert_eq!(Name::parse(other, "audit"), None, "{other}");
        }
    }
}
