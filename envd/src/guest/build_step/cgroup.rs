//! The cgroup of the step, beside that of the process that waits for it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use super::named;
use crate::guest::profile;

/// The container's own cgroups are its namespace's root; clients' processes are in `user`.
const STEP: &str = "/sys/fs/cgroup/step";
const OF_CLIENTS: &str = "/sys/fs/cgroup/user";

/// The cgroup.
pub(super) struct Cgroup;

impl Cgroup {
    /// Makes it, with the bound of processes that clients' have, and Docker's device rules.
    pub(super) fn make() -> io::Result<Self> {
        fs::create_dir(STEP).map_err(named(STEP))?;
        let most = fs::read_to_string(format!("{OF_CLIENTS}/pids.max"))?;
        fs::write(format!("{STEP}/pids.max"), most.trim_end())?;
        // A step that lost one of its processes is no step: all of it ends.
        fs::write(format!("{STEP}/memory.oom.group"), "1")?;
        let rules = profile::device_rules_of_step();
        rules.attach(File::open(STEP)?.as_fd()).map_err(named("device rules"))?;
        Ok(Self)
    }

    /// Moves the calling process into it.
    pub(super) fn enter(&self) -> io::Result<()> {
        fs::write(format!("{STEP}/cgroup.procs"), "0").map_err(named(STEP))
    }

    /// Whether the kernel ended a process of it for its memory.
    pub(super) fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(format!("{STEP}/memory.events")).unwrap_or_default();
        events.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
    }
}
