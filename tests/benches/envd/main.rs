//! The agent's times, rates and memory beside yardsticks of the same machine in the same minutes: `make bench-envd`.
//!
//! Every figure is a median of rounds in which its yardstick takes turns with it, so that a noisy machine is noisy for
//! both. `BENCH_ONLY=host` leaves the virtual machines out.

mod host;
mod machine;
mod memory;
mod ssh;
#[allow(dead_code, reason = "the benches share it, and each uses a part")]
#[path = "../table/mod.rs"]
mod table;
#[allow(dead_code, reason = "the benches share it, and each uses a part")]
#[path = "../wire/mod.rs"]
mod wire;

use std::time::{Duration, Instant};

use table::{Bound, Row};

fn main() {
    // `cargo test` and `cargo nextest` run benches too, once each and to see that they build: only `--bench` measures.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("envd: not measured without --bench");
        return;
    }
    Row::head("median");
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    if only != "machine" {
        host::measure().iter().for_each(Row::print);
        memory::measure().iter().for_each(Row::print);
    }
    if only != "host" {
        machine::measure().iter().for_each(Row::print);
    }
}

/// How long each of some ways takes: medians in seconds, of rounds in which they take turns. The first round warms up.
fn interleaved<const N: usize>(rounds: usize, ways: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut samples = [const { Vec::new() }; N];
    for round in 0..=rounds {
        for turn in 0..N {
            // Each comes after each other one equally often.
            let n = (round + turn) % N;
            let begin = Instant::now();
            ways[n]();
            if round > 0 {
                samples[n].push(begin.elapsed());
            }
        }
    }
    samples.map(|mut samples: Vec<Duration>| {
        samples.sort_unstable();
        samples[samples.len() / 2].as_secs_f64()
    })
}

/// A time for the table.
fn microseconds(seconds: f64) -> String {
    format!("{:.0} us", seconds * 1e6)
}

/// A rate for the table.
fn rate(bytes: u64, seconds: f64) -> String {
    format!("{:.0} MiB/s", bytes as f64 / seconds / f64::from(1 << 20))
}
