//! What the sandbox uses: CPU, memory, disk, by class of processes.
//!
//! The machine's own numbers are those of /proc, since the machine is the sandbox; the classes' are those of their
//! cgroups. What cannot be known (no cgroup v2) is absent.

mod text;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envd_proto::control::{ClassStats, Stats};
use procfs::{Current, Meminfo};
use rustix::fs::{Mode, OFlags, openat};

use crate::sandbox::{Leaf, Sandbox};

pub(crate) use text::{e2b_json, prefers_prometheus, prometheus};

/// Over less than this the kernel's ticks (10 ms) say little.
const MIN_WINDOW: Duration = Duration::from_millis(100);

/// A rate over more than this says little about now.
const MAX_WINDOW: Duration = Duration::from_secs(60);

/// Cgroup files are short; a longer one is not read to its end.
const MAX_FILE: u64 = 16 << 10;

/// How long the disk may take to answer.
const DISK_DEADLINE: Duration = Duration::from_secs(2);

/// Remembers what a rate needs.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    last: Mutex<Option<(Instant, CpuTime)>>,
}

/// CPU time since the boot, in ticks, of all CPUs together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CpuTime {
    busy: u64,
    total: u64,
}

impl CpuTime {
    fn now() -> io::Result<Self> {
        Self::parse(&read(File::open("/proc/stat")?)?)
    }

    /// `cpu user nice system idle iowait irq softirq steal guest guest_nice` (proc(5)); the guests' are in the users'.
    fn parse(text: &str) -> io::Result<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "));
        let numbers: Option<Vec<u64>> =
            line.and_then(|line| line.split_whitespace().take(8).map(|number| number.parse().ok()).collect());
        match numbers.as_deref() {
            Some(numbers @ [_, _, _, idle, iowait, ..]) => {
                let total = numbers.iter().sum();
                Ok(Self { busy: total - idle - iowait, total })
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "/proc/stat: expected a line of CPU times")),
        }
    }

    /// The share of the time between that was not idle, in percent.
    fn used_since(self, before: Self) -> f64 {
        // Idle times can go back a little (proc(5)).
        let (busy, total) = (self.busy.saturating_sub(before.busy), self.total.saturating_sub(before.total));
        if total == 0 { 0.0 } else { (100.0 * busy as f64 / total as f64).min(100.0) }
    }
}

impl Metrics {
    /// Everything, now. Takes at least [`MIN_WINDOW`] when nobody asked in the last minute.
    pub(crate) async fn stats(&self, sandbox: &Sandbox) -> io::Result<Stats> {
        let cpu_used_pct = self.cpu_used().await?;
        let memory = Meminfo::current().map_err(io::Error::other)?;
        let available = memory.mem_available.unwrap_or(memory.mem_free);
        let cache = memory.buffers + memory.cached + memory.s_reclaimable.unwrap_or(0);
        let disk = sandbox.root().run(|| Ok(rustix::fs::statvfs("/")?));
        let disk = tokio::time::timeout(DISK_DEADLINE, disk).await.ok().and_then(Result::ok);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Stats {
            unix_time_ns: i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX),
            cpu_count: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            cpu_used_pct,
            memory_total: memory.mem_total,
            memory_used: memory.mem_total.saturating_sub(available),
            memory_cache: cache,
            disk_used: disk
                .as_ref()
                .map(|disk| disk.f_blocks.saturating_sub(disk.f_bfree).saturating_mul(disk.f_frsize)),
            disk_total: disk.as_ref().map(|disk| disk.f_blocks.saturating_mul(disk.f_frsize)),
            agent_resident: resident(),
            classes: classes(sandbox),
        })
    }

    /// Since the last call when that is neither too near nor too far, else over a short window.
    async fn cpu_used(&self) -> io::Result<f64> {
        let mut now = (Instant::now(), CpuTime::now()?);
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match last {
            Some(last) if (MIN_WINDOW..=MAX_WINDOW).contains(&now.0.duration_since(last.0)) => last,
            _ => {
                let before = now;
                tokio::time::sleep(MIN_WINDOW).await;
                now = (Instant::now(), CpuTime::now()?);
                before
            }
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(now.1.used_since(before.1))
    }
}

/// Bytes of the agent in memory.
fn resident() -> Option<u64> {
    let pages: u64 = read(File::open("/proc/self/statm").ok()?).ok()?.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn classes(sandbox: &Sandbox) -> Vec<ClassStats> {
    let Some(user) = sandbox.cgroup(Leaf::User) else { return Vec::new() };
    let open = |from: BorrowedFd<'_>, path: &str| {
        openat(from, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
    };
    let own = |leaf| sandbox.cgroup(leaf).and_then(|leaf| open(leaf, "."));
    let found = [
        ("init", open(user, "../init")),
        ("user", own(Leaf::User)),
        ("pty", own(Leaf::Pty)),
        ("system", own(Leaf::System)),
    ];
    found.into_iter().filter_map(|(name, group)| Some(class(name, &group?))).collect()
}

fn class(name: &str, group: &OwnedFd) -> ClassStats {
    let text = |file: &str| {
        let file = openat(group.as_fd(), file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        read(File::from(file)).ok()
    };
    let number = |file: &str| text(file)?.trim().parse().ok();
    let keyed = |file: &str, key: &str| {
        text(file)?.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
    };
    ClassStats {
        name: name.to_owned(),
        cpu_usage_us: keyed("cpu.stat", "usage_usec"),
        memory_current: number("memory.current"),
        pids_current: number("pids.current"),
        oom_kills: keyed("memory.events", "oom_kill"),
    }
}

fn read(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;
    use crate::spawner::Spawner;

    #[test]
    fn a_rate_is_what_was_busy_between_two_looks() {
        let before = CpuTime::parse("cpu  100 0 50 800 50 0 0 0 7 7\ncpu0 1\n").unwrap();
        assert_eq!(before, CpuTime { busy: 150, total: 1000 });
        assert_eq!(CpuTime { busy: 175, total: 1100 }.used_since(before), 25.0);
        assert_eq!(before.used_since(before), 0.0);
        assert_eq!(CpuTime { busy: 140, total: 1010 }.used_since(before), 0.0);
        for hostile in ["", "cpu  1 2\n", "cpu  a b c d e\n"] {
            assert!(CpuTime::parse(hostile).is_err(), "{hostile}");
        }
    }

    #[tokio::test]
    async fn a_busy_cpu_is_seen_between_two_calls() {
        let (socket, _spawner) = Spawner::socketpair().unwrap();
        let sandbox = Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None);
        let first = sandbox.metrics().stats(&sandbox).await.unwrap();
        // A whole CPU of this machine is busy for longer than the window.
        let begin = Instant::now();
        while begin.elapsed() < 3 * MIN_WINDOW {}
        let second = sandbox.metrics().stats(&sandbox).await.unwrap();
        // One CPU's share, less what another tenant of the host may have taken from it.
        let least = 100.0 / f64::from(second.cpu_count) / 3.0;
        assert!(second.cpu_used_pct > least, "{} of {} CPUs", second.cpu_used_pct, second.cpu_count);
        for stats in [first, second] {
            assert!((0.0..=100.0).contains(&stats.cpu_used_pct));
            assert!(stats.memory_used > 0 && stats.memory_used < stats.memory_total);
            assert!(stats.disk_used.unwrap() <= stats.disk_total.unwrap());
            assert!(stats.agent_resident.unwrap() > 0);
            assert_eq!(stats.classes, vec![]);
        }
    }
}
