//! `manifest.json`: what a snapshot is, what it fits, and the digest of every file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use envd_proto::boot;
use oci_spec::image::Digest;
use sandbox_folder::SandboxId;
use serde::{Deserialize, Serialize};

use super::Error;
use super::hash::Scheme;
use super::key::HostKey;
use crate::spec::CheckedSpec;
use crate::vmm::Kind;

/// The longest `manifest.json` that is read. The longest that is written has 64 volumes on one kernel command line, and
/// takes a few KiB.
pub(super) const MAX_MANIFEST: u64 = 64 << 10;

/// The longest device state that is taken. QEMU's is 86 KiB, and grows with devices and queues, not with the RAM.
pub const MAX_STATE: u64 = 64 << 20;

/// The version of `manifest.json` that this program writes and the only one that it reads. A machine of version 1 has no
/// network device.
pub const SCHEMA_VERSION: u32 = 2;

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

impl Manifest {
    /// Parses the text of a `manifest.json`; `path` names it in errors.
    pub fn parse(text: &[u8], path: &Path) -> Result<Self, Error> {
        let corrupt = |reason: String| Error::corrupt(path, reason);
        if text.len() as u64 > MAX_MANIFEST {
            return Err(corrupt(format!("{} bytes, expected at most {MAX_MANIFEST}", text.len())));
        }
        let value: serde_json::Value =
            serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
        // Before the fields: those of a later version should be told as what they are.
        match value.get("schema_version").and_then(serde_json::Value::as_u64) {
            Some(found) if found == u64::from(SCHEMA_VERSION) => {}
            Some(found) => {
                let reason = format!(
                    "schema version {found}, this program reads {SCHEMA_VERSION}: make the snapshot again"
                );
                return Err(Error::unsupported(path, reason));
            }
            None => return Err(corrupt("it has no schema_version".to_owned())),
        }
        let manifest: Self = serde_json::from_value(value).map_err(|error| corrupt(error.to_string()))?;
        manifest.check().map_err(corrupt)?;
        Ok(manifest)
    }

    /// Whether the files are those of a snapshot, and fit its machine.
    pub(super) fn check(&self) -> Result<(), String> {
        for name in [FileName::State, FileName::Ram, FileName::Scratch] {
            if !self.files.contains_key(&name) {
                return Err(format!("it names no file {name}"));
            }
        }
        if self.files.contains_key(&FileName::RamDelta) != self.files.contains_key(&FileName::ScratchOverlay)
        {
            return Err(format!(
                "expected both or none of {} and {}, got one",
                FileName::RamDelta,
                FileName::ScratchOverlay
            ));
        }
        for (name, entry) in &self.files {
            if let Some(digest) = entry.digest.as_ref().filter(|digest| !name.scheme().made(digest)) {
                return Err(format!("{name} has the digest {digest}, which is of another kind"));
            }
        }
        let key = &self.description.key;
        let guest = &self.description.guest;
        for digest in [&key.cpu, &guest.kernel, &guest.guest_image, &guest.rootfs] {
            if !Scheme::Plain.made(digest) {
                return Err(format!("expected sha256:, got the digest {digest}"));
            }
        }
        let machine = &self.description.machine;
        let (ram, disk) = (machine.memory_mib.checked_mul(1 << 20), machine.disk_mib.checked_mul(1 << 20));
        let (Some(ram), Some(disk)) = (ram, disk) else {
            return Err("its machine has sizes that no machine has".to_owned());
        };
        let size = |name| self.files.get(&name).map_or(0, |entry| entry.size);
        if ram == 0 || size(FileName::Ram) != ram {
            return Err(format!("{} has {} bytes, the RAM has {ram}", FileName::Ram, size(FileName::Ram)));
        }
        if size(FileName::Scratch) == 0 || size(FileName::Scratch) > disk {
            let got = size(FileName::Scratch);
            return Err(format!("{} has {got} bytes, expected 1 to {disk}", FileName::Scratch));
        }
        if size(FileName::State) == 0 || size(FileName::State) > MAX_STATE {
            let got = size(FileName::State);
            return Err(format!("{} has {got} bytes, expected 1 to {MAX_STATE}", FileName::State));
        }
        Ok(())
    }

    /// The text of a `manifest.json`.
    pub(super) fn text(&self) -> serde_json::Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(text)
    }
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

impl SnapshotMachine {
    /// The machine that a spec asks of a VMM.
    pub fn of(spec: &CheckedSpec, vmm: Kind) -> Self {
        Self {
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            channel: match vmm {
                Kind::Qemu => SnapshotChannel::Serial,
                Kind::Firecracker => SnapshotChannel::HybridVsock,
            },
            profile: spec.profile,
            init: spec.init.clone(),
            volumes: spec.volumes.clone(),
        }
    }
}

/// The channels of which a VM can be snapshotted. (vhost-user devices cannot be migrated by QEMU 7.2 to 10.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotChannel {
    /// Two virtio-serial ports.
    Serial,
    /// The kernel's vhost-vsock.
    VhostVsock,
    /// The VMM's own vsock.
    HybridVsock,
}

impl SnapshotChannel {
    /// Its name, as [`crate::channel::Prepared::name`] says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::VhostVsock => "vhost-vsock",
            Self::HybridVsock => "hybrid-vsock",
        }
    }
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

impl FileName {
    /// Every name.
    pub const ALL: [Self; 6] =
        [Self::Ram, Self::RamDelta, Self::State, Self::Scratch, Self::ScratchOverlay, Self::Rootfs];

