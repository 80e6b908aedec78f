//! Soak: `SOAK_CYCLES` (default 10,000) times start, lose the connection, reattach, kill.
//!
//! Each process prints a known amount of known bytes. The first reader breaks off somewhere in the middle; a second one
//! names the offset that it wants to go on from, and together they must have every byte. Then the process is killed. At
//! the end the agent has no more memory, descriptors, threads or zombies than after the warm-up.

#[allow(dead_code, reason = "the benches share it, and each uses a part")]
#[path = "../wire/mod.rs"]
mod wire;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::{ProcessSelector, SendSignalRequest, process_selector};
use prost::Message;
use sha2::{Digest, Sha256};
use wire::{Agent, DEADLINE, Wire, rss};

/// `ConnectRequest.process` and `ConnectRequest.from_offset`, where in a process's output a reader wants to go on: written
/// as they are on the wire, which is what a client in another language would send.
const CONNECT_PROCESS: u32 = 1;
const CONNECT_FROM_OFFSET: u32 = 1000;

/// Ended processes are remembered for this long: before that their memory is no leak, and the table of them, the allocator's
/// arenas and caches are as large as they will be.
const KEEP_ENDED: Duration = Duration::from_secs(30);

/// What the agent may hold more at the end than after the warm-up: fragments of a heap that had thousands of processes.
const RSS_SLACK_KIB: u64 = 2048;

/// Descriptors that may be open in passing: connections that the agent has not yet seen end.
const FD_SLACK: usize = 4;

fn main() {
    // `cargo test` and `cargo nextest` run benches too, once each and to see that they build: only `--bench` runs it.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("soak: not run without --bench");
        return;
    }
    let cycles =
        std::env::var("SOAK_CYCLES").map_or(10_000, |text| text.parse().expect("SOAK_CYCLES: a number"));
    let agent = Agent::start();
    let begin = Instant::now();
    let mut bytes = 0;
    let mut calls = agent.wire();
    let mut warm_up = 0;
    while begin.elapsed() < KEEP_ENDED {
        cycle(&agent, &mut calls, warm_up).unwrap_or_else(|error| panic!("cycle {warm_up}: {error}"));
        warm_up += 1;
    }
    let before = settled(&agent, &mut calls);
    for n in 0..cycles {
        bytes += cycle(&agent, &mut calls, n).unwrap_or_else(|error| panic!("cycle {n}: {error}"));
        if n % 500 == 0 {
            eprint!("\rcycle {n} of {cycles}");
        }
    }
    eprintln!();
    let after = settled(&agent, &mut calls);
    println!(
        "soak: {warm_up} cycles to warm up, then {cycles}, {:.0} s in all; {bytes} bytes, 0 lost; RSS {} -> {} KiB, descriptors {} -> {}, \
         spawner's {} -> {}, threads {} -> {}, zombies {}",
        begin.elapsed().as_secs_f64(),
        before.rss,
        after.rss,
        before.fds,
        after.fds,
        before.spawner_fds,
        after.spawner_fds,
        before.threads,
        after.threads,
        after.zombies,
    );
    assert!(after.rss <= before.rss + RSS_SLACK_KIB, "the agent's memory grew");
    assert!(after.fds <= before.fds + FD_SLACK, "the agent's descriptors grew");
    assert!(after.spawner_fds <= before.spawner_fds + FD_SLACK, "the spawner's descriptors grew");
    assert_eq!(after.zombies, 0, "the spawner left zombies");
}

