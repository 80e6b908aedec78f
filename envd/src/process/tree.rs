//! Signals to all that a process has started.
//!
//! ```text
//! SIGKILL: stop what is found, look again until nothing new is found, then kill all    (what is stopped starts nothing)
//! others:  signal what is found, look again until nothing new is found
//! ```
//!
//! A process is known by its pid and its start time together, and a signal goes through a pidfd that was opened and then
//! checked against them: a pid that was given out again in between is nobody's.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;

use envd_sys::{SignalNumber, signal_process};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Looks at the most: a tree that grows faster than it can be signalled is given up (only a cgroup holds such a one).
const MAX_ROUNDS: usize = 100;

/// One process, also after its pid is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) pid: i32,
    /// In clock ticks since the boot.
    start: u64,
}

/// What /proc says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) identity: Identity,
    parent: i32,
    group: i32,
    /// The pid of the session's leader, which every process of the table is.
    pub(super) session: i32,
}

impl Stat {
    /// Reads /proc/PID/stat.
    pub(super) fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    /// proc(5): `pid (comm) state ppid pgrp session ... starttime`, where comm can hold anything, also parentheses.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (pid, _) = text.split_once(' ')?;
        let (_, rest) = text.rsplit_once(") ")?;
        let mut fields = rest.split_ascii_whitespace();
        let mut number = |skip| fields.nth(skip)?.parse::<u64>().ok();
        let (parent, group, session) = (number(1)?, number(0)?, number(0)?);
        let start = number(15)?;
        let pid_number = |number: u64| i32::try_from(number).ok();
        Some(Self {
            identity: Identity { pid: pid.parse().ok()?, start },
            parent: pid_number(parent)?,
            group: pid_number(group)?,
            session: pid_number(session)?,
        })
    }
}

/// Signals a process, its session, its group, and all that descends from them. `pid` is its pid as the agent sees it.
pub(super) fn signal_tree(pid: i32, signal: SignalNumber) -> io::Result<()> {
    let mut known = HashSet::new();
    sweep(signal, || {
        let all = everybody()?;
        Ok(extend(pid, &all, &mut known))
    })
}

/// Signals all that `find` finds, until it finds nothing new. `find` gives each process once.
pub(super) fn sweep(
    signal: SignalNumber,
    mut find: impl FnMut() -> io::Result<Vec<Identity>>,
) -> io::Result<()> {
    let first = if signal == SignalNumber::KILL { SignalNumber::STOP } else { signal };
    let mut found = Vec::new();
    let mut failed = None;
    for _ in 0..MAX_ROUNDS {
        let new = match find() {
            Ok(new) if new.is_empty() => break,
            Ok(new) => new,
            Err(error) => {
                failed = Some(error);
                break;
            }
        };
        for process in &new {
            failed = deliver(*process, first).err().or(failed);
        }
        found.extend(new);
    }
    if first != signal {
        for process in found {
            failed = deliver(process, signal).err().or(failed);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// Adds to `known` what belongs to the tree; gives what is new.
fn extend(root: i32, all: &[Stat], known: &mut HashSet<Identity>) -> Vec<Identity> {
    let by_pid: HashMap<i32, Identity> = all.iter().map(|stat| (stat.identity.pid, stat.identity)).collect();
    let mut new = Vec::new();
    loop {
        let before = new.len();
        for stat in all {
            let is_child = by_pid.get(&stat.parent).is_some_and(|parent| known.contains(parent));
            let belongs = stat.identity.pid == root || stat.session == root || stat.group == root || is_child;
            if belongs && known.insert(stat.identity) {
                new.push(stat.identity);
            }
        }
        if new.len() == before {
            return new;
        }
    }
}

fn everybody() -> io::Result<Vec<Stat>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok());
        // One that has ended in the meantime is no error.
        all.extend(pid.and_then(Stat::read));
    }
    Ok(all)
}

fn deliver(process: Identity, signal: SignalNumber) -> io::Result<()> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(()) };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        pidfd => pidfd?,
    };
    if Stat::read(process.pid).is_none_or(|stat| stat.identity != process) {
        return Ok(());
    }
    match signal_process(pidfd.as_fd(), signal) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
        sent => sent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: i32, parent: i32, group: i32, session: i32) -> Stat {
        Stat { identity: Identity { pid, start: 1 }, parent, group, session }
    }

    #[test]
    fn a_stat_is_read_whatever_the_program_is_called() {
        let line = |comm: &str| {
            format!("42 ({comm}) S 7 42 41 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 9876 2560000 200 1844 1 1\n")
        };
        let expected =
            Stat { identity: Identity { pid: 42, start: 9876 }, parent: 7, group: 42, session: 41 };
        for comm in ["sh", "a b", ") S 1 1 1", "(((", "\u{fffd}"] {
            assert_eq!(Stat::parse(line(comm).as_bytes()), Some(expected), "{comm}");
        }
        for broken in ["", "42", "42 (sh)", "42 (sh) S 7", "x (sh) S 7 42 41"] {
            assert_eq!(Stat::parse(broken.as_bytes()), None, "{broken}");
        }
        let own = Stat::read(std::process::id() as i32).unwrap();
        assert_eq!(own.identity.pid, std::process::id() as i32);
    }

    #[test]
    fn a_tree_is_its_session_its_group_and_their_children() {
        let all = [
            stat(1, 0, 1, 1),
            // A grandchild that comes before its parent, in a session of its own.
            stat(9, 12, 9, 9),
            stat(10, 1, 10, 10),
            stat(11, 10, 11, 10),
            stat(12, 11, 12, 12),
            // An orphan of the session.
            stat(13, 1, 13, 10),
            stat(20, 1, 20, 20),
        ];
        let mut known = HashSet::new();
        let mut pids: Vec<_> = extend(10, &all, &mut known).iter().map(|identity| identity.pid).collect();
        pids.sort_unstable();
        assert_eq!(pids, [9, 10, 11, 12, 13]);
        assert!(extend(10, &all, &mut known).is_empty());
        // A process whose pid was that of a member before is none.
        let mut reused = all;
        reused[1].identity.start = 2;
        reused[1].parent = 1;
        assert!(extend(10, &reused, &mut known).is_empty());
    }
}
