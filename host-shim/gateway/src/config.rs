//! What the operator said, checked.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use template::DataDir;

use crate::builds::BuildsConfig;

/// The port that the SDKs' debug mode expects.
pub const DEFAULT_PORT: u16 = 3000;

/// What the operator said.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the one port is.
    pub listen: SocketAddr,
    /// The domain of host labels, `<port>-<id>.<domain>`, as clients are told it: with `:<port>` where theirs is another.
    pub domain: String,
    /// Images, templates, sandboxes, `gateway.db`.
    pub data: DataDir,
    /// The program `host-shim`.
    pub host_shim: PathBuf,
    /// The program `image-builder`, for the template `base` and for builds.
    pub image_builder: PathBuf,
    /// The guest kernel, where it is not the installed one.
    pub kernel: Option<PathBuf>,
    /// The guest image, where it is not the installed one.
    pub guest_image: Option<PathBuf>,
    /// The channel of new sandboxes, as in a spec (`auto` by default).
    pub channel: sandbox_folder::spec::ChannelChoice,
    /// Whether sandboxes may run without hardware virtualization.
    pub allow_emulation: bool,
    /// What the machine gives to sandboxes, all together.
    pub capacity: Capacity,
    /// How templates are built for teams.
    pub builds: BuildsConfig,
}

impl Config {
    /// The domain's name, without a port.
    pub fn domain_name(&self) -> &str {
        self.domain.split_once(':').map_or(self.domain.as_str(), |(name, _)| name)
    }
}

/// An amount of what sandboxes need; the limit of a team or of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Capacity {
    /// Sandboxes at once.
    pub sandboxes: u32,
    /// Virtual CPUs of them together.
    pub cpus: u32,
    /// RAM of them together, in MiB.
    pub memory_mib: u64,
}

/// What is left to the host's own kernel, page cache and programs, and to the VMMs beside their guests' RAM: this part of
/// its RAM, and at least the other.
const RESERVED_PART: u64 = 10;
const RESERVED_MIB: u64 = 512;

/// Virtual CPUs for each of the host's: sandboxes mostly wait, for their users and for the network.
const CPUS_PER_CORE: u32 = 8;

/// Sandboxes at once, where nothing else limits them: each is three processes and some hundred file descriptors.
const MAX_SANDBOXES: u32 = 1000;

impl Capacity {
    /// More than any machine has. Fits into the database's signed numbers.
    pub const UNLIMITED: Self = Self { sandboxes: u32::MAX, cpus: u32::MAX, memory_mib: u32::MAX as u64 };

    /// What this machine can give to sandboxes. RAM is never promised twice, CPUs are.
    pub fn of_this_machine() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let info = rustix::system::sysinfo();
        let memory_mib = (info.totalram as u64).saturating_mul(info.mem_unit.into()) >> 20;
        let reserved = (memory_mib / RESERVED_PART).max(RESERVED_MIB);
        Self {
            sandboxes: MAX_SANDBOXES,
            cpus: u32::try_from(cores).unwrap_or(u32::MAX).saturating_mul(CPUS_PER_CORE),
            memory_mib: memory_mib.saturating_sub(reserved),
        }
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            cpus: self.cpus.saturating_add(other.cpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
        }
    }

    /// What is left without the other.
    pub fn minus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_sub(other.sandboxes),
            cpus: self.cpus.saturating_sub(other.cpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
        }
    }

    /// Whether no part of it is more than that of `limit`.
    pub fn fits(self, limit: Self) -> bool {
        self.sandboxes <= limit.sandboxes && self.cpus <= limit.cpus && self.memory_mib <= limit.memory_mib
    }
}

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: u32| if count == 1 { "" } else { "s" };
        let Self { sandboxes, cpus, memory_mib } = *self;
        write!(f, "{sandboxes} sandbox{}", if sandboxes == 1 { "" } else { "es" })?;
        write!(f, ", {cpus} CPU{}, {memory_mib} MiB", plural(cpus))
    }
}
