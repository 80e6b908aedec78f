//! What snapshots cost, beside yardsticks of the same machine in the same minutes: `make bench-snapshots`.
//!
//! Every figure is a median of rounds in which its yardstick takes turns with it, so that a noisy machine is noisy for both.
//! `SNAPSHOT_ROUNDS` says how many, `SNAPSHOT_CLONES` how many sandboxes are alive at once.

mod bare;
mod copies;
mod memory;
mod shim;
#[allow(dead_code, reason = "the benches share it, and each uses a part")]
#[path = "../table/mod.rs"]
mod table;
mod takes;
#[allow(dead_code, reason = "the benches share it, and each uses a part")]
#[path = "../wire/mod.rs"]
mod wire;

use std::path::Path;
use std::time::Duration;

use bare::{Bare, BareSnapshot};
use shim::{Host, Sandbox, Start};
use table::{Bound, Row};

/// Further commands in a sandbox that runs; their median is an exec's time.
const WARM_EXECS: usize = 5;

fn main() {
    // `cargo test` and `cargo nextest` run benches too, once each and to see that they build: only `--bench` measures.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("snapshots: not measured without --bench");
        return;
    }
    let rounds = number("SNAPSHOT_ROUNDS", 11);
    let clones = number("SNAPSHOT_CLONES", 50);
    // On a disk, as data folders are.
    let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = Host::new(folder.path());
    println!(
        "medians of {rounds} rounds; release binaries: {}",
        e2e::made("TIFFIN_BIN").ends_with("release")
    );
    Row::head("");
    first_output(&host, folder.path(), rounds).iter().for_each(Row::print);
    parked(&host, rounds).iter().for_each(Row::print);
    takes::of_a_booted_one(&host, rounds).iter().for_each(Row::print);
    takes::of_a_clone(&host, rounds).iter().for_each(Row::print);
    memory::idle(&host).iter().for_each(Row::print);
    memory::many(&host, clones).iter().for_each(Row::print);
    println!("through shim and agent, over the raw channel in the same machine: `make bench-envd`");
}

/// From nothing to the first command's output.
fn first_output(host: &Host, folder: &Path, rounds: usize) -> Vec<Row> {
    let snapshot: BareSnapshot = bare::snapshot(folder);
    let start = |start| {
        move || {
            let (sandbox, begun) = Sandbox::start(host, start);
            sandbox.first_output();
            let took = begun.elapsed();
            sandbox.end();
            took
        }
    };
    let mut phases = shim::Phases::default();
    let mut restored = || {
        let (sandbox, begun) = Sandbox::start(host, Start::Restored);
        let ready = begun.elapsed();
        sandbox.first_output();
        let took = begun.elapsed();
        phases.add(&sandbox, ready, took);
        sandbox.end();
        took
    };
    let mut bare = || {
        let (mut machine, begun) = Bare::restore(&snapshot);
        machine.echo();
        begun.elapsed()
    };
    let mut booted = start(Start::Booted);
    let [restored, bare, booted] = interleaved(rounds, [&mut restored, &mut bare, &mut booted]);
    let mut rows = vec![
        Row::plain("bare guest with a trivial agent, restored, to its echo's output", milliseconds(bare)),
        Row {
            what: "host-shim, restored, to the first exec's output; over that".into(),
            value: milliseconds(restored),
            ratio: Some((restored / bare, Bound::AtMost(1.5))),
        },
        Row::plain("host-shim, booted, to the first exec's output", milliseconds(booted)),
        Row {
            what: "restored, over that".into(),
            value: milliseconds(restored),
            ratio: Some((restored / booted, Bound::AtMost(0.2))),
        },
    ];
    rows.extend(phases.rows());
    rows
}

/// From a parked sandbox to the first command's output, and what a command takes in one that runs.
fn parked(host: &Host, rounds: usize) -> Vec<Row> {
    let (mut totals, mut configures, mut execs, mut overs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (sandbox, _) = Sandbox::start(host, Start::Parked);
        let begun = std::time::Instant::now();
        sandbox.call("/configure", "{}");
        let configured = begun.elapsed();
        sandbox.first_output();
        let total = begun.elapsed();
        let mut warm: Vec<_> = (0..WARM_EXECS)
            .map(|_| {
                let begun = std::time::Instant::now();
                sandbox.first_output();
                begun.elapsed()
            })
            .collect();
        warm.sort_unstable();
        sandbox.end();
        if round > 0 {
            let exec = warm[warm.len() / 2];
            totals.push(total);
            configures.push(configured);
            execs.push(exec);
            overs.push(total.saturating_sub(exec));
        }
    }
    const LIMIT: f64 = 0.020;
    let over = median(overs);
    vec![
        Row::plain("parked, configure to the first exec's output", milliseconds(median(totals))),
        Row::plain("  of that, until the configure is answered", milliseconds(median(configures))),
        Row::plain("an exec in the same sandbox later", milliseconds(median(execs))),
        Row {
            what: "from parked, above such an exec; against 20 ms".into(),
            value: milliseconds(over),
            ratio: Some((over / LIMIT, Bound::AtMost(1.0))),
        },
    ]
}

fn number(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}: expected a number, got {text:?}")),
        Err(_) => default,
    }
}

/// How long each of some ways takes by its own account: medians in seconds, of rounds in which they take turns. The first
/// round warms up.
fn interleaved<const N: usize>(rounds: usize, ways: [&mut dyn FnMut() -> Duration; N]) -> [f64; N] {
    let mut samples = [const { Vec::new() }; N];
    for round in 0..=rounds {
        for turn in 0..N {
            // Each comes after each other one equally often.
            let n = (round + turn) % N;
            let took = ways[n]();
            if round > 0 {
                samples[n].push(took);
            }
        }
    }
    samples.map(median)
}

fn median(mut samples: Vec<Duration>) -> f64 {
    samples.sort_unstable();
    samples[samples.len() / 2].as_secs_f64()
}

/// A time for the table.
fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1e3)
}

/// An amount for the table.
fn mib(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / f64::from(1 << 20))
}
