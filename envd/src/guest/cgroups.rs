//! The machine's cgroups (version 2).
//!
//! ```text
//! /agent            the agent: memory reserved
//! /box              every sandbox container, below what the agent needs
//!   main            the container; the root of its cgroup namespace, free of processes
//!     init          its PID 1: the spawner, or the image's init with all that it manages (then the root of the
//!                   container's cgroup namespace is here)
//!     spawner       the spawner, where PID 1 is the image's
//!     user          what clients start
//!     pty           what clients start on a terminal
//!     system        what the agent itself starts inside
//! ```
//!
//! pids.max stands on the leaves, so that a fork bomb in one leaves room in the others.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use super::init::ContainerInit;
use crate::sandbox::Leaves;
use envd_sys::DeviceRules;
use procfs::{Current, Meminfo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::WaitOptions;

const ROOT: &str = "/sys/fs/cgroup";

/// The container's cgroup, as libcontainer names it.
pub(super) const BOX_PATH: &str = "/box/main";

/// The container's cgroup where its PID 1 is the image's own and manages what it sees.
pub(super) const INIT_PATH: &str = "/box/main/init";

/// The leaf of a spawner that is not PID 1.
const SPAWNER: &str = "spawner";

const LEAVES: [&str; 4] = ["init", "user", "pty", "system"];

/// What the box cannot take: the agent's memory (8 MiB idle) with its buffers, and the kernel's own.
const AGENT_MEMORY: u64 = 32 << 20;

/// Processes in each leaf; together below the kernel's default pid_max (32768).
const MAX_LEAF_PIDS: u64 = 7000;

/// The memory of the machine for each process that a leaf may have. Where a fork bomb fills the memory before it fills its
/// leaf, the kernel does nothing but look for victims, and the agent waits with everybody else.
const MEMORY_PER_PROCESS: u64 = 256 << 10;

/// The agent's share of the CPU against the box's, which has the default of 100.
const AGENT_CPU_WEIGHT: u32 = 10_000;

/// Threads of the whole machine: more than every leaf may have together. The kernel's own number follows the memory, and
/// in a small machine one leaf would reach it for all; what a thread costs is accounted to its cgroup.
const MACHINE_THREADS: u32 = 32768;

/// The least that there is.
const AGENT_OOM_SCORE: &str = "-1000";

/// How long killed processes have to go; a process stuck in the kernel goes with the machine.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// It only waits.
const REAPER_STACK: usize = 64 << 10;

fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("writing '{value}' to {path}: {error}")))
}

/// Enables every controller that the kernel has in a cgroup's children.
fn enable_controllers(cgroup: &str) -> io::Result<()> {
    let controllers = fs::read_to_string(format!("{cgroup}/cgroup.controllers"))?;
    let enabled: Vec<_> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    write(&format!("{cgroup}/cgroup.subtree_control"), &enabled.join(" "))
}

/// Makes the agent's cgroup and the box's, and moves the agent to its own.
pub(super) fn prepare() -> io::Result<()> {
    for name in ["agent", "box", "box/main"] {
        fs::create_dir_all(format!("{ROOT}/{name}"))?;
    }
    // Where the root is a cgroup of somebody's tree, only one without processes can hand controllers on.
    write(&format!("{ROOT}/agent/cgroup.procs"), "0")?;
    enable_controllers(ROOT)?;
    enable_controllers(&format!("{ROOT}/box"))?;
    write(&format!("{ROOT}/agent/memory.min"), &AGENT_MEMORY.to_string())?;
    write(&format!("{ROOT}/agent/cpu.weight"), &AGENT_CPU_WEIGHT.to_string())?;
    let total = Meminfo::current().map_err(io::Error::other)?.mem_total;
    // The box's limit is the machine less the agent's share, but never nothing.
    let limit = total.saturating_sub(AGENT_MEMORY).max(total / 2);
    write(&format!("{ROOT}/box/memory.max"), &limit.to_string())
}

/// What only a machine's own PID 1 may ask for: room for every leaf's threads, and to be the last that the kernel kills.
pub(super) fn protect_agent() -> io::Result<()> {
    write("/proc/sys/kernel/threads-max", &MACHINE_THREADS.to_string())?;
    write("/proc/self/oom_score_adj", AGENT_OOM_SCORE)
}

/// The box's cgroups where nobody delegated any: they hold its processes together, without limits.
pub(super) fn prepare_without_limits() -> io::Result<()> {
    fs::create_dir_all(format!("{ROOT}{BOX_PATH}"))
        .map_err(|error| io::Error::new(error.kind(), format!("making {ROOT}{BOX_PATH}: {error}")))
}