    /// The name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::RamDelta => "ram.delta",
            Self::State => "state",
            Self::Scratch => "scratch.ext4",
            Self::ScratchOverlay => "scratch.qcow2",
            Self::Rootfs => "rootfs.ext4",
        }
    }

    /// How its digest is computed: a template says the rootfs's plain one, and a state is small.
    pub fn scheme(self) -> Scheme {
        match self {
            Self::State | Self::Rootfs => Scheme::Plain,
            Self::Ram | Self::RamDelta | Self::Scratch | Self::ScratchOverlay => Scheme::Sparse,
        }
    }

    /// The mode of a file that is done. Nobody writes it any more, but QEMU before 8.2 opens the RAM read-write even when
    /// it maps it privately, so there its owner keeps the right.
    pub(super) fn mode(self) -> u32 {
        match self {
            Self::Ram => 0o600,
            _ => 0o400,
        }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Length in bytes.
    pub size: u64,
    /// Digest of the contents, in the file's own scheme (see [`super::hash`]). Absent in what was not to survive a power
    /// cut ([`super::Durability::Volatile`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::snapshot::hash;

    pub(in crate::snapshot) fn description() -> Description {
        let digest = |text: &str| hash::digest_of(text.as_bytes());
        Description {
            key: HostKey {
                vmm: "QEMU".into(),
                vmm_version: "7.2.22".into(),
                accelerator: "tcg".into(),
                cpu: digest("cpu"),
            },
            machine: SnapshotMachine {
                cpus: 1,
                memory_mib: 256,
                disk_mib: 1024,
                channel: SnapshotChannel::Serial,
                profile: boot::Profile::Sandbox,
                init: boot::Init::Path("/sbin/my init".into()),
                volumes: vec!["/data".into()],
            },
            guest: GuestKey {
                kernel: digest("kernel"),
                guest_image: digest("guest"),
                rootfs: digest("rootfs"),
            },
            agent: AgentVersion { version: "0.1.0".into(), protocol: 3 },
            origin: Origin { verb: Verb::Pause, sandbox: "abc1".parse().unwrap() },
            generation: 7,
            startup_done: true,
            created_unix_s: 1_700_000_000,
        }
    }

    fn manifest() -> Manifest {
        let sparse: Digest = format!("sha256+sparse:{}", "a".repeat(64)).parse().unwrap();
        let entry = |name: FileName, size| {
            let digest = match name.scheme() {
                Scheme::Plain => hash::digest_of(b"x"),
                Scheme::Sparse => sparse.clone(),
            };
            (name, FileEntry { size, digest: Some(digest) })
        };
        Manifest {
            schema_version: SCHEMA_VERSION,
            description: description(),
            files: BTreeMap::from([
                entry(FileName::Ram, 256 << 20),
                entry(FileName::RamDelta, 5000),
                entry(FileName::State, 43_000),
                entry(FileName::Scratch, 1 << 30),
                entry(FileName::ScratchOverlay, 1 << 18),
            ]),
        }
    }

    fn parse(text: &[u8]) -> Result<Manifest, Error> {
        Manifest::parse(text, Path::new("/s/manifest.json"))
    }

    #[test]
    fn a_manifest_changes_only_on_purpose() {
        let text = manifest().text().unwrap();
        insta::assert_snapshot!(String::from_utf8(text.clone()).unwrap());
        assert_eq!(parse(&text).unwrap(), manifest());
        assert!(text.len() as u64 * 4 < MAX_MANIFEST);
        for name in FileName::ALL {
            assert_eq!(serde_json::to_value(name).unwrap(), name.as_str());
        }
        // Fields of a later writer of this version are not in the way.
        let more = String::from_utf8(text).unwrap().replacen('{', "{\"novel\": [1],", 1);
        assert_eq!(parse(more.as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        let text = String::from_utf8(manifest().text().unwrap()).unwrap();
        let sparse = format!("sha256+sparse:{}", "a".repeat(64));
        for (from, to, expected) in [
            (text.as_str(), "", "EOF while parsing"),
            (text.as_str(), "[]", "no schema_version"),
            ("\"schema_version\": 2", "\"schema_version\": 1", "schema version 1, this program reads 2"),
            ("\"schema_version\": 2", "\"schema_version\": \"2\"", "no schema_version"),
            ("\"ram\": {", "\"../ram\": {", "unknown variant `../ram`"),
            (
                "\"ram.delta\": {",
                "\"rootfs.ext4\": {",
                "expected both or none of ram.delta and scratch.qcow2",
            ),
            ("\"size\": 268435456", "\"size\": 268435455", "ram has 268435455 bytes, the RAM has 268435456"),
            ("\"size\": 1073741824", "\"size\": 1073741825", "scratch.ext4 has 1073741825 bytes"),
            ("\"size\": 43000", "\"size\": 0", "state has 0 bytes"),
            ("\"memory_mib\": 256", "\"memory_mib\": 18446744073709551615", "sizes that no machine has"),
            (&sparse, "sha256:00", "Invalid digest"),
            (&sparse, "sha256+sparse:00", "has the digest sha256+sparse:00"),
            ("\"tcg\"", "7", "expected a string"),
            ("\"sandbox\": \"abc1\"", "\"sandbox\": \"../..\"", "invalid sandbox id"),
            ("\"profile\": \"sandbox\"", "\"profile\": \"none\"", "expected sandbox or restricted"),
            ("/sbin/my init", "sbin", "init: expected"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = parse(text.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("/s/manifest.json"), "{to}: {error}");
        }
        let error = parse(&vec![b' '; MAX_MANIFEST as usize + 1]).unwrap_err().to_string();
        assert!(error.contains("65537 bytes, expected at most 65536"), "{error}");
    }
}
