//! Who was killed because memory ran out, from the kernel's log.
//!
//! ```text
//! /dev/kmsg ──► records of the kernel itself ──► victim (name, pid) ──► marks the process of the table, tells the events
//! ```
//!
//! A process that ended by SIGKILL asks for what the log has by then before its end is told: the kernel chooses its
//! victim, and says so, before it kills.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use envd_sys::watch_readiness;
use rustix::fs::{Mode, OFlags, open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::table::ProcessTable;
use super::tree::Stat;
use crate::events::{Event, Events, OutOfMemory};

/// The longest record as /dev/kmsg gives it (`PRINTK_MESSAGE_MAX`, and more than 6.1's 8 KiB never fit).
const MAX_RECORD: usize = 8 << 10;

/// Records that a process's end waits for at the most: root in the container can write records as fast as they are read.
const CATCH_UP: usize = 4096;

/// Reads the kernel's log for a table.
#[derive(Debug)]
pub(super) struct KernelLog {
    file: AsyncFd<OwnedFd>,
    reader: Mutex<Reader>,
    events: Events,
}

#[derive(Debug, Default)]
struct Reader {
    /// A victim that was announced; its "Killed process" is no second one.
    announced: Option<i32>,
}

/// A process that the kernel chose.
#[derive(Debug, PartialEq, Eq)]
struct Victim {
    /// The pid outside of the container.
    pid: i32,
    name: String,
    /// Whether the record comes before the kill.
    announced: bool,
}

/// Watches the kernel's log from now on, for as long as the agent runs. Must be called within a tokio runtime.
pub fn watch(table: &ProcessTable, events: &Events) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(open("/dev/kmsg", flags, Mode::empty())?);
    // What was before this boot of ours concerns no process of the table.
    file.seek(SeekFrom::End(0))?;
    let log = Arc::new(KernelLog {
        file: watch_readiness(file.into(), Interest::READABLE)?,
        reader: Mutex::default(),
        events: events.clone(),
    });
    table.set_kernel_log(Arc::clone(&log));
    let table = table.clone();
    tokio::spawn(async move {
        while let Ok(mut ready) = log.file.readable().await {
            if log.catch_up(&table) {
                ready.clear_ready();
            } else {
                // The tenant's records must not keep this thread from the other tasks.
                tokio::task::yield_now().await;
            }
        }
    });
    Ok(())
}

impl KernelLog {
    /// Takes the records that are there now; false when there may be more.
    pub(super) fn catch_up(&self, table: &ProcessTable) -> bool {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = [0; MAX_RECORD];
        for _ in 0..CATCH_UP {
            match rustix::io::read(self.file.get_ref(), &mut record[..]) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    if let Some(victim) = parse(&text).and_then(|victim| reader.first_of(victim)) {
                        self.tell(table, &victim);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return true,
                // EPIPE: records were overwritten before they were read. The next read goes on with the oldest.
                Err(_) => {}
            }
        }
        false
    }

    fn tell(&self, table: &ProcessTable, victim: &Victim) {
        let session = Stat::read(victim.pid).map(|stat| stat.session);
        let process = table.mark_out_of_memory(victim.pid, session);
        // Another process of the tree than the one that a client knows has no pid that the client could name.
        let named = process.as_ref().filter(|(_, itself)| *itself).map(|(process, _)| process.pid());
        let tag = process.as_ref().and_then(|(process, _)| process.tag().map(str::to_owned));
        self.events.emit(Event::OutOfMemory(OutOfMemory { name: victim.name.clone(), pid: named, tag }));
    }
}

impl Reader {
    /// The victim, unless it was given for an earlier record.
    fn first_of(&mut self, victim: Victim) -> Option<Victim> {
        if !victim.announced && self.announced.take() == Some(victim.pid) {
            return None;
        }
        if victim.announced {
            self.announced = Some(victim.pid);
        }
        Some(victim)
    }
}

