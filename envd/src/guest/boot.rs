//! The steps of the boot, in order.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use envd_proto::CONTROL_PORT;
use envd_proto::boot as names;
use envd_proto::control::BootPhase;
use rustix::time::{ClockId, clock_gettime};

use super::container::Choices;
use super::init::ContainerInit;
use super::mounts::Origin;
use super::{Channel, cgroups, container, enter, mounts};
use crate::sandbox::Leaves;
use crate::serial;
use crate::spawner::{self, Respawn};

/// A step of the boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// /dev, /proc, /sys.
    EarlyMounts,
    /// From the initramfs to a tmpfs, which a container runtime can pivot from.
    SwitchRoot,
    /// The agent's cgroup and the box's.
    Cgroups,
    /// The read-only root file system.
    Rootfs,
    /// The writable disk.
    Scratch,
    /// The one over the other.
    Overlay,
    /// The loopback interface.
    Network,
    /// The container with its init.
    Container,
}

impl Step {
    /// Its name in phases and errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::EarlyMounts => "early-mounts",
            Self::SwitchRoot => "switch-root",
            Self::Cgroups => "cgroups",
            Self::Rootfs => "rootfs",
            Self::Scratch => "scratch",
            Self::Overlay => "overlay",
            Self::Network => "network",
            Self::Container => "container",
        }
    }
}

/// A step failed.
#[derive(Debug)]
pub struct BootError {
    /// The step.
    pub step: Step,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot step {}: {}", self.step.name(), self.message)
    }
}

impl std::error::Error for BootError {}

/// What the kernel's command line says to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// How the host is reached.
    pub channel: Channel,
    /// Whether client calls act in a container.
    pub container: bool,
    /// What the container may do; checked in its step.
    pub profile: Option<String>,
    /// What its PID 1 is; checked in its step.
    pub init: Option<String>,
    /// Its volumes; checked in its step.
    pub volumes: Vec<String>,
    /// The device of the root file system, where it is not found by its serial.
    pub rootfs: Option<String>,
    /// The device of the scratch disk, where it is not found by its serial.
    pub scratch: Option<String>,
    /// Whether the container's root is an overlay, which volumes are kept from. Not on the command line: the boot knows.
    pub(super) has_overlay: bool,
}

impl Arguments {
    /// Reads /proc/cmdline. Without it, the defaults hold.
    pub fn read() -> Self {
        let words = procfs::cmdline().unwrap_or_default();
        Self::parse(&words, serial::exists(names::CONTROL_SERIAL_PORT))
    }

    pub(super) fn parse(words: &[String], has_serial: bool) -> Self {
        let value = |name: &str| {
            words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
        };
        let port = value(names::ARG_CONTROL_PORT).and_then(|port| port.parse().ok()).unwrap_or(CONTROL_PORT);
        let channel = match value(names::ARG_CHANNEL).as_deref() {
            Some("serial") => Channel::Serial,
            Some("vsock") => Channel::Vsock(port),
            _ if has_serial => Channel::Serial,
            _ => Channel::Vsock(port),
        };
        Self {
            channel,
            container: value(names::ARG_CONTAINER).as_deref() != Some("none"),
            profile: value(names::ARG_PROFILE),
            init: value(names::ARG_INIT),
            volumes: words
                .iter()
                .filter_map(|word| word.strip_prefix(names::ARG_VOLUME)?.strip_prefix('=').map(str::to_owned))
                .collect(),
            rootfs: value(names::ARG_ROOTFS),
            scratch: value(names::ARG_SCRATCH),
            has_overlay: true,
        }
    }
}

/// A machine that is ready to say hello.
pub(super) struct Booted {
    /// What the command line said.
    pub arguments: Arguments,
    /// The container's init, when there is a container.
    pub container: Option<ContainerInit>,
    /// The agent's end of the spawner's socket.
    pub spawner: OwnedFd,
    /// Makes another spawner; `None` where it is the container's init, with which all ends.
    pub respawn: Option<Respawn>,
    /// The cgroups of the tenant's processes.
    pub leaves: Leaves,
    /// What the machine was started from.
    pub origin: Origin,
    /// The steps' times.
    pub phases: Vec<BootPhase>,
}

