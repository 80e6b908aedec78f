//! A build's log: a line of JSON for each entry, in the build's folder.
//!
//! Clients read it by the number of entries that they have, and stop when a page is empty. Entries are only ever added, also
//! after a restart, so a number means the same entry for ever.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes of a log. What a build prints beyond that is counted, and not kept.
const MAX_LOG: u64 = 8 << 20;

/// What is kept free of it for the build's last words.
const LAST_WORDS: u64 = 64 << 10;

/// The longest message; the rest of it is cut off.
const MAX_MESSAGE: usize = 8 << 10;

/// How much an entry matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = BuildLogLevel)]
pub enum LogLevel {
    /// What the builder does beside the steps.
    Debug,
    /// Steps, and what their commands print.
    Info,
    /// Doubtful.
    Warn,
    /// The end.
    Error,
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = BuildLogEntry)]
pub struct LogEntry {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub timestamp: Timestamp,
    /// What.
    pub message: String,
    /// How much it matters.
    pub level: LogLevel,
    /// `base`, the number of the step from 1, or `finalize`, where it is of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub step: Option<String>,
}

impl LogEntry {
    /// An entry of now, without what acts on a terminal, and cut.
    pub fn new(level: LogLevel, message: &str) -> Self {
        let now = Timestamp::now();
        let timestamp = Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now);
        Self { timestamp, message: printable(message), level, step: None }
    }
}

/// A log that is being written. Reads and writes may come from several tasks.
#[derive(Debug)]
pub(crate) struct BuildLog(Mutex<Open>);

#[derive(Debug)]
struct Open {
    file: File,
    /// Where each entry begins, and after the last one where the next will.
    begins: Vec<u64>,
    dropped: u64,
}

impl BuildLog {
    /// Opens the log to go on with it. A last line that was cut off is taken away.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        let begins = index(&mut file)?;
        file.set_len(*begins.last().unwrap_or(&0))?;
        Ok(Self(Mutex::new(Open { file, begins, dropped: 0 })))
    }

    /// Adds an entry. A disk that is full costs the entry and not the build.
    pub(crate) fn add(&self, entry: &LogEntry) {
        self.lock().add(entry, MAX_LOG - LAST_WORDS);
    }

    /// Adds the entry that tells the end, and before it how much was not kept.
    pub(crate) fn end(&self, entry: &LogEntry) {
        let mut open = self.lock();
        if open.dropped > 0 {
            let words = format!("{} more entries were not kept: the log is full", open.dropped);
            open.add(&LogEntry::new(LogLevel::Warn, &words), MAX_LOG);
        }
        open.add(entry, MAX_LOG);
    }

    /// As [`page`].
    pub(crate) fn page(&self, from: usize, limit: usize, least: LogLevel) -> io::Result<Vec<LogEntry>> {
        let mut open = self.lock();
        if least == LogLevel::Debug {
            let Some(&begin) = open.begins.get(from) else { return Ok(Vec::new()) };
            open.file.seek(SeekFrom::Start(begin))?;
            return entries((&mut open.file).take(MAX_LOG), 0, limit, least);
        }
        open.file.seek(SeekFrom::Start(0))?;
        entries((&mut open.file).take(MAX_LOG), from, limit, least)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn add(&mut self, entry: &LogEntry, limit: u64) {
        let end = *self.begins.last().unwrap_or(&0);
        let Ok(mut line) = serde_json::to_vec(entry) else { return };
        line.push(b'\n');
        let next = end + line.len() as u64;
        let written = next <= limit
            && self.file.seek(SeekFrom::Start(end)).and_then(|_| self.file.write_all(&line)).is_ok();
        match written {
            true => self.begins.push(next),
            false => self.dropped += 1,
        }
    }
}

