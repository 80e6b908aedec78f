//! What builds may take: of the machine together, and of each team.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::registry::RegistryUrl;

/// What the operator said about builds.
#[derive(Clone, Debug)]
pub struct BuildsConfig {
    /// Builds at once, of all teams.
    pub at_once: u32,
    /// Where RUN steps run.
    pub isolation: Isolation,
    /// Whether RUN steps have a network.
    pub network: bool,
    /// Where finished builds are pushed, and templates that are missing here are fetched.
    pub registry: Option<RegistryUrl>,
    /// The time between the end that is asked for and the one that is made.
    pub grace: Duration,
}

impl Default for BuildsConfig {
    fn default() -> Self {
        // One build keeps a processor busy, and under emulation two.
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Self {
            at_once: u32::try_from(cores.div_ceil(2)).unwrap_or(1),
            isolation: Isolation::Vm,
            network: true,
            registry: None,
            grace: Duration::from_secs(15),
        }
    }
}

/// Where RUN steps of teams run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// In virtual machines.
    #[default]
    Vm,
    /// In containers of this machine: root of a step is root of the machine.
    Container,
}

impl Isolation {
    /// As image-builder has it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Container => "container",
        }
    }
}

/// What the builds of a team may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildLimits {
    /// Builds at once.
    pub at_once: u32,
    /// Builds that were begun and have not ended, those that wait for their files among them.
    pub queued: u32,
    /// Templates.
    pub templates: u32,
    /// Disk for uploaded files, in MiB. Those that were not used for the longest time make room.
    pub uploads_mib: u32,
    /// Minutes that a build may take.
    pub minutes: u32,
}

impl Default for BuildLimits {
    fn default() -> Self {
        Self { at_once: 2, queued: 20, templates: 100, uploads_mib: 10 << 10, minutes: 60 }
    }
}

impl BuildLimits {
    /// Bytes of uploaded files.
    pub fn uploads(&self) -> u64 {
        u64::from(self.uploads_mib) << 20
    }

    /// The time of a build.
    pub fn time(&self) -> Duration {
        Duration::from_secs(u64::from(self.minutes) * 60)
    }
}

/// The folders of builds in the data folder.
#[derive(Clone, Debug)]
pub(super) struct Folders {
    /// One for each build that has not been forgotten: its request and its log.
    pub(super) builds: PathBuf,
    /// Files that clients sent, by team and hash.
    pub(super) uploads: PathBuf,
}

impl Folders {
    pub(super) fn of(data: &template::DataDir) -> Self {
        Self { builds: data.path().join("builds"), uploads: data.path().join("uploads") }
    }
}
