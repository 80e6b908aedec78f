//! What the user sees meanwhile, on stderr: bars on a terminal, plain lines elsewhere, or one JSON object a line.
//!
//! ```text
//! {"type":"step","time":"2026-01-01T00:00:00.000Z","step":"[run 2/5]","status":"started","message":"RUN make"}
//! {"type":"output","time":..,"step":"[run 2/5]","message":"cc -c main.c"}
//! {"type":"work","time":..,"id":7,"status":"running","message":"unpacking layer 1 of 2","done":4096,"total":8192}
//! {"type":"message","time":..,"message":"warning: .."}        {"type":"error","time":..,"message":".."}
//! ```
//!
//! Several threads may tell at once: lines are whole, and those of a step stand behind its mark.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::clock;

/// The longest line of a command's output that is shown as one; a longer one is cut into several.
const MAX_LINE: u64 = 16 << 10;
/// How much of a command's output an error repeats.
const LAST_LINES: usize = 5;
/// How often a piece of work says in JSON how far it is: often enough for a bar, and not a line for each block.
const WORK_PERIOD: Duration = Duration::from_millis(250);
/// How often a bar without a length moves.
const TICK: Duration = Duration::from_millis(200);

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProgressMode {
    /// Bars on a terminal, lines elsewhere.
    #[default]
    Auto,
    /// Lines.
    Plain,
    /// Bars; lines where stderr is no terminal.
    Tty,
    /// A JSON object a line.
    Json,
    /// Nothing but errors.
    Quiet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Bars,
    Lines,
    Json,
    Nothing,
}

/// Where progress goes.
#[derive(Clone, Debug)]
pub struct Console {
    shown: Shown,
    bars: MultiProgress,
    /// Numbers of pieces of work.
    works: Arc<AtomicU64>,
}

/// A long piece of work.
pub(crate) struct Work {
    bar: ProgressBar,
    told: Option<Told>,
}

/// What a piece of work says in JSON.
struct Told {
    console: Console,
    id: u64,
    what: String,
    total: Option<u64>,
    started: Instant,
    /// When it last said something, in milliseconds after `started`.
    last: AtomicU64,
}

/// What happens to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepStatus {
    Started,
    Cached,
    /// Another stage has the same step.
    Shared,
    Done,
    Failed,
}

impl Console {
    /// Progress on stderr; `quiet` shows nothing but errors.
    pub fn new(quiet: bool) -> Self {
        Self::with_progress(if quiet { ProgressMode::Quiet } else { ProgressMode::Auto })
    }

    /// Progress on stderr.
    pub fn with_progress(mode: ProgressMode) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let shown = match mode {
            ProgressMode::Auto | ProgressMode::Tty if terminal => Shown::Bars,
            ProgressMode::Auto | ProgressMode::Tty | ProgressMode::Plain => Shown::Lines,
            ProgressMode::Json => Shown::Json,
            ProgressMode::Quiet => Shown::Nothing,
        };
        let target = match shown {
            Shown::Bars => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        Self { shown, bars: MultiProgress::with_draw_target(target), works: Arc::default() }
    }

    /// One line.
    pub fn line(&self, text: &str) {
        match self.shown {
            Shown::Json => self.object("message", json!({"message": text})),
            _ => self.text(text),
        }
    }

    /// The error that ends the program; told whatever is shown.
    pub fn error(&self, text: &str) {
        match self.shown {
            Shown::Json => self.object("error", json!({"message": text})),
            Shown::Nothing => write_line(text),
            _ => self.text(text),
        }
    }

    /// What happens to a step; `mark` is its stage and number in brackets.
    pub(crate) fn step(&self, mark: &str, text: &str, status: StepStatus) {
        let status = match status {
            StepStatus::Started => "started",
            StepStatus::Cached => "cached",
            StepStatus::Shared => "shared",
            StepStatus::Done => "done",
            StepStatus::Failed => "failed",
        };
        match (self.shown, status) {
            (Shown::Json, _) => {
                self.object("step", json!({"step": mark, "status": status, "message": text}));
            }
            (_, "started") => self.text(&format!("{mark} {text}")),
            (_, "cached" | "shared") => self.text(&format!("{mark} {text} ({status})")),
            // The next step, or the error, says it.
            _ => {}
        }
    }

