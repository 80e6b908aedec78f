//! Snapshots and forks that are taken, beside plain copies of what they have to write.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::copies::{copy, pages, ram_of};
use crate::shim::{Host, Sandbox, Start};
use crate::table::{Bound, Row};
use crate::{interleaved, median, mib, milliseconds};

/// What a clone writes before it is forked: a program with its data.
const DIRTY_MIB: u32 = 48;

/// What the calls told about what they did.
#[derive(Default)]
struct Told {
    stopped: Vec<Duration>,
    ram_bytes: f64,
}

impl Told {
    fn add(&mut self, taken: &Value) {
        self.stopped.push(Duration::from_secs_f64(taken["stopped_ms"].as_f64().unwrap() / 1e3));
        self.ram_bytes = taken["ram_bytes"].as_f64().unwrap();
    }
}

fn take(sandbox: &Sandbox, call: &str, path: &Path, told: &RefCell<Told>) -> Duration {
    let begun = Instant::now();
    let taken = sandbox.call(call, &json!({ "path": path }).to_string());
    let took = begun.elapsed();
    told.borrow_mut().add(&taken);
    fs::remove_dir_all(path).unwrap();
    took
}

/// Of a machine that was booted: all of its RAM is written.
pub(crate) fn of_a_booted_one(host: &Host, rounds: usize) -> Vec<Row> {
    let (sandbox, _) = Sandbox::start(host, Start::Booted);
    sandbox.first_output();
    let (_, vmm, _) = sandbox.processes();
    let ram = ram_of(vmm);
    let (forks, snapshots) = (RefCell::new(Told::default()), RefCell::new(Told::default()));
    let mut fork = || take(&sandbox, "/fork", &host.fresh("fork"), &forks);
    let mut snapshot = || take(&sandbox, "/snapshot", &host.fresh("snapshot"), &snapshots);
    let mut plain = || copy(&ram, &host.fresh("copy"), false).0;
    let mut synced = || copy(&ram, &host.fresh("copy"), true).0;
    let [fork, plain, snapshot, synced] =
        interleaved(rounds, [&mut fork, &mut plain, &mut snapshot, &mut synced]);
    sandbox.end();
    let (forks, snapshots) = (forks.into_inner(), snapshots.into_inner());
    vec![
        Row::plain(
            format!("copy of a booted VM's {} of allocated RAM", mib(forks.ram_bytes)),
            milliseconds(plain),
        ),
        Row {
            what: "fork of a booted VM, to the answer; over that".into(),
            value: milliseconds(fork),
            ratio: Some((fork / plain, Bound::AtMost(2.0))),
        },
        Row::plain("  of that, it stood still", milliseconds(median(forks.stopped))),
        Row::plain("the same copy, synced", milliseconds(synced)),
        Row {
            what: "snapshot of a booted VM (synced, digests), to the answer; over that".into(),
            value: milliseconds(snapshot),
            ratio: Some((snapshot / synced, Bound::AtMost(2.0))),
        },
        Row::plain("  of that, it stood still", milliseconds(median(snapshots.stopped))),
    ]
}

/// Of a clone: what it has written since.
pub(crate) fn of_a_clone(host: &Host, rounds: usize) -> Vec<Row> {
    let (sandbox, _) = Sandbox::start(host, Start::Restored);
    sandbox.first_output();
    sandbox.sh(&format!(
        "yes 0123456789abcdef | dd of=/dev/shm/dirt bs=1M count={DIRTY_MIB} iflag=fullblock status=none"
    ));
    let told = RefCell::new(Told::default());
    // Once to know how much it is.
    take(&sandbox, "/fork", &host.fresh("fork"), &told);
    let dirty = told.borrow().ram_bytes;
    let pages = pages(dirty as u64);
    let told = RefCell::new(Told::default());
    let mut fork = || take(&sandbox, "/fork", &host.fresh("fork"), &told);
    let mut plain = || copy(&pages, &host.fresh("copy"), false).0;
    let [fork, plain] = interleaved(rounds, [&mut fork, &mut plain]);
    sandbox.end();
    let stopped = median(told.into_inner().stopped);
    vec![
        Row::plain(format!("copy of a clone's {} of dirty pages", mib(dirty)), milliseconds(plain)),
        Row {
            what: "fork of the clone, to the answer; over that".into(),
            value: milliseconds(fork),
            ratio: Some((fork / plain, Bound::AtMost(3.0))),
        },
        Row {
            what: "  it stood still; against that and 100 ms".into(),
            value: milliseconds(stopped),
            ratio: Some((stopped / (plain + 0.1), Bound::AtMost(1.0))),
        },
    ]
}