/// Goes through all steps. Call it in a process with one thread.
pub(super) fn boot() -> Result<Booted, BootError> {
    let mut steps = Steps { phases: Vec::new() };
    let origin = Origin::detect().map_err(|error| failed(Step::EarlyMounts, error))?;
    let arguments = match origin {
        Origin::GuestImage => {
            steps.run(Step::EarlyMounts, mounts::early)?;
            steps.run(Step::SwitchRoot, mounts::switch_root)?;
            let arguments = Arguments::read();
            steps.run(Step::Cgroups, || cgroups::prepare().and_then(|()| cgroups::protect_agent()))?;
            steps.run(Step::Rootfs, || mounts::rootfs(arguments.rootfs.as_deref()))?;
            steps.run(Step::Scratch, || mounts::scratch(arguments.scratch.as_deref(), false).map(drop))?;
            steps.run(Step::Overlay, mounts::overlay)?;
            arguments
        }
        Origin::Disk => {
            steps.run(Step::EarlyMounts, mounts::missing)?;
            let mut arguments = Arguments::read();
            steps.run(Step::Cgroups, || cgroups::prepare().and_then(|()| cgroups::protect_agent()))?;
            if arguments.container {
                container_root_of_disk(&mut steps, &mut arguments)?;
            }
            arguments
        }
    };
    steps.run(Step::Network, || envd_sys::bring_up("lo"))?;
    if !arguments.container {
        let (spawner, _) = steps.run(Step::Container, spawner::start_child)?;
        let leaves = steps.run(Step::Cgroups, || cgroups::enter(None, true))?;
        // Those that end are reaped with the orphans.
        let respawn: Option<Respawn> = Some(Box::new(|| spawner::start_child().map(|(socket, _)| socket)));
        return Ok(Booted {
            arguments,
            container: None,
            spawner,
            respawn,
            leaves,
            origin,
            phases: steps.phases,
        });
    }
    let (choices, init, spawner) = steps.run(Step::Container, || {
        let choices = Choices::parse(&arguments)?;
        let (init, spawner) = container::create(&choices)?;
        Ok((choices, init, spawner))
    })?;
    let leaves = steps.run(Step::Cgroups, || cgroups::enter(spawner.is_some().then(|| init.pid()), true))?;
    let (spawner, respawn) = match spawner {
        Some(spawner) => (spawner, None),
        None => {
            let pidfd = Arc::clone(init.pidfd());
            let respawn: Respawn = Box::new(move || enter::start(&pidfd, choices.profile));
            (steps.run(Step::Container, &respawn)?, Some(respawn))
        }
    };
    let container = Some(init);
    Ok(Booted { arguments, container, spawner, respawn, leaves, origin, phases: steps.phases })
}

/// Where the root is somebody's disk: that disk, or the one that is named, below a scratch disk where there is one.
fn container_root_of_disk(steps: &mut Steps, arguments: &mut Arguments) -> Result<(), BootError> {
    steps.run(Step::Rootfs, || match arguments.rootfs.as_deref() {
        Some(device) => mounts::rootfs(Some(device)),
        None => mounts::own_root(),
    })?;
    if steps.run(Step::Scratch, || mounts::scratch(arguments.scratch.as_deref(), true))? {
        return steps.run(Step::Overlay, mounts::overlay);
    }
    if !arguments.volumes.is_empty() {
        crate::log::warn(format_args!(
            "{} is ignored: without a scratch disk there is no overlay that a volume could not be on",
            names::ARG_VOLUME
        ));
    }
    arguments.has_overlay = false;
    steps.run(Step::Overlay, mounts::bare)
}

struct Steps {
    phases: Vec<BootPhase>,
}

impl Steps {
    fn run<T>(&mut self, step: Step, work: impl FnOnce() -> io::Result<T>) -> Result<T, BootError> {
        let start_us = microseconds_since_boot();
        let result = work().map_err(|error| failed(step, error))?;
        let end_us = microseconds_since_boot();
        self.phases.push(BootPhase { name: step.name().to_owned(), start_us, end_us });
        Ok(result)
    }
}

fn failed(step: Step, error: io::Error) -> BootError {
    BootError { step, message: error.to_string() }
}

fn microseconds_since_boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Neither is negative on this clock.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, has_serial: bool) -> Arguments {
        Arguments::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>(), has_serial)
    }

    #[test]
    fn arguments_choose_and_the_machine_decides_the_rest() {
        assert_eq!(parse("quiet", true).channel, Channel::Serial);
        assert_eq!(parse("quiet", false).channel, Channel::Vsock(1024));
        assert_eq!(parse("envd.channel=vsock envd.control_port=77", true).channel, Channel::Vsock(77));
        assert_eq!(parse("envd.channel=serial", false).channel, Channel::Serial);
        let arguments = parse("envd.container=none envd.rootfs=/dev/vdb", true);
        assert!(!arguments.container);
        assert_eq!(arguments.rootfs.as_deref(), Some("/dev/vdb"));
        assert!(parse("", true).container);
    }
}
