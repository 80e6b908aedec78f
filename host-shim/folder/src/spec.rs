//! `spec.json`: what a caller asks of a sandbox.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use envd_proto::boot;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::SandboxId;
use crate::network::NetworkSpec;

/// The version of `spec.json` that this crate writes and reads. From version 2 on, the one before is read too.
pub const SCHEMA_VERSION: u32 = 1;

/// The longest `spec.json` that is read. The largest environment that a Configure carries fits twice.
const MAX_SPEC: u64 = 512 << 10;

/// Something in a `spec.json` makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what}: {reason}")]
pub struct InvalidSpec {
    /// Which part.
    pub what: String,
    /// What was expected and what was got.
    pub reason: String,
}

impl InvalidSpec {
    fn new(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { what: what.into(), reason: reason.into() }
    }
}

/// The contents of `spec.json`. What is left out comes from the template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxSpec {
    /// Always 1 in this version.
    pub schema_version: u32,
    /// The sandbox's id; a fresh one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<SandboxId>,
    /// Path of the template's folder.
    pub template: PathBuf,
    /// Path of the guest kernel (an ELF vmlinux); the one that is installed beside host-shim when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Path of the guest image (an initramfs with envd); the one that is installed beside host-shim when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_image: Option<PathBuf>,
    /// Number of virtual CPUs, 1 to 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// RAM in MiB, 64 or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Size of the writable scratch disk in MiB, 16 or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u64>,
    /// Further disks, in the order in which the guest sees them. A sandbox with some is not paused or snapshotted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Its way out, and what it reaches.
    #[serde(default, skip_serializing_if = "NetworkSpec::is_default")]
    pub network: NetworkSpec,
    /// The virtual machine monitor.
    #[serde(default, skip_serializing_if = "VmmChoice::is_auto")]
    pub vmm: VmmChoice,
    /// What carries streams between host and guest.
    #[serde(default)]
    pub channel: ChannelChoice,
    /// What runs the guest's instructions.
    #[serde(default)]
    pub accelerator: AcceleratorChoice,
    /// What the container may do.
    #[serde(default)]
    pub profile: ProfileChoice,
    /// PID 1 of the container: `envd` (the agent's own), `image` (the image's /sbin/init), or the absolute path of a
    /// program in the image.
    #[serde(default = "default_init")]
    pub init: String,
    /// Environment of every process, over the template's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// User of processes that name none; the template's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Working directory of processes that name none; the template's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// Host name inside; the sandbox's id when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// When set, every client call but /health must carry it as X-Access-Token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The caller's own notes, shown by /info.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Seconds from the VMM's start to the agent's readiness, at most; 60 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_timeout_s: Option<u64>,
    /// Whether the sandbox goes on from a snapshot of its template.
    #[serde(default)]
    pub restore: RestoreChoice,
    /// Path of a snapshot's folder that the sandbox is a clone of, instead of one of its template's. It must fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<PathBuf>,
    /// Seconds after which the sandbox is stopped, from when it is somebody's; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// A disk of the caller's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Path of a file with the disk's bytes.
    pub path: PathBuf,
    /// What the guest knows it by (PARTNAME in /sys/class/block/*/uevent): 1 to 20 lowercase letters, digits and dashes.
    pub serial: String,
    /// Whether the guest may only read it. Only then may the file be another sandbox's too.
    #[serde(default)]
    pub read_only: bool,
}

impl std::str::FromStr for DiskSpec {
    type Err = String;

    /// `SERIAL=FILE`, or `SERIAL:ro=FILE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = text
            .split_once('=')
            .ok_or_else(|| format!("expected SERIAL=FILE or SERIAL:ro=FILE, got {text:?}"))?;
        let (serial, read_only) = match name.split_once(':') {
            None => (name, false),
            Some((serial, "ro")) => (serial, true),
            Some((_, mode)) => return Err(format!("expected SERIAL or SERIAL:ro, got the mode {mode:?}")),
        };
        Ok(Self { path: path.into(), serial: serial.to_owned(), read_only })
    }
}

/// Whether a sandbox goes on from a snapshot of its template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreChoice {
    /// Where there is one that fits; else the sandbox boots, and says why.
    #[default]
    Auto,
    /// It boots.
    Never,
    /// Without a snapshot that fits it fails.
    Always,
}

/// The virtual machine monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// Firecracker where it is installed, KVM runs guests and it can do what is asked for, else QEMU. What goes on from a
    /// snapshot has the one that the snapshot was made with.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker, named by $FIRECRACKER_BIN or in PATH. It needs KVM, and has a channel of its own.
    Firecracker,
}

impl VmmChoice {
    /// Whether it is left open. A spec that leaves it open is one that earlier versions of this program read too.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// What carries streams between host and guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelChoice {
    /// Firecracker's own vsock, and serial with QEMU.
    #[default]
    Auto,
    /// Two virtio-serial ports with a stream multiplexer; works everywhere.
    Serial,
    /// The kernel's vhost-vsock.
    VhostVsock,
    /// The external daemon vhost-device-vsock; real AF_VSOCK in the guest without help of the host's kernel.
    VhostUserVsock,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    /// KVM where a probe shows that it runs guests, else TCG.
    #[default]
    Auto,
    /// Hardware virtualization.
    Kvm,
    /// Software emulation: for trying and testing, not a security boundary.
    Tcg,
}

