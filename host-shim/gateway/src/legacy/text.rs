//! Bytes of processes as the strings of JSON: whole lines, and whole characters.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The longest line that is told in one piece. A longer one is told as several.
const MAX_LINE: usize = 1 << 20;

/// Unfinished lines of all processes of a sandbox together: what the tenant can make the gateway hold.
const MAX_UNFINISHED: usize = 8 << 20;

/// What the unfinished lines of a sandbox hold together.
#[derive(Debug, Default)]
pub(super) struct Unfinished(AtomicUsize);

/// Cuts a stream into lines.
#[derive(Debug)]
pub(super) struct Lines {
    line: Vec<u8>,
    shared: Arc<Unfinished>,
}

impl Lines {
    /// The lines of one stream.
    pub(super) fn new(shared: Arc<Unfinished>) -> Self {
        Self { line: Vec::new(), shared }
    }

    /// Takes bytes; gives the lines that they finish, without their ends.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut parts = bytes.split(|byte| *byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            let is_whole = parts.peek().is_some();
            if !is_whole && part.is_empty() {
                break;
            }
            let before = self.shared.0.fetch_add(part.len(), Ordering::Relaxed);
            self.line.extend_from_slice(part);
            if is_whole {
                lines.push(self.take(self.line.len()));
            } else if self.line.len() >= MAX_LINE || before + part.len() > MAX_UNFINISHED {
                lines.push(self.take(whole_characters(&self.line)));
            }
        }
        lines
    }

    /// The last line, where the stream did not end with one's end.
    pub(super) fn finish(&mut self) -> Option<String> {
        (!self.line.is_empty()).then(|| self.take(self.line.len()))
    }

    fn take(&mut self, length: usize) -> String {
        let rest = self.line.split_off(length);
        let line = std::mem::replace(&mut self.line, rest);
        self.shared.0.fetch_sub(line.len(), Ordering::Relaxed);
        into_text(line)
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.shared.0.fetch_sub(self.line.len(), Ordering::Relaxed);
    }
}

/// Keeps characters whole that arrive in pieces.
#[derive(Debug, Default)]
pub(super) struct Characters(Vec<u8>);

impl Characters {
    /// Takes bytes; gives the characters that are whole.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        self.0.extend_from_slice(bytes);
        let rest = self.0.split_off(whole_characters(&self.0));
        into_text(std::mem::replace(&mut self.0, rest))
    }

    /// What is left at the end.
    pub(super) fn finish(&mut self) -> String {
        into_text(std::mem::take(&mut self.0))
    }
}

/// What is no UTF-8 becomes U+FFFD, as in the JSON of the old server.
pub(super) fn into_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// The length without the beginning of a character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    /// The longest character in UTF-8.
    const MAX_CHARACTER: usize = 4;
    let tail = bytes.len().saturating_sub(MAX_CHARACTER - 1);
    // A character begins at the last byte that is no continuation.
    let Some(begin) = (tail..bytes.len()).rev().find(|index| bytes[*index] & 0xC0 != 0x80) else {
        return bytes.len();
    };
    match std::str::from_utf8(&bytes[begin..]) {
        Err(error) if error.error_len().is_none() => begin,
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_what_stands_between_their_ends() {
        let shared = Arc::new(Unfinished::default());
        let mut lines = Lines::new(Arc::clone(&shared));
        assert_eq!(lines.push(b"a\n\nb\r\n"), ["a", "", "b\r"]);
        assert!(lines.push(b"\xc3").is_empty() && lines.push(b"\xa9").is_empty());
        assert_eq!(shared.0.load(Ordering::Relaxed), 2);
        assert_eq!(lines.push(b"\xff\nend"), ["é\u{fffd}"]);
        assert_eq!(lines.finish().as_deref(), Some("end"));
        assert_eq!(lines.finish(), None);
        assert!(lines.push(b"x").is_empty());
        drop(lines);
        assert_eq!(shared.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let shared = Arc::new(Unfinished::default());
        let mut lines = Lines::new(Arc::clone(&shared));
        let piece = vec![b'x'; 32 << 10];
        let told: usize = (0..64).flat_map(|_| lines.push(&piece)).map(|line| line.len()).sum();
        assert_eq!(told, 2 * MAX_LINE);
        let mut others: Vec<Lines> = (0..100).map(|_| Lines::new(Arc::clone(&shared))).collect();
        for _ in 0..16 {
            others.iter_mut().for_each(|lines| drop(lines.push(&piece)));
            let held = shared.0.load(Ordering::Relaxed);
            assert!(held <= MAX_UNFINISHED, "{held}");
        }
        drop(others);
        assert_eq!(shared.0.load(Ordering::Relaxed), lines.line.len());
    }

    proptest! {
        #[test]
        fn pieces_make_the_same_text(text in "\\PC{0,40}", cuts in prop::collection::vec(0usize..200, 0..6)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut characters = Characters::default();
            let mut seen = String::new();
            for pair in cuts.windows(2) {
                seen += &characters.push(&bytes[pair[0]..pair[1]]);
            }
            seen += &characters.finish();
            prop_assert_eq!(seen, text);
        }

        #[test]
        fn any_bytes_are_some_lines(chunks in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..20), 0..8)) {
            let shared = Arc::new(Unfinished::default());
            let mut lines = Lines::new(Arc::clone(&shared));
            let mut seen: Vec<String> = chunks.iter().flat_map(|chunk| lines.push(chunk)).collect();
            seen.extend(lines.finish());
            let all = chunks.concat();
            let mut expected: Vec<String> = all.split(|byte| *byte == b'\n').map(|line| into_text(line.to_vec())).collect();
            if expected.last().is_some_and(String::is_empty) {
                expected.pop();
            }
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(shared.0.load(Ordering::Relaxed), 0);
        }
    }
}
