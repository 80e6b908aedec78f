//! What the user sees meanwhile, on stderr: a bar on a terminal, plain lines elsewhere.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The longest line of a command's output that is shown as one; a longer one is cut into several.
const MAX_LINE: u64 = 16 << 10;

/// How much of a command's output an error repeats.
const LAST_LINES: usize = 5;

/// Where progress goes.
#[derive(Clone, Debug)]
pub struct Console {
    terminal: bool,
    quiet: bool,
}

/// A long piece of work.
pub(crate) struct Work {
    bar: ProgressBar,
}

impl Console {
    /// Progress on stderr; `quiet` shows nothing but errors.
    pub fn new(quiet: bool) -> Self {
        Self { terminal: std::io::stderr().is_terminal(), quiet }
    }

    /// One line.
    pub fn line(&self, text: &str) {
        if !self.quiet {
            // A closed stderr is no reason to stop a build.
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        }
    }

    /// Begins work on that many bytes, where the number is known.
    pub(crate) fn work(&self, what: &str, total: Option<u64>) -> Work {
        if !self.terminal && !self.quiet {
            self.line(what);
        }
        let target = match self.terminal && !self.quiet {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::with_draw_target(Some(total), target),
                "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
            ),
            None => (ProgressBar::with_draw_target(None, target), "{spinner} {msg} {elapsed}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        if total.is_none() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Work { bar }
    }

    /// Passes a command's output on, line by line, each behind the prefix, until it ends. Gives its last lines.
    pub(crate) fn stream(&self, prefix: &str, output: impl Read) -> Vec<String> {
        let mut last = VecDeque::with_capacity(LAST_LINES);
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
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
            self.line(&format!("{prefix}{text}"));
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(text.to_owned());
        }
    }
}

impl Work {
    pub(crate) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
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