/// The victim of a record `priority,sequence,microseconds,flags;text`, if it is the kernel's own and names one.
///
/// The texts are those of `dump_oom_summary` and `__oom_kill_process` (mm/oom_kill.c). They begin in a way that no program's
/// name can imitate, which is at most 15 bytes; and only the kernel writes with facility 0.
fn parse(record: &str) -> Option<Victim> {
    let (prefix, text) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    if priority >> 3 != 0 {
        return None;
    }
    // What follows the first line is a dictionary.
    let line = text.lines().next()?;
    if let Some(summary) = line.strip_prefix("oom-kill:constraint=") {
        // From the right, since the names of cgroups and the program's can hold anything.
        let (rest, pid) = summary.rsplit_once(",pid=")?;
        let (_, name) = rest.rsplit_once(",task=")?;
        let pid = pid.split(',').next()?.parse().ok()?;
        return Some(Victim { pid, name: name.to_owned(), announced: true });
    }
    let killed = line
        .strip_prefix("Out of memory: Killed process ")
        .or_else(|| line.strip_prefix("Out of memory (oom_kill_allocating_task): Killed process "))
        .or_else(|| line.strip_prefix("Memory cgroup out of memory: Killed process "))?;
    let (pid, rest) = killed.split_once(" (")?;
    let (name, _) = rest.rsplit_once(") total-vm:").or_else(|| rest.rsplit_once("), "))?;
    Some(Victim { pid: pid.parse().ok()?, name: name.to_owned(), announced: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn victim(pid: i32, name: &str, announced: bool) -> Option<Victim> {
        Some(Victim { pid, name: name.into(), announced })
    }

    #[test]
    fn the_kernels_own_words_name_the_victim() {
        // As Linux 6.1 writes them.
        let global = "6,812,63542217,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,\
                      global_oom,task_memcg=/box/main/user,task=python3,pid=431,uid=1000\n";
        assert_eq!(parse(global), victim(431, "python3", true));
        let group = "6,1021,8123,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=main,mems_allowed=0,\
                     oom_memcg=/box,task_memcg=/box/main/user/x,pid=7,task=stress-ng-vm,pid=99,uid=0\n SUBSYSTEM=x\n";
        assert_eq!(parse(group), victim(99, "stress-ng-vm", true));
        let killed = "3,1022,8130,-;Memory cgroup out of memory: Killed process 99 (stress-ng-vm) total-vm:2133636kB, \
                      anon-rss:1024000kB, file-rss:4kB, shmem-rss:0kB, UID:0 pgtables:4100kB oom_score_adj:100\n";
        assert_eq!(parse(killed), victim(99, "stress-ng-vm", false));
        let killed = "3,815,63542260,-;Out of memory: Killed process 431 (a) b) total-vm:1kB, anon-rss:1kB";
        assert_eq!(parse(killed), victim(431, "a) b", false));
    }

    #[test]
    fn other_records_and_forged_ones_name_nobody() {
        let text = "Out of memory: Killed process 431 (sh) total-vm:1kB";
        for record in [
            // Facility 1: somebody wrote it to /dev/kmsg.
            &format!("11,1,1,-;{text}"),
            "14,1,1,-;oom-kill:constraint=X,task=sh,pid=431,uid=0",
            &format!("3,1,1,-;Out of memory: K[431]: segfault: {text}"),
            "6,1,1,-;oom_reaper: reaped process 431 (sh), now anon-rss:0kB",
            "4,1,1,-;sh invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE), order=0, oom_score_adj=100",
            "3,1,1,-;Out of memory: Killed process many (sh) total-vm:1kB",
            "6,1,1,-;oom-kill:constraint=CONSTRAINT_NONE",
            "",
            ";",
        ] {
            assert_eq!(parse(record), None, "{record}");
        }
    }

    #[test]
    fn one_victim_is_told_once() {
        let mut reader = Reader::default();
        let mut told = |pid, announced| reader.first_of(victim(pid, "x", announced).unwrap()).is_some();
        assert!(told(7, true));
        assert!(!told(7, false));
        // The kernel limits how often it announces, but never leaves out a kill.
        assert!(told(8, false));
        assert!(told(7, true));
        assert!(told(9, false), "the announced one is not confused with the others of its cgroup");
    }
}