/// One process from its start to its end; gives the number of bytes that it printed, all of which have come.
fn cycle(agent: &Agent, calls: &mut Wire, n: usize) -> io::Result<u64> {
    // Numbers in a row are bytes of which each place is another; the length is another in each cycle.
    let lines = 500 + n * 37 % 4000;
    let expected: String = (n..n + lines).map(|number| format!("{number}\n")).collect();
    let script = format!("seq {n} {}; exec sleep 1000", n + lines - 1);
    let mut first = agent.wire();
    first.start(None, "/bin/sh", &["-c", &script])?;
    let Event::Start(started) = first.event()? else { return Err(io::Error::other("no start")) };
    let mut output = Vec::new();
    let leave_at = n * 7919 % expected.len();
    while output.len() < leave_at {
        take(first.event()?, &mut output)?;
    }
    drop(first);

    let selector = ProcessSelector { selector: Some(process_selector::Selector::Pid(started.pid)) };
    let mut request = Vec::new();
    prost::encoding::message::encode(CONNECT_PROCESS, &selector, &mut request);
    prost::encoding::uint64::encode(CONNECT_FROM_OFFSET, &(output.len() as u64), &mut request);
    let mut second = agent.wire();
    second.stream_call("Connect", &request)?;
    while output.len() < expected.len() {
        take(second.event()?, &mut output)?;
    }
    if Sha256::digest(&output) != Sha256::digest(&expected) {
        return Err(io::Error::other(format!(
            "{} bytes instead of {}, or others",
            output.len(),
            expected.len()
        )));
    }

    let kill = SendSignalRequest { process: Some(selector), signal: 9, ..Default::default() }.encode_to_vec();
    let status = calls.request("POST", "/process.Process/SendSignal", "application/proto", &kill)?;
    let answer = calls.rest()?;
    if status != 200 {
        return Err(io::Error::other(format!("SendSignal: {status} {}", String::from_utf8_lossy(&answer))));
    }
    loop {
        match second.event()? {
            Event::End(end) if end.exit_code == -1 => break,
            // The first reader may have had everything.
            Event::Start(_) | Event::Keepalive(_) => {}
            other => return Err(io::Error::other(format!("instead of the end: {other:?}"))),
        }
    }
    second.rest()?;
    Ok(expected.len() as u64)
}

fn take(event: Event, output: &mut Vec<u8>) -> io::Result<()> {
    match event {
        Event::Data(data) => match data.output {
            Some(data_event::Output::Stdout(bytes)) => output.extend_from_slice(&bytes),
            other => return Err(io::Error::other(format!("unexpected output {other:?}"))),
        },
        Event::Start(_) | Event::Keepalive(_) => {}
        Event::End(end) => return Err(io::Error::other(format!("ended too early: {end:?}"))),
    }
    Ok(())
}

struct Held {
    rss: u64,
    fds: usize,
    spawner_fds: usize,
    threads: usize,
    zombies: usize,
}

/// What the agent holds once it has forgotten every ended process.
fn settled(agent: &Agent, calls: &mut Wire) -> Held {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid())).unwrap();
    let spawner: u32 = children.split_whitespace().next().expect("a spawner").parse().unwrap();
    // Ended processes leave by the clock: nothing tells when. Descriptors go with them, so that they show it.
    std::thread::sleep(KEEP_ENDED);
    let begin = Instant::now();
    let mut last = usize::MAX;
    loop {
        let fds = count(&format!("/proc/{}/fd", agent.pid()));
        if fds >= last || begin.elapsed() > DEADLINE {
            break;
        }
        last = fds;
        std::thread::sleep(Duration::from_secs(2));
    }
    // A connection that was idle all the time still answers.
    assert_eq!(calls.request("GET", "/health", "text/plain", b"").unwrap(), 204);
    let states = states_of_children(spawner);
    Held {
        rss: rss(agent.pid()),
        fds: count(&format!("/proc/{}/fd", agent.pid())),
        spawner_fds: count(&format!("/proc/{spawner}/fd")),
        threads: count(&format!("/proc/{}/task", agent.pid())),
        zombies: states.get(&'Z').copied().unwrap_or_default(),
    }
}

fn count(folder: &str) -> usize {
    fs::read_dir(folder).unwrap().count()
}

fn states_of_children(pid: u32) -> BTreeMap<char, usize> {
    let mut states = BTreeMap::new();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    for child in children.split_whitespace() {
        let Ok(stat) = fs::read_to_string(format!("/proc/{child}/stat")) else { continue };
        if let Some(state) = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()) {
            *states.entry(state).or_default() += 1;
        }
    }
    states
}
