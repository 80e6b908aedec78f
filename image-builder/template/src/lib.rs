//! The template folder: what a sandbox starts from.
//!
//! ```text
//! templates/NAME/
//!   template.json    this crate's [`Template`]
//!   rootfs.ext4      read-only, shared by every sandbox of the template
//!   snapshots/       of the booted, ready machine, one for each kind of host (`host-shim template warm`)
//! ```
//!
//! `image-builder` writes the folder, `host-shim` reads it; neither links the other, so the contract between them has a
//! crate of its own. A folder is written under a temporary name, synced and renamed ([`NewTemplate`]): a template is
//! whole or absent, and after that its files are only ever unlinked.

mod data_dir;
mod folder;
mod name;

use std::collections::BTreeMap;

pub use data_dir::DataDir;
pub use folder::{Error, MAX_TEMPLATE_JSON, NewTemplate, TemplateFolder, parse_template, sweep};
pub use name::{InvalidName, TemplateName};

use oci_spec::image::Digest;
use serde::{Deserialize, Serialize};

/// The version of `template.json` that this crate writes and the only one that it reads.
pub const SCHEMA_VERSION: u32 = 1;

/// The file of a template folder that holds its [`Template`].
pub const TEMPLATE_FILE: &str = "template.json";

/// The file of a template folder that holds the root file system.
pub const ROOTFS_FILE: &str = "rootfs.ext4";

/// The folder of a template folder with its snapshots, one for each kind of host. Only `host-shim` looks into them.
pub const SNAPSHOTS: &str = "snapshots";

/// The contents of `template.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Where the root file system came from.
    pub image: SourceImage,
    /// Digest of the guest kernel that the template was made for, where one was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Digest>,
    /// Digest of the guest image (initramfs) that the template was made for, where one was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_image: Option<Digest>,
    /// The root file system beside this file.
    pub rootfs: Rootfs,
    /// What the image says about running it.
    pub runtime: RuntimeConfig,
    /// The size of the machine when a sandbox does not ask for another.
    pub machine: Machine,
    /// Whether it is a sandbox's snapshot: its disk and its processes are in `snapshots/` alone, and a boot would not have them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub snapshot_only: bool,
}

/// The OCI image that a template was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceImage {
    /// The reference as the user gave it.
    pub reference: String,
    /// Digest of the image's manifest.
    pub digest: Digest,
}

/// The root file system of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    /// Digest of `rootfs.ext4`.
    pub digest: Digest,
    /// Length of `rootfs.ext4` in bytes. A shorter file is refused before a boot.
    pub size: u64,
}

/// The runtime part of an image's config (OCI image-spec 1.1, config.md), with the template's own commands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// Environment of every process.
    pub env: BTreeMap<String, String>,
    /// `USER` of the image; empty means root.
    pub user: String,
    /// `WORKDIR` of the image; empty means `/`.
    pub workdir: String,
    /// `ENTRYPOINT` of the image.
    pub entrypoint: Vec<String>,
    /// `CMD` of the image.
    pub cmd: Vec<String>,
    /// Ports that the image says it listens on, as `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Paths that sit on the scratch disk itself, not on the overlay.
    pub volumes: Vec<String>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// A shell command that is started in each sandbox before anybody gets it, and runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_command: Option<String>,
    /// A shell command that fails until the sandbox is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_command: Option<String>,
}

/// The label of an image whose value is the [`RuntimeConfig::start_command`] of templates that do not say another.
pub const START_LABEL: &str = "tiffin.start";

/// The label of an image whose value is the [`RuntimeConfig::ready_command`] of templates that do not say another.
pub const READY_LABEL: &str = "tiffin.ready";

/// The size of a sandbox's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Size of the scratch disk in MiB.
    pub disk_mib: u64,
}

impl Default for Machine {
    fn default() -> Self {
        Self { cpus: 1, memory_mib: 512, disk_mib: 1024 }
    }
}