/// Entries of the log in a file, from that number on: those of the level and above, counted among themselves. A file that is
/// not there is empty.
pub(crate) fn page(path: &Path, from: usize, limit: usize, least: LogLevel) -> io::Result<Vec<LogEntry>> {
    match File::open(path) {
        Ok(file) => entries(file.take(MAX_LOG), from, limit, least),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The end of the log in a file.
pub(crate) fn tail(path: &Path, count: usize) -> io::Result<Vec<LogEntry>> {
    let all = page(path, 0, usize::MAX, LogLevel::Debug)?;
    Ok(all.into_iter().rev().take(count).rev().collect())
}

fn entries(file: impl Read, from: usize, limit: usize, least: LogLevel) -> io::Result<Vec<LogEntry>> {
    let mut found = Vec::new();
    let mut skipped = 0;
    for line in BufReader::new(file).split(b'\n') {
        if found.len() >= limit {
            break;
        }
        // A line that is cut off is not there yet.
        let Ok(entry) = serde_json::from_slice::<LogEntry>(&line?) else { break };
        if entry.level < least {
            continue;
        }
        if skipped < from {
            skipped += 1;
            continue;
        }
        found.push(entry);
    }
    Ok(found)
}

/// Where each whole entry begins, and the end of the last.
fn index(file: &mut File) -> io::Result<Vec<u64>> {
    let mut begins = vec![0];
    let mut end = 0;
    let mut reader = BufReader::new(file.take(MAX_LOG));
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        let whole = line.ends_with(b"\n") && serde_json::from_slice::<LogEntry>(&line).is_ok();
        if length == 0 || !whole {
            return Ok(begins);
        }
        end += length as u64;
        begins.push(end);
    }
}

/// Somebody else's text, without what acts on a terminal, and cut.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        // A control sequence (ECMA-48, 5.4) ends with its first byte from @ on.
        if character == '\x1b' {
            if characters.next() == Some('[') {
                let _ = characters.find(|c| ('@'..='~').contains(c));
            }
            continue;
        }
        if character.is_control() && !matches!(character, '\t' | '\n') {
            continue;
        }
        if out.len() + character.len_utf8() > MAX_MESSAGE {
            break;
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(log: &BuildLog, level: LogLevel, message: &str) {
        log.add(&LogEntry::new(level, message));
    }

    fn messages(entries: io::Result<Vec<LogEntry>>) -> Vec<String> {
        entries.unwrap().into_iter().map(|entry| entry.message).collect()
    }

    #[test]
    fn an_offset_means_the_same_entry_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert!(page(&path, 0, 9, LogLevel::Debug).unwrap().is_empty());
        let log = BuildLog::open(&path).unwrap();
        for number in 0..5 {
            say(&log, if number % 2 == 0 { LogLevel::Info } else { LogLevel::Debug }, &number.to_string());
        }
        for read in [&|from, limit, least| log.page(from, limit, least), &|from, limit, least| {
            page(&path, from, limit, least)
        }] as [&dyn Fn(usize, usize, LogLevel) -> io::Result<Vec<LogEntry>>; 2]
        {
            assert_eq!(messages(read(0, 2, LogLevel::Debug)), ["0", "1"]);
            assert_eq!(messages(read(3, 9, LogLevel::Debug)), ["3", "4"]);
            assert!(messages(read(5, 9, LogLevel::Debug)).is_empty());
            assert!(messages(read(usize::MAX, 9, LogLevel::Debug)).is_empty());
            assert_eq!(messages(read(1, 9, LogLevel::Info)), ["2", "4"]);
        }
        drop(log);
        // Killed in the midst of a line.
        File::options().append(true).open(&path).unwrap().write_all(b"{\"timestamp\":").unwrap();
        assert_eq!(messages(page(&path, 4, 9, LogLevel::Debug)), ["4"]);
        let log = BuildLog::open(&path).unwrap();
        say(&log, LogLevel::Info, "again");
        assert_eq!(messages(page(&path, 4, 9, LogLevel::Debug)), ["4", "again"]);
        assert_eq!(messages(tail(&path, 1)), ["again"]);
    }

    #[test]
    fn a_flood_is_bounded_and_the_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = BuildLog::open(&path).unwrap();
        let long = "x".repeat(3 * MAX_MESSAGE);
        for _ in 0..(MAX_LOG / MAX_MESSAGE as u64 + 10) {
            say(&log, LogLevel::Info, &long);
        }
        log.end(&LogEntry::new(LogLevel::Error, "the end"));
        assert!(path.metadata().unwrap().len() <= MAX_LOG);
        let last = messages(tail(&path, 2));
        assert!(last[0].ends_with("more entries were not kept: the log is full"), "{last:?}");
        assert_eq!(last[1], "the end");
    }

    #[test]
    fn what_acts_on_a_terminal_is_left_out() {
        assert_eq!(printable("\x1b[1;31mred\x1b[0m\x07 and\tplain\r"), "red and\tplain");
        assert_eq!(printable("\x1b"), "");
    }
}
