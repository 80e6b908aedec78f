//! `manifest.json`: what a snapshot is, what it fits, and the digest of every file.

use std::collections::BTreeMap;

use envd_proto::boot;
use oci_spec::image::Digest;
use sandbox_folder::SandboxId;
use serde::{Deserialize, Serialize};

use super::key::HostKey;

/// The version of `manifest.json` that this program writes and the only one that it reads.
pub const SCHEMA_VERSION: u32 = 1;

/// The file of a snapshot folder that holds its [`Manifest`].
pub const MANIFEST_FILE: &str = "manifest.json";

/// The contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// What the taker of the snapshot says about it.
    #[serde(flatten)]
    pub description: Description,
    /// Every file beside this one. Nothing that is not named here is used.
    pub files: BTreeMap<FileName, FileEntry>,
}

/// What the taker of a snapshot says about it; the writer of the folder adds the files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The VMM and the CPU on which it can be restored.
    pub key: HostKey,
    /// The machine that was stopped.
    pub machine: SnapshotMachine,
    /// What ran in it.
    pub guest: GuestKey,
    /// The agent in the RAM.
    pub agent: AgentVersion,
    /// Where it comes from.
    pub origin: Origin,
    /// The generation of the VM that was stopped: 0 after a boot; each restore raises it.
    pub generation: u64,
    /// Whether the template's start and ready commands had succeeded.
    pub startup_done: bool,
    /// When it was taken, seconds since 1970.
    pub created_unix_s: u64,
}

/// The machine that a snapshot was taken of; a restore must make the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMachine {
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB, the length of `ram`.
    pub memory_mib: u64,
    /// Size of the scratch device in MiB; `scratch.ext4` is no longer, and shorter where the device was grown.
    pub disk_mib: u64,
    /// What carries streams between host and guest.
    pub channel: SnapshotChannel,
    /// What the container may do.
    #[serde(with = "profile_name")]
    pub profile: boot::Profile,
    /// PID 1 of the container.
    #[serde(with = "init_name")]
    pub init: boot::Init,
    /// Paths of the container that sit on the scratch disk itself.
    pub volumes: Vec<String>,
}

/// The channels of which a VM can be snapshotted. (vhost-user devices cannot be migrated by QEMU 7.2 to 10.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotChannel {
    /// Two virtio-serial ports.
    Serial,
    /// The kernel's vhost-vsock.
    VhostVsock,
}

/// What the guest was booted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestKey {
    /// The guest kernel.
    pub kernel: Digest,
    /// The guest image.
    pub guest_image: Digest,
    /// The root file system.
    pub rootfs: Digest,
}

/// The agent, as it named itself in its Hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentVersion {
    /// Its version.
    pub version: String,
    /// The version of the protocol that it speaks.
    pub protocol: u32,
}

/// Where a snapshot comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What it was taken for.
    pub verb: Verb,
    /// The sandbox that was stopped.
    pub sandbox: SandboxId,
}

/// What a snapshot was taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// `template create` and `template warm`: sandboxes are clones of it.
    Template,
    /// `snapshot`: sandboxes are clones of it.
    Snapshot,
    /// `fork`: the forks are clones of it; it goes with them.
    Fork,
    /// `pause`: resumed as the same sandbox.
    Pause,
}

/// The files that a snapshot can have beside its manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FileName {
    /// Base: the guest's RAM.
    #[serde(rename = "ram")]
    Ram,
    /// Delta: the pages that differ from the base's.
    #[serde(rename = "ram.delta")]
    RamDelta,
    /// Device state of the VMM.
    #[serde(rename = "state")]
    State,
    /// Base: the scratch disk.
    #[serde(rename = "scratch.ext4")]
    Scratch,
    /// Delta: a qcow2 overlay over the base's scratch disk.
    #[serde(rename = "scratch.qcow2")]
    ScratchOverlay,
    /// The template's root file system.
    #[serde(rename = "rootfs.ext4")]
    Rootfs,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes.
    pub size: u64,
    /// Digest of the contents, in the file's own scheme (see [`super::hash`]).
    pub digest: Digest,
}

macro_rules! as_text {
    ($module:ident, $type:ty, $text:expr) => {
        mod $module {
            use serde::{Deserialize, Deserializer, Serializer};

            pub(super) fn serialize<S: Serializer>(value: &$type, out: S) -> Result<S::Ok, S::Error> {
                let text: fn(&$type) -> String = $text;
                out.serialize_str(&text(value))
            }

            pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<$type, D::Error> {
                String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(profile_name, envd_proto::boot::Profile, |profile| profile.name().to_owned());
as_text!(init_name, envd_proto::boot::Init, |init| init.to_string());
