//! What processes that do nothing cost the agent.

mod support;

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Agent, start};

const PROCESSES: usize = 1000;

/// What each may cost.
const MOST: usize = 64 << 10;

/// Its three pipes and its pidfd.
const DESCRIPTORS: usize = 4;

fn resident(agent: &Agent) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

fn descriptors(agent: &Agent) -> usize {
    fs::read_dir(format!("/proc/{}/fd", agent.child.id())).unwrap().count()
}

#[tokio::test]
async fn a_thousand_idle_processes_are_cheap() {
    let wanted = (PROCESSES * DESCRIPTORS + 1000) as u64;
    let limit = getrlimit(Resource::Nofile);
    // The agent inherits it.
    setrlimit(
        Resource::Nofile,
        Rlimit { current: Some(wanted.max(limit.current.unwrap_or(wanted))), ..limit },
    )
    .unwrap();
    let agent = Agent::start().await;
    // What is made once, whatever the number of processes.
    for _ in 0..10 {
        agent.shell("echo warm").await.finish().await;
    }
    let (memory, open) = (resident(&agent), descriptors(&agent));
    for _ in 0..PROCESSES {
        // Its client goes away, as one does that comes back later.
        agent.start_process(start("sleep", &["1000"])).await.pid().await;
    }
    let list = agent.json("/process.Process/List", "{}").await.1;
    assert_eq!(list["processes"].as_array().unwrap().len(), PROCESSES);
    let each = resident(&agent).saturating_sub(memory) / PROCESSES;
    let opened = descriptors(&agent) - open;
    println!("an idle process costs {each} bytes and {:.1} descriptors", opened as f64 / PROCESSES as f64);
    assert!(each <= MOST, "{each} bytes");
    // Connections that are just being closed come on top.
    assert!(opened <= PROCESSES * DESCRIPTORS + 100, "{opened} descriptors");
}
