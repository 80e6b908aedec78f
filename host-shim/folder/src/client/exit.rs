//! How a process ended.

use envd_proto::process::process_event::EndEvent;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl Exit {
    /// The code that a shell would show: 128 + n for signal n.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }

    pub(super) fn of(event: &EndEvent) -> Option<Self> {
        if event.exited {
            // wait(2) gives eight bits.
            return u8::try_from(event.exit_code & 0xff).ok().map(Self::Code);
        }
        let name = event.status.strip_prefix("signal: ")?;
        let name = name.strip_suffix(" (core dumped)").unwrap_or(name);
        // What is unknown still ended it: SIGKILL is what cannot be told apart from an end by the system.
        Some(Self::Signal(signal_number(name).unwrap_or(9)))
    }
}

/// The names that Go gives to signals, which is what the contract's status text is made of.
fn signal_number(name: &str) -> Option<u8> {
    const NAMES: [(&str, u8); 31] = [
        ("hangup", 1),
        ("interrupt", 2),
        ("quit", 3),
        ("illegal instruction", 4),
        ("trace/breakpoint trap", 5),
        ("aborted", 6),
        ("bus error", 7),
        ("floating point exception", 8),
        ("killed", 9),
        ("user defined signal 1", 10),
        ("segmentation fault", 11),
        ("user defined signal 2", 12),
        ("broken pipe", 13),
        ("alarm clock", 14),
        ("terminated", 15),
        ("stack fault", 16),
        ("child exited", 17),
        ("continued", 18),
        ("stopped (signal)", 19),
        ("stopped", 20),
        ("stopped (tty input)", 21),
        ("stopped (tty output)", 22),
        ("urgent I/O condition", 23),
        ("CPU time limit exceeded", 24),
        ("file size limit exceeded", 25),
        ("virtual timer expired", 26),
        ("profiling timer expired", 27),
        ("window changed", 28),
        ("I/O possible", 29),
        ("power failure", 30),
        ("bad system call", 31),
    ];
    match NAMES.iter().find(|known| known.0 == name) {
        Some(known) => Some(known.1),
        // "signal 34" for those without a name.
        None => name.strip_prefix("signal ")?.parse().ok().filter(|number| (1..=64).contains(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_signals_become_what_a_shell_shows() {
        let end = |exited, exit_code, status: &str| EndEvent {
            exited,
            exit_code,
            status: status.into(),
            ..EndEvent::default()
        };
        for (event, code) in [
            (end(true, 0, "exit status 0"), 0),
            (end(true, 255, ""), 255),
            (end(true, -1, ""), 255),
            (end(false, -1, "signal: killed"), 137),
            (end(false, -1, "signal: terminated"), 143),
            (end(false, -1, "signal: segmentation fault (core dumped)"), 139),
            (end(false, -1, "signal: bad system call"), 159),
            (end(false, -1, "signal: signal 34"), 162),
            (end(false, -1, "signal: \u{1b}novel"), 137),
        ] {
            assert_eq!(Exit::of(&event).map(Exit::code), Some(code), "{event:?}");
        }
        assert_eq!(Exit::of(&end(false, 0, "")), None);
    }
}
