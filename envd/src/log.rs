//! What the agent itself has to say: JSON lines on standard error (the machine's console) and, for its host, a ring.
//!
//! ```text
//! warn(..) ──► bucket ──► line, escaped, cut ──► stderr
//!                │                          └──► ring of the last lines ──► control door, also for a host that comes later
//!                └ too many: counted, and the count is told with the next line
//! ```
//!
//! Everything is bounded, since a tenant can make most of what is logged happen as often as it likes.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envd_proto::limits::MAX_LOG_LINE;
use serde_json::{Map, Value};
use tokio::sync::Notify;

/// Lines that wait for a host.
const RING: usize = 128;

/// Lines that may come at once.
const BURST: u32 = 64;

/// One more may come after each of these.
const REFILL: Duration = Duration::from_millis(100);

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Something that whoever looks for a cause wants to know.
    Info,
    /// Something that went wrong and that the agent can live with.
    Warn,
    /// Something that ends the agent, or a sandbox's use.
    Error,
}

impl Level {
    /// Its name in the line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Something worth knowing.
pub(crate) fn info(text: fmt::Arguments<'_>, fields: &[(&str, &str)]) {
    LOG.record(Level::Info, &text.to_string(), fields);
}

/// Something that went wrong and that the agent can live with.
pub(crate) fn warn(text: fmt::Arguments<'_>) {
    LOG.record(Level::Warn, &text.to_string(), &[]);
}

/// Something that ends the agent, or a sandbox's use.
pub(crate) fn error(text: fmt::Arguments<'_>) {
    LOG.record(Level::Error, &text.to_string(), &[]);
}

/// The agent's log.
pub(crate) static LOG: Log = Log::new();

/// A line for the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) number: u64,
    pub(crate) time: SystemTime,
    pub(crate) level: Level,
    pub(crate) message: String,
    pub(crate) fields: BTreeMap<String, String>,
    pub(crate) suppressed: u64,
}

/// A bounded log.
#[derive(Debug)]
pub(crate) struct Log {
    state: Mutex<State>,
    added: Notify,
}

#[derive(Debug)]
struct State {
    ring: VecDeque<Line>,
    next: u64,
    bucket: Bucket,
}

impl Log {
    const fn new() -> Self {
        let bucket = Bucket { left: BURST, since: None, suppressed: 0 };
        let state = State { ring: VecDeque::new(), next: 1, bucket };
        Self { state: Mutex::new(state), added: Notify::const_new() }
    }

    /// The first line in the ring with this number or a later one.
    pub(crate) fn from(&self, number: u64) -> Option<Line> {
        self.lock().ring.iter().find(|line| line.number >= number).cloned()
    }

    /// Waits for a line that [`Log::from`] gives.
    pub(crate) async fn wait_from(&self, number: u64) -> Line {
        loop {
            let added = self.added.notified();
            tokio::pin!(added);
            // Registered before the look, so that a line in between is not missed.
            added.as_mut().enable();
            if let Some(line) = self.from(number) {
                return line;
            }
            added.await;
        }
    }

