//! A sandbox in which nothing happens costs its host nothing but memory.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use e2e::{TestData, TestSandbox};

use super::Mapped;

/// How long nothing happens.
const WATCHED: Duration = Duration::from_secs(10);

/// Wake-ups in this time, of all threads of a process: none, but for what the kernel itself may want of one.
const FEW: u64 = 2;

/// How long a thread that was wanted once waits to be wanted again (tokio's for work that blocks), and a little.
const SETTLED: Duration = Duration::from_secs(12);

/// What a shim may have of its own, in KiB: 8 MiB as it is installed; a build for tests has three times the code.
const PSS_KIB: u64 = if cfg!(debug_assertions) { 24 << 10 } else { 8 << 10 };

/// Context switches of each thread of a process so far.
fn switches(pid: i32) -> BTreeMap<String, u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    let count = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let numbers = status.lines().filter(|line| line.contains("_ctxt_switches:"));
        let sum = numbers.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum();
        Some((task.file_name().into_string().ok()?, sum))
    };
    tasks.flatten().filter_map(count).collect()
}

/// How often any of its threads has run between the two; that one has ended, or begun, is once.
fn woken(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> u64 {
    let ended = before.keys().filter(|thread| !after.contains_key(*thread)).count() as u64;
    ended
        + after
            .iter()
            .map(|(thread, count)| before.get(thread).map_or(1, |before| count - before))
            .sum::<u64>()
}

/// The shim, and what sweeps behind it.
fn own_processes(sandbox: &TestSandbox) -> Vec<(String, i32)> {
    let is_reaper = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).any(|word| word == host_shim::reaper::REAP.as_bytes())
    };
    let reapers: Vec<_> = TestSandbox::processes_of(&sandbox.dir()).into_iter().filter(is_reaper).collect();
    assert_eq!(reapers.len(), 1);
    vec![("shim".to_owned(), sandbox.shim().as_raw_pid()), ("reaper".to_owned(), reapers[0])]
}

#[tokio::test]
async fn a_shim_with_nothing_to_do_does_not_wake_up() {
    let data = TestData::warmed("e2e");
    let booted = TestSandbox::clone_of(&data, "e2e").set("restore", "never").start().await;
    let cloned = TestSandbox::clone_of(&data, "e2e").start().await;
    let parked = TestSandbox::clone_of(&data, "e2e").parked().start().await;
    let resumed =
        TestSandbox::clone_of(&data, "e2e").set("timeout_s", 3600).start().await.pause().await.resume().await;
    let all = [("booted", &booted), ("cloned", &cloned), ("parked", &parked), ("resumed", &resumed)];
    for (name, sandbox) in all {
        if name != "parked" {
            assert_eq!(sandbox.stdout("echo awake").await, "awake\n");
        }
    }
    let look = || -> Vec<_> {
        let of = |(name, sandbox): (&str, &TestSandbox)| {
            own_processes(sandbox)
                .into_iter()
                .map(|(kind, pid)| (format!("{name} {kind}"), pid, switches(pid)))
                .collect::<Vec<_>>()
        };
        all.into_iter().flat_map(of).collect()
    };
    tokio::time::sleep(SETTLED).await;
    let before = look();
    tokio::time::sleep(WATCHED).await;
    for ((name, pid, before), (.., after)) in before.into_iter().zip(look()) {
        let mapped = Mapped::of(pid, "");
        let woken = woken(&before, &after);
        println!("{name}: {woken} wake-ups in {WATCHED:?}, {mapped:?} KiB");
        assert!(woken <= FEW, "{name} woke up {woken} times");
        assert!(mapped.pss <= PSS_KIB, "{name} has {mapped:?}");
    }
    for (name, sandbox) in all {
        println!("VMM, {name}: {:?} KiB", Mapped::of(sandbox.vmm().as_raw_pid(), ""));
    }
    for sandbox in [booted, cloned, parked, resumed] {
        sandbox.stop().await;
    }
}
