//! How many files the agent may open, when it is a service.
//!
//! The usual soft limit (1024) is there for programs that use select(2); a server asks for more (systemd.exec(5), "Process
//! Properties"). What the agent starts gets the limits that the agent was started with.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// Each connection takes one, or two at the ports door, and each process of the table four: with every seat and every
/// process taken, the agent has some to spare.
pub(crate) const AGENT_OPEN_FILES: u64 = 65_536;

static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Asks for as many as the agent can use and its starter allows.
pub(crate) fn raise() {
    let inherited = *INHERITED.get_or_init(|| getrlimit(Resource::Nofile));
    let wanted = inherited.maximum.map_or(AGENT_OPEN_FILES, |most| most.min(AGENT_OPEN_FILES));
    if inherited.current.is_none_or(|current| current >= wanted) {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..inherited }) {
        crate::log::warn(format_args!("raising the limit of open files: {error}"));
    }
}

/// Gives a child the limit that the agent itself was started with.
pub(crate) fn give_back(child: Pid) -> io::Result<()> {
    if let Some(inherited) = INHERITED.get() {
        prlimit(Some(child), Resource::Nofile, *inherited)?;
    }
    Ok(())
}