    /// Begins work on that many bytes, where the number is known.
    pub(crate) fn work(&self, what: &str, total: Option<u64>) -> Work {
        if self.shown == Shown::Lines {
            self.text(what);
        }
        let told = (self.shown == Shown::Json).then(|| Told {
            console: self.clone(),
            id: self.works.fetch_add(1, Ordering::Relaxed),
            what: what.to_owned(),
            total,
            started: Instant::now(),
            last: AtomicU64::new(0),
        });
        let (bar, template) = match total {
            Some(total) => {
                (ProgressBar::new(total), "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
            }
            None => (ProgressBar::no_length(), "{spinner} {msg} {elapsed}"),
        };
        let bar = match self.shown {
            Shown::Bars => self.bars.add(bar),
            _ => {
                bar.set_draw_target(ProgressDrawTarget::hidden());
                bar
            }
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        if total.is_none() && self.shown == Shown::Bars {
            bar.enable_steady_tick(TICK);
        }
        if let Some(told) = &told {
            told.tell("started", 0);
        }
        Work { bar, told }
    }

    /// Passes a command's output on, line by line, each behind the prefix, until it ends. Gives its last lines.
    pub(crate) fn stream(&self, prefix: &str, output: impl Read) -> Vec<String> {
        let mut last = VecDeque::with_capacity(LAST_LINES);
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        let step = prefix.trim_end_matches([' ', '|']);
        loop {
            line.clear();
            match (&mut output).take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return last.into(),
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line);
            // What a progress bar in the container overwrites is not worth a line.
            let text = text.trim_end_matches(['\n', '\r']);
            let text = text.rsplit('\r').next().unwrap_or_default();
            match self.shown {
                Shown::Json => self.object("output", json!({"step": step, "message": text})),
                _ => self.text(&format!("{prefix}{text}")),
            }
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(text.to_owned());
        }
    }

    fn text(&self, text: &str) {
        match self.shown {
            Shown::Nothing => {}
            // Above the bars. Without a bar nothing is drawn, and nothing would be printed.
            Shown::Bars => self.bars.suspend(|| write_line(text)),
            Shown::Lines | Shown::Json => write_line(text),
        }
    }

    fn object(&self, kind: &str, fields: Value) {
        let mut object = Map::from_iter([
            ("type".to_owned(), json!(kind)),
            ("time".to_owned(), json!(clock::rfc3339_millis(clock::system()))),
        ]);
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
        write_line(&Value::Object(object).to_string());
    }
}

/// In one call: the lines of another process do not stand inside ours.
fn write_line(text: &str) {
    // A closed stderr is no reason to stop a build.
    let _ = std::io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

impl Told {
    fn tell(&self, status: &str, done: u64) {
        let Self { id, what, total, .. } = self;
        self.console.object(
            "work",
            json!({"id": id, "status": status, "message": what, "done": done, "total": total}),
        );
    }

    fn advanced(&self, done: u64) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.last.load(Ordering::Relaxed);
        let due = now.saturating_sub(last) >= WORK_PERIOD.as_millis() as u64;
        // Of several threads one tells.
        if due && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.tell("running", done);
        }
    }
}

impl Work {
    pub(crate) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        if let Some(told) = &self.told {
            told.advanced(self.bar.position());
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(told) = &self.told {
            told.tell("done", self.bar.position());
        }
        self.bar.finish_and_clear();
    }
}

/// Counts what is read as progress.
pub(crate) struct Counted<'a, R> {
    pub(crate) inner: R,
    pub(crate) work: &'a Work,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.work.advance(count as u64);
        Ok(count)
    }
}