    fn record(&self, level: Level, message: &str, fields: &[(&str, &str)]) {
        let mut state = self.lock();
        let Some(suppressed) = state.bucket.take(Instant::now()) else { return };
        let mut room = MAX_LOG_LINE;
        let message = cut(message, &mut room);
        let fields = fields.iter().map(|(name, value)| ((*name).to_owned(), cut(value, &mut room))).collect();
        let line = Line { number: state.next, time: SystemTime::now(), level, message, fields, suppressed };
        state.next += 1;
        let text = line.json();
        if state.ring.len() == RING {
            state.ring.pop_front();
        }
        state.ring.push_back(line);
        drop(state);
        // A console that is gone is no reason to end.
        let _ = std::io::stderr().write_all(text.as_bytes());
        self.added.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// The line with its newline. Whatever the text is, it acts on no terminal and ends no line.
    fn json(&self) -> String {
        let mut object = Map::new();
        object.insert("ts".into(), timestamp(self.time).into());
        object.insert("level".into(), self.level.name().into());
        object.insert("message".into(), self.message.as_str().into());
        for (name, value) in &self.fields {
            object.entry(name.as_str()).or_insert_with(|| value.as_str().into());
        }
        if self.suppressed > 0 {
            object.insert("suppressed".into(), self.suppressed.into());
        }
        let mut out = String::new();
        for character in Value::Object(object).to_string().chars() {
            match acts_on_terminals(character) {
                true => out.push_str(&format!("\\u{:04x}", u32::from(character))),
                false => out.push(character),
            }
        }
        out.push('\n');
        out
    }
}

/// What JSON lets stand unescaped and a terminal takes for a command: C1 controls and changes of direction.
fn acts_on_terminals(character: char) -> bool {
    matches!(character, '\u{7f}'..='\u{9f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// As much of a text as there is room for.
fn cut(text: &str, room: &mut usize) -> String {
    let mut end = text.len().min(*room);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    *room -= end;
    if end == text.len() { text.to_owned() } else { format!("{}…", &text[..end]) }
}

/// RFC 3339 in UTC, to the millisecond.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years of 365.2425 days that begin in March (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// A token bucket that counts what it turned away.
#[derive(Debug)]
struct Bucket {
    left: u32,
    since: Option<Instant>,
    suppressed: u64,
}

impl Bucket {
    /// Whether a line may be said now: how many were not, before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_nanos() / REFILL.as_nanos();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(BURST);
            // What is left of the interval counts for the next line, but not beyond a full bucket.
            self.since = Some(if self.left == BURST { now } else { since + REFILL * earned });
        }
        if self.left == 0 {
            self.suppressed += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str, fields: &[(&str, &str)]) -> Line {
        let log = Log::new();
        log.record(Level::Warn, message, fields);
        log.from(1).unwrap()
    }

    #[test]
    fn a_tenants_text_is_one_line_of_json_that_acts_on_no_terminal() {
        let text = line("a\n\x1b[2J\u{9b}31m\u{202e}\"", &[("message", "taken"), ("name", "x\u{7f}")]).json();
        assert_eq!(text.matches('\n').count(), 1);
        assert!(text.bytes().all(|byte| byte == b'\n' || (b' '..0x7f).contains(&byte)), "{text:?}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["message"], "a\n\x1b[2J\u{9b}31m\u{202e}\"");
        assert_eq!((&value["level"], &value["name"]), (&"warn".into(), &"x\u{7f}".into()));
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let long = line(&"ä".repeat(10_000), &[("field", "gone")]);
        assert!(long.message.len() <= MAX_LOG_LINE + '…'.len_utf8());
        assert!(long.message.ends_with("ä…"));
        assert_eq!(long.fields["field"], "…");
    }

    #[test]
    fn too_many_lines_are_counted_and_the_ring_keeps_the_last() {
        let mut bucket = Bucket { left: BURST, since: None, suppressed: 0 };
        let start = Instant::now();
        let said = (0..1000).filter(|_| bucket.take(start).is_some()).count();
        assert_eq!(said, BURST as usize);
        assert_eq!(bucket.take(start + REFILL), Some(1000 - u64::from(BURST)));
        assert_eq!(bucket.take(start + REFILL), None);
        assert_eq!(bucket.take(start + REFILL * 1000), Some(1));
        assert_eq!(bucket.left, BURST - 1);

        let log = Log::new();
        for n in 0..RING + 10 {
            log.lock().bucket.left = BURST;
            log.record(Level::Info, &n.to_string(), &[]);
        }
        let first = log.from(1).unwrap();
        assert_eq!((first.number, first.message.as_str()), (11, "10"));
        assert_eq!(log.from(RING as u64 + 11), None);
    }

    #[test]
    fn times_are_as_date_gives_them() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[tokio::test]
    async fn a_line_wakes_whoever_waits() {
        static LOG: Log = Log::new();
        let waiting = tokio::spawn(LOG.wait_from(1));
        tokio::task::yield_now().await;
        LOG.record(Level::Info, "hello", &[]);
        assert_eq!(waiting.await.unwrap().message, "hello");
    }
}
