//! What sandboxes cost the host that do nothing: memory that they do not share, and wake-ups.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::mib;
use crate::shim::{Host, Sandbox, Start};
use crate::table::{Bound, Row};
use crate::wire::kib;

const SHIM_LIMIT: f64 = 8.0 * 1024.0 * 1024.0;
const CLONE_LIMIT: f64 = 40.0 * 1024.0 * 1024.0;

/// Until a sandbox that was just used does nothing any more: tokio's threads for work that blocks wait 10 s for more of it.
const SETTLE: Duration = Duration::from_secs(12);

/// For how long nothing happens.
const IDLE: Duration = Duration::from_secs(10);

/// Sandboxes that are started at the same time, as a pool does it.
const STARTERS: usize = 4;

/// A sandbox that nobody talks to.
pub(crate) fn idle(host: &Host) -> Vec<Row> {
    let (sandbox, _) = Sandbox::start(host, Start::Restored);
    sandbox.first_output();
    std::thread::sleep(SETTLE);
    let (shim, vmm, all) = sandbox.processes();
    let others: Vec<u32> = all.into_iter().filter(|pid| ![shim, vmm].contains(pid)).collect();
    let switches = || (switches([shim]), switches(others.iter().copied()), switches([vmm]));
    let before = switches();
    std::thread::sleep(IDLE);
    let after = switches();
    let [shim_wakes, reaper_wakes, vmm_wakes] =
        [(&before.0, &after.0), (&before.1, &after.1), (&before.2, &after.2)]
            .map(|(before, after)| wake_ups(before, after) as f64 / IDLE.as_secs_f64());
    let pss_shim = pss(shim);
    let rows = vec![
        Row {
            what: "host-shim of an idle sandbox, PSS; against 8 MiB".into(),
            value: mib(pss_shim),
            ratio: Some((pss_shim / SHIM_LIMIT, Bound::AtMost(1.0))),
        },
        Row::plain("  its reaper, PSS", mib(others.iter().map(|&pid| pss(pid)).sum())),
        Row {
            what: "host-shim, wake-ups a second".into(),
            value: format!("{shim_wakes:.1}"),
            ratio: Some((shim_wakes, Bound::AtMost(0.0))),
        },
        Row {
            what: "  its reaper".into(),
            value: format!("{reaper_wakes:.1}"),
            ratio: Some((reaper_wakes, Bound::AtMost(0.0))),
        },
        Row::plain("  its VMM, with a guest that does nothing", format!("{vmm_wakes:.1}")),
    ];
    sandbox.end();
    rows
}

/// Many clones that are alive at once.
pub(crate) fn many(host: &Host, count: usize) -> Vec<Row> {
    let begin = |_| {
        let (sandbox, _) = Sandbox::start(host, Start::Restored);
        sandbox.first_output();
        sandbox
    };
    let first = begin(0);
    let alone = all_pss([&first]);
    let begun = Instant::now();
    let next = Mutex::new(1..count);
    let sandboxes = Mutex::new(vec![first]);
    std::thread::scope(|threads| {
        for _ in 0..STARTERS {
            threads.spawn(|| {
                loop {
                    let Some(n) = next.lock().unwrap().next() else { return };
                    let sandbox = begin(n);
                    sandboxes.lock().unwrap().push(sandbox);
                }
            });
        }
    });
    let took = begun.elapsed();
    let sandboxes = sandboxes.into_inner().unwrap();
    for sandbox in &sandboxes {
        sandbox.first_output();
    }
    let together = all_pss(&sandboxes);
    let vmms: f64 = sandboxes.iter().map(|sandbox| pss(sandbox.processes().1)).sum();
    let each = (together - alone) / (count - 1) as f64;
    sandboxes.into_iter().for_each(Sandbox::end);
    vec![
        Row::plain(
            format!("{count} clones at once, {STARTERS} started at a time: all answer, the last after"),
            format!("{:.1} s", took.as_secs_f64()),
        ),
        Row::plain("  the first alone, PSS of its processes", mib(alone)),
        Row::plain("  all of them, PSS", mib(together)),
        Row::plain("  the VMMs' share of that, each", mib(vmms / count as f64)),
        Row {
            what: "  each beyond the first; against 40 MiB".into(),
            value: mib(each),
            ratio: Some((each / CLONE_LIMIT, Bound::AtMost(1.0))),
        },
    ]
}

fn all_pss<'a>(sandboxes: impl IntoIterator<Item = &'a Sandbox>) -> f64 {
    sandboxes.into_iter().flat_map(|sandbox| sandbox.processes().2).map(pss).sum()
}

/// The memory of a process, with its part of what it shares (proc_pid_smaps(5)).
fn pss(pid: u32) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    kib(&rollup, "Pss") as f64 * 1024.0
}

/// How often each thread of some processes has gone to sleep so far.
fn switches(pids: impl IntoIterator<Item = u32>) -> BTreeMap<u32, u64> {
    let mut found = BTreeMap::new();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap();
            // A thread may end meanwhile.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let thread = task.file_name().to_str().unwrap().parse().unwrap();
            found.insert(thread, kib(&status, "voluntary_ctxt_switches"));
        }
    }
    found
}

/// How often threads were woken between two looks; those that have ended meanwhile are not known.
fn wake_ups(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> u64 {
    after.iter().map(|(thread, count)| count - before.get(thread).copied().unwrap_or(0)).sum()
}
