//! What the operator said, checked.

use std::net::SocketAddr;
use std::path::PathBuf;

use template::DataDir;

/// The port that the SDKs' debug mode expects.
pub const DEFAULT_PORT: u16 = 3000;

/// What the operator said.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the one port is.
    pub listen: SocketAddr,
    /// The domain of host labels: `<port>-<id>.<domain>`.
    pub domain: String,
    /// Images, templates, sandboxes, `gateway.db`.
    pub data: DataDir,
    /// The program `host-shim`.
    pub host_shim: PathBuf,
    /// The program `image-builder`, for the template `base`.
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