/// Takes the box's cgroups away. What still has processes stays.
pub(super) fn remove_box() {
    let main = format!("{ROOT}{BOX_PATH}");
    for leaf in LEAVES {
        let _ = fs::remove_dir(format!("{main}/{leaf}"));
    }
    let _ = fs::remove_dir(&main).and_then(|()| fs::remove_dir(format!("{ROOT}/box")));
}

/// Sets the device rules of everything in the box. Above the container's cgroup namespace: nobody in there can undo them.
pub(super) fn attach(rules: &DeviceRules) -> io::Result<()> {
    let attached = File::open(format!("{ROOT}/box")).and_then(|cgroup| rules.attach(cgroup.as_fd()));
    attached.map_err(|error| io::Error::new(error.kind(), format!("device rules for {ROOT}/box: {error}")))
}

/// Moves the calling process to the leaf of a spawner that is not PID 1.
pub(super) fn enter_spawner_leaf() -> io::Result<()> {
    let leaf = format!("{ROOT}{BOX_PATH}/{SPAWNER}");
    fs::create_dir_all(&leaf)?;
    write(&format!("{leaf}/cgroup.procs"), "0")
}

/// Moves the container's init to its leaf where it is the spawner, and opens the leaves for clients' processes.
pub(super) fn enter(init: Option<u32>, limits: bool) -> io::Result<Leaves> {
    let main = format!("{ROOT}{BOX_PATH}");
    for leaf in LEAVES {
        fs::create_dir_all(format!("{main}/{leaf}"))?;
    }
    if let Some(init) = init {
        write(&format!("{main}/init/cgroup.procs"), &init.to_string())?;
    }
    // Only a cgroup without processes of its own can hand controllers on, so the init had to leave first.
    if limits {
        enable_controllers(&main)?;
    }
    let total = Meminfo::current().map_err(io::Error::other)?.mem_total;
    let pids = (total / MEMORY_PER_PROCESS).min(MAX_LEAF_PIDS);
    for leaf in LEAVES {
        let file = format!("{main}/{leaf}/pids.max");
        if limits || fs::exists(&file)? {
            write(&file, &pids.to_string())?;
        }
    }
    let leaf = |name: &str| File::open(format!("{main}/{name}")).map(OwnedFd::from);
    let spawner = if init.is_some() { "init" } else { SPAWNER };
    Ok(Leaves { user: leaf("user")?, pty: leaf("pty")?, system: leaf("system")?, spawner })
}

/// Ends every process of the box: SIGTERM for clients' processes, and what it understands for an init of the image;
/// SIGKILL for all after `grace`.
pub(super) fn end_box(grace: Duration, init: Option<&ContainerInit>) {
    // The init of a pid namespace ends only once every process of it is reaped, also those that came from outside.
    let reaper = std::thread::Builder::new().name("reaper".into()).stack_size(REAPER_STACK).spawn(|| {
        while !matches!(rustix::process::wait(WaitOptions::empty()), Err(rustix::io::Errno::CHILD)) {}
    });
    if let Err(error) = reaper {
        crate::log::warn(format_args!("no reaper for the end of the box: {error}"));
    }
    let main = format!("{ROOT}{BOX_PATH}");
    let clients = ["user", "pty"].map(|leaf| format!("{main}/{leaf}"));
    for leaf in &clients {
        for pid in processes(Path::new(leaf)) {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
    let init = init.filter(|init| init.ask_to_end());
    let deadline = Instant::now() + grace;
    for leaf in &clients {
        wait_empty(leaf, deadline);
    }
    if let Some(init) = init
        && !init.wait_ended(deadline)
    {
        crate::log::warn(format_args!("the container's init did not end in {grace:?}: it is killed"));
    }
    let killed = write(&format!("{main}/cgroup.kill"), "1");
    if let Err(error) = killed {
        crate::log::warn(format_args!("{error}"));
    }
    if !wait_empty(&main, Instant::now() + KILL_TIMEOUT) {
        crate::log::warn(format_args!("the box still has processes {KILL_TIMEOUT:?} after they were killed"));
    }
}

fn processes(cgroup: &Path) -> Vec<rustix::process::Pid> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| rustix::process::Pid::from_raw(line.parse().ok()?)).collect()
}

/// Waits until a cgroup has no process; false when it still has at the deadline.
fn wait_empty(cgroup: &str, deadline: Instant) -> bool {
    let Ok(mut events) = File::open(format!("{cgroup}/cgroup.events")) else { return true };
    loop {
        let mut text = String::new();
        let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
        if read.is_err() || text.lines().any(|line| line == "populated 0") {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return false };
        let mut fds = [PollFd::new(&events, PollFlags::PRI)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
