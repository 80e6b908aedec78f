//! The events of a process, as its clients get them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envd_proto::process::ProcessEvent;
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, KeepAlive, StartEvent, data_event};
use futures::Stream as FuturesStream;
use tokio::time::Instant;

use super::log::{End, Item, Reader, Stream};
use super::process::Process;
use crate::connect::Error;

/// What a client sees of a process, and how long.
pub(super) struct View {
    pub(super) process: Arc<Process>,
    pub(super) reader: Reader,
    /// Its first event.
    pub(super) start: StartEvent,
    /// How often it wants to hear from a quiet process.
    pub(super) keepalive: Duration,
    /// When this call ends, whether the process has ended or not.
    pub(super) deadline: Option<Instant>,
}

enum Phase {
    Start,
    Running,
    Over,
}

/// The start of the process, its output, its end.
pub(super) fn events(view: View) -> impl FuturesStream<Item = Result<ProcessEvent, Error>> + Send + 'static {
    futures::stream::unfold((view, Phase::Start), |(mut view, phase)| async move {
        let (result, phase) = match phase {
            Phase::Start => (Ok(Event::Start(view.start)), Phase::Running),
            Phase::Running => next(&mut view).await,
            Phase::Over => return None,
        };
        Some((result.map(|event| ProcessEvent { event: Some(event) }), (view, phase)))
    })
}

async fn next(View { process, reader, keepalive, deadline, .. }: &mut View) -> (Result<Event, Error>, Phase) {
    let quiet = Instant::now() + *keepalive;
    let (until, overdue) = match *deadline {
        Some(deadline) if deadline <= quiet => (deadline, true),
        _ => (quiet, false),
    };
    // A process that always has more would never let the timer have its turn.
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return (Err(Error::deadline()), Phase::Over);
    }
    match tokio::time::timeout_at(until, reader.next()).await {
        Ok(Item::Data { stream, bytes, dropped }) => (Ok(data(stream, bytes, dropped)), Phase::Running),
        Ok(Item::End(_)) if process.is_overdue() => (Err(Error::deadline()), Phase::Over),
        Ok(Item::End(end)) => (Ok(Event::End(end_event(end, process.is_out_of_memory()))), Phase::Over),
        Err(_) if overdue => (Err(Error::deadline()), Phase::Over),
        Err(_) => (Ok(Event::Keepalive(KeepAlive {})), Phase::Running),
    }
}

fn data(stream: Stream, bytes: Bytes, dropped_bytes: u64) -> Event {
    let output = match stream {
        Stream::Stdout => data_event::Output::Stdout(bytes),
        Stream::Stderr => data_event::Output::Stderr(bytes),
        Stream::Pty => data_event::Output::Pty(bytes),
    };
    Event::Data(DataEvent { output: Some(output), dropped_bytes })
}

/// The end of a process in the words of Go's `os.ProcessState`, which the clients know.
fn end_event(end: End, oom_killed: bool) -> EndEvent {
    let (exit_code, exited, status) = match end {
        End::Exited(code) => (code, true, format!("exit status {code}")),
        End::Signalled(signal) => (-1, false, format!("signal: {}", signal_name(signal))),
        End::Unknown => (-1, false, "unknown: the sandbox's spawner died before it told".to_owned()),
    };
    let error = match end {
        End::Exited(0) => None,
        End::Signalled(9) if oom_killed => Some(format!("{status} (out of memory)")),
        _ => Some(status.clone()),
    };
    EndEvent { exit_code, exited, status, error, oom_killed }
}

/// Go's names of the signals; the real-time ones by number, as Go does.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        16 => "stack fault",
        17 => "child exited",
        18 => "continued",
        19 => "stopped (signal)",
        20 => "stopped",
        21 => "stopped (tty input)",
        22 => "stopped (tty output)",
        23 => "urgent I/O condition",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        26 => "virtual timer expired",
        27 => "profiling timer expired",
        28 => "window changed",
        29 => "I/O possible",
        30 => "power failure",
        31 => "bad system call",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_gos_words() {
        let told = |end, oom| {
            let event = end_event(end, oom);
            (event.exit_code, event.exited, event.status, event.error)
        };
        let killed = || "signal: killed".to_owned();
        assert_eq!(told(End::Exited(0), false), (0, true, "exit status 0".into(), None));
        assert_eq!(
            told(End::Exited(3), false),
            (3, true, "exit status 3".into(), Some("exit status 3".into()))
        );
        assert_eq!(told(End::Signalled(9), false), (-1, false, killed(), Some(killed())));
        let out_of_memory = Some("signal: killed (out of memory)".into());
        assert_eq!(told(End::Signalled(9), true), (-1, false, killed(), out_of_memory));
        assert_eq!(signal_name(40), "signal 40");
    }
}
