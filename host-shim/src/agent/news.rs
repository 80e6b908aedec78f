//! What the agent tells without being asked: lines of its log and events, written into the shim's log.

use std::time::{Duration, Instant};

use envd_proto::control::{Event, LogLine, event};

use super::printable;

/// Lines and events that are written in each [`WINDOW`]; root in the guest could send them without end.
const MAX_IN_WINDOW: u32 = 200;

const WINDOW: Duration = Duration::from_secs(1);

/// Fields of a line; the agent's have a handful.
const MAX_FIELDS: usize = 16;

/// Writes news down, and counts what is too much.
#[derive(Debug, Default)]
pub(super) struct News {
    since: Option<Instant>,
    said: u32,
    dropped: u64,
}

impl News {
    pub(super) fn log(&mut self, line: &LogLine) {
        if !self.has_room(Instant::now()) {
            return;
        }
        let mut text = printable(&line.message);
        for (name, value) in line.fields.iter().take(MAX_FIELDS) {
            text.push_str(&format!(" {}={:?}", printable(name), printable(value)));
        }
        let suppressed = line.suppressed;
        match line.level.as_str() {
            "error" => tracing::error!(target: "agent", suppressed, "{text}"),
            "warn" => tracing::warn!(target: "agent", suppressed, "{text}"),
            _ => tracing::info!(target: "agent", suppressed, "{text}"),
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        // A newer agent's event has no kind that is known here.
        let Some(event) = event.event else { return };
        if !self.has_room(Instant::now()) {
            return;
        }
        match event {
            event::Event::OutOfMemory(oom) => {
                let (name, pid, tag) = (printable(&oom.name), oom.pid, oom.tag.as_deref().map(printable));
                tracing::warn!(name, pid, tag, "a process was killed because memory ran out");
            }
            event::Event::PortOpened(port) => {
                tracing::info!(address = printable(&port.address), port = port.port, "a port was opened");
            }
            event::Event::PortClosed(port) => {
                tracing::info!(address = printable(&port.address), port = port.port, "a port was closed");
            }
            event::Event::SpawnerRestarted(_) => tracing::warn!("the sandbox's spawner was made again"),
            event::Event::Lost(lost) => tracing::warn!(lost, "events of the agent were lost"),
        }
    }

    fn has_room(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= WINDOW) {
            if self.dropped > 0 {
                tracing::warn!(dropped = self.dropped, "the agent said more than is written down");
            }
            *self = Self { since: Some(now), said: 0, dropped: 0 };
        }
        if self.said == MAX_IN_WINDOW {
            self.dropped += 1;
            return false;
        }
        self.said += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_not_written() {
        let mut news = News::default();
        let start = Instant::now();
        assert_eq!((0..1000).filter(|_| news.has_room(start)).count(), MAX_IN_WINDOW as usize);
        assert_eq!(news.dropped, 1000 - u64::from(MAX_IN_WINDOW));
        assert!(news.has_room(start + WINDOW));
        assert_eq!((news.said, news.dropped), (1, 0));
    }
}