/// What the container may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ProfileChoice {
    /// All capabilities; the virtual machine is the boundary.
    #[default]
    Sandbox,
    /// Docker's capabilities, seccomp and device rules, no new privileges: the container is a boundary too.
    Restricted,
}

impl From<ProfileChoice> for boot::Profile {
    fn from(choice: ProfileChoice) -> Self {
        match choice {
            ProfileChoice::Sandbox => Self::Sandbox,
            ProfileChoice::Restricted => Self::Restricted,
        }
    }
}

fn default_init() -> String {
    boot::Init::default().to_string()
}

impl SandboxSpec {
    /// A spec that asks for nothing but a template.
    pub fn new(template: impl Into<PathBuf>) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            id: None,
            template: template.into(),
            kernel: None,
            guest_image: None,
            cpus: None,
            memory_mib: None,
            disk_mib: None,
            disks: Vec::new(),
            network: NetworkSpec::default(),
            vmm: VmmChoice::default(),
            channel: ChannelChoice::default(),
            accelerator: AcceleratorChoice::default(),
            profile: ProfileChoice::default(),
            init: default_init(),
            env: BTreeMap::new(),
            user: None,
            workdir: None,
            hostname: None,
            access_token: None,
            labels: BTreeMap::new(),
            boot_timeout_s: None,
            restore: RestoreChoice::default(),
            snapshot: None,
            timeout_s: None,
        }
    }

    /// Reads a `spec.json`. Relative paths in it are relative to the file's folder.
    pub fn read(path: &Path) -> Result<Self, InvalidSpec> {
        let unreadable =
            |error: std::io::Error| InvalidSpec::new("spec", format!("{}: {error}", path.display()));
        let length = std::fs::metadata(path).map_err(unreadable)?.len();
        if length > MAX_SPEC {
            return Err(InvalidSpec::new(
                path.display().to_string(),
                format!("{length} bytes, at most {MAX_SPEC} allowed"),
            ));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let mut spec = Self::parse(&text).map_err(|InvalidSpec { what, reason }| {
            InvalidSpec::new(format!("{what} in {}", path.display()), reason)
        })?;
        let base = path.parent().unwrap_or(Path::new("."));
        for relative in [
            Some(&mut spec.template),
            spec.kernel.as_mut(),
            spec.guest_image.as_mut(),
            spec.snapshot.as_mut(),
        ]
        .into_iter()
        .flatten()
        .chain(spec.disks.iter_mut().map(|disk| &mut disk.path))
        {
            *relative = base.join(&*relative);
        }
        Ok(spec)
    }

    /// Parses the text of a `spec.json`.
    pub fn parse(text: &str) -> Result<Self, InvalidSpec> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| InvalidSpec::new("spec", error.to_string()))?;
        // Before the fields: an unknown field of a later version should be told as what it is.
        match value.get("schema_version").and_then(serde_json::Value::as_u64) {
            Some(found) if found == u64::from(SCHEMA_VERSION) => {}
            Some(found) => {
                let reason =
                    format!("expected {SCHEMA_VERSION}, got {found}: use the host-shim of that version");
                return Err(InvalidSpec::new("schema_version", reason));
            }
            None => {
                let reason = format!("expected the number {SCHEMA_VERSION} (see `host-shim spec --schema`)");
                return Err(InvalidSpec::new("schema_version", reason));
            }
        }
        serde_json::from_value(value)
            .map_err(|error| InvalidSpec::new("spec", format!("{error} (see `host-shim spec --schema`)")))
    }

    /// The JSON Schema of `spec.json`.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_broken_json_are_refused_first() {
        for (text, expected) in [
            ("", "EOF while parsing"),
            ("{}", "invalid schema_version: expected the number 1"),
            (r#"{"schema_version":2,"novel":1}"#, "expected 1, got 2"),
            (r#"{"schema_version":1}"#, "missing field `template`"),
            ("[]", "invalid schema_version"),
        ] {
            let error = SandboxSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_vmm_that_is_left_open_is_not_named() {
        let spec = SandboxSpec::new("t");
        let text = serde_json::to_string(&spec).unwrap();
        assert!(
            !text.contains("vmm"),
            "an earlier version of this program refuses what it does not know: {text}"
        );
        assert_eq!(SandboxSpec::parse(&text).unwrap(), spec);
        let named = SandboxSpec { vmm: VmmChoice::Firecracker, ..spec };
        assert_eq!(SandboxSpec::parse(&serde_json::to_string(&named).unwrap()).unwrap(), named);
    }

    #[test]
    fn paths_in_a_spec_are_relative_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("spec.json");
        std::fs::write(&file, r#"{"schema_version":1,"template":"t","kernel":"/k"}"#).unwrap();
        let spec = SandboxSpec::read(&file).unwrap();
        assert_eq!(spec.template, dir.path().join("t"));
        assert_eq!(spec.kernel.as_deref(), Some(Path::new("/k")));
    }

    #[test]
    fn the_schema_changes_only_on_purpose() {
        insta::assert_json_snapshot!(SandboxSpec::schema());
    }
}
