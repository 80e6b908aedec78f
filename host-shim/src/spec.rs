//! `spec.json`: what a caller asks of a sandbox. Parsed once into checked values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use envd_proto::boot;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use template::{RuntimeConfig, TemplateFolder};

use crate::{Error, SandboxId};

/// The version of `spec.json` that this program writes and reads. From version 2 on, the one before is read too.
pub const SCHEMA_VERSION: u32 = 1;

/// The longest `spec.json` that is read. The largest environment that a Configure carries fits twice.
const MAX_SPEC: u64 = 512 << 10;

/// Virtual CPUs at most: microvm's interrupt controller in QEMU serves 255, and nobody tested more.
const MAX_CPUS: u32 = 64;

/// RAM below which the guest kernel and the agent do not fit.
const MIN_MEMORY_MIB: u64 = 64;

/// RAM at most, 1 TiB: a typing error is found here and not by the out-of-memory killer.
const MAX_MEMORY_MIB: u64 = 1 << 20;

/// The smallest scratch disk on which a file system is useful.
const MIN_DISK_MIB: u64 = 16;

/// The largest scratch disk, 16 TiB: the limit of ext4 with 4 KiB blocks and 32-bit block numbers.
const MAX_DISK_MIB: u64 = 16 << 20;

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
}

/// What carries streams between host and guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelChoice {
    /// The kernel's vhost-vsock where /dev/vhost-vsock can be opened, else serial.
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
        }
    }

    /// Reads a `spec.json`. Relative paths in it are relative to the file's folder.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let unreadable =
            |error: std::io::Error| Error::invalid("spec", format!("{}: {error}", path.display()));
        let length = std::fs::metadata(path).map_err(unreadable)?.len();
        if length > MAX_SPEC {
            return Err(Error::invalid(
                path.display().to_string(),
                format!("{length} bytes, at most {MAX_SPEC} allowed"),
            ));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let mut spec = Self::parse(&text).map_err(|error| match error {
            Error::Invalid { what, reason } => {
                Error::Invalid { what: format!("{what} in {}", path.display()), reason }
            }
            other => other,
        })?;
        let base = path.parent().unwrap_or(Path::new("."));
        for relative in
            [Some(&mut spec.template), spec.kernel.as_mut(), spec.guest_image.as_mut()].into_iter().flatten()
        {
            *relative = base.join(&*relative);
        }
        Ok(spec)
    }

    /// Parses the text of a `spec.json`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|error| Error::invalid("spec", error.to_string()))?;
        // Before the fields: an unknown field of a later version should be told as what it is.
        match value.get("schema_version").and_then(serde_json::Value::as_u64) {
            Some(found) if found == u64::from(SCHEMA_VERSION) => {}
            Some(found) => {
                let reason =
                    format!("expected {SCHEMA_VERSION}, got {found}: use the host-shim of that version");
                return Err(Error::invalid("schema_version", reason));
            }
            None => {
                let reason = format!("expected the number {SCHEMA_VERSION} (see `host-shim spec --schema`)");
                return Err(Error::invalid("schema_version", reason));
            }
        }
        serde_json::from_value(value)
            .map_err(|error| Error::invalid("spec", format!("{error} (see `host-shim spec --schema`)")))
    }

    /// The JSON Schema of `spec.json`.
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(Self)
    }

    /// Opens the template and checks every value; what is absent is taken from the template.
    pub fn check(self) -> Result<CheckedSpec, Error> {
        let template = TemplateFolder::open(&self.template)?;
        let machine = template.template().machine;
        let RuntimeConfig { mut env, user, workdir, volumes, .. } = template.template().runtime.clone();

        let cpus = self.cpus.unwrap_or(machine.cpus);
        within("cpus", u64::from(cpus), 1, u64::from(MAX_CPUS), "")?;
        let memory_mib = self.memory_mib.unwrap_or(machine.memory_mib);
        within("memory", memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB, " MiB")?;
        let disk_mib = self.disk_mib.unwrap_or(machine.disk_mib);
        within("disk", disk_mib, MIN_DISK_MIB, MAX_DISK_MIB, " MiB")?;
        let boot_timeout_s = self.boot_timeout_s.unwrap_or(DEFAULT_BOOT_TIMEOUT_S);
        within("boot timeout", boot_timeout_s, 1, 24 * 3600, " s")?;
        let init: boot::Init = self.init.parse().map_err(|error: boot::InvalidChoice| {
            Error::invalid(error.what, format!("expected {}, got {:?}", error.expected, error.got))
        })?;
        let volumes = check_volumes(&volumes)?;
        for (name, value) in &self.env {
            check_env(name, value)?;
        }
        env.extend(self.env);

        let id = match self.id {
            Some(id) => id,
            None => {
                SandboxId::generate_here().map_err(Error::io("read random bytes from", "getrandom(2)"))?
            }
        };
        let hostname = self.hostname.unwrap_or_else(|| id.to_string());
        check_hostname(&hostname)?;
        for (what, text) in [("user", &self.user), ("workdir", &self.workdir)] {
            if text.as_ref().is_some_and(|text| text.contains('\0')) {
                return Err(Error::invalid(what, "expected a text without NUL bytes"));
            }
        }
        let workdir = self.workdir.unwrap_or(workdir);
        if !workdir.is_empty() && !workdir.starts_with('/') {
            return Err(Error::invalid("workdir", format!("expected an absolute path, got {workdir:?}")));
        }
        let access_token = self.access_token;
        if let Some(token) = &access_token
            && (token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            // It travels in an HTTP header.
            return Err(Error::invalid("access_token", "expected one or more visible ASCII characters"));
        }
        Ok(CheckedSpec {
            id,
            template,
            kernel: self.kernel,
            guest_image: self.guest_image,
            cpus,
            memory_mib,
            disk_mib,
            channel: self.channel,
            accelerator: self.accelerator,
            profile: self.profile.into(),
            init,
            volumes,
            env,
            user: self.user.unwrap_or(user),
            workdir,
            hostname,
            access_token,
            labels: self.labels,
            boot_timeout: std::time::Duration::from_secs(boot_timeout_s),
        })
    }
}

/// Seconds that a boot may take. An emulated boot on a busy machine was seen to take 4.
pub const DEFAULT_BOOT_TIMEOUT_S: u64 = 60;

/// A spec whose values are all there and all make sense.
#[derive(Clone, Debug)]
pub struct CheckedSpec {
    /// The sandbox's id.
    pub id: SandboxId,
    /// The template.
    pub template: TemplateFolder,
    /// The guest kernel, when the caller named one.
    pub kernel: Option<PathBuf>,
    /// The guest image, when the caller named one.
    pub guest_image: Option<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Scratch disk in MiB.
    pub disk_mib: u64,
    /// The channel that was asked for.
    pub channel: ChannelChoice,
    /// The accelerator that was asked for.
    pub accelerator: AcceleratorChoice,
    /// What the container may do.
    pub profile: boot::Profile,
    /// PID 1 of the container.
    pub init: boot::Init,
    /// The image's volumes, as absolute paths.
    pub volumes: Vec<String>,
    /// The template's environment with the caller's over it.
    pub env: BTreeMap<String, String>,
    /// Default user; empty means root.
    pub user: String,
    /// Default working directory; empty means the agent's choice.
    pub workdir: String,
    /// Host name inside.
    pub hostname: String,
    /// The token that clients must carry.
    pub access_token: Option<String>,
    /// The caller's notes.
    pub labels: BTreeMap<String, String>,
    /// Time from the VMM's start to the agent's readiness.
    pub boot_timeout: std::time::Duration,
}

/// The paths that the image declares, as the agent takes them; they travel on the kernel's command line.
fn check_volumes(declared: &[String]) -> Result<Vec<String>, Error> {
    let mut volumes = Vec::with_capacity(declared.len());
    for path in declared {
        let normal = boot::normal_volume(path);
        volumes.push(normal.ok_or_else(|| {
            Error::invalid(
                "volume",
                format!("the image declares {path:?}, expected an absolute path below /"),
            )
        })?);
    }
    volumes.sort();
    volumes.dedup();
    let length: usize =
        volumes.iter().map(|path| boot::encode_path(path).len() + boot::ARG_VOLUME.len() + 2).sum();
    // One place is the agent's own.
    if volumes.len() >= boot::MAX_VOLUMES || length > boot::MAX_VOLUME_ARGUMENTS {
        let reason = format!(
            "the image declares {} that take {length} bytes, at most {} and {} bytes are possible",
            volumes.len(),
            boot::MAX_VOLUMES - 1,
            boot::MAX_VOLUME_ARGUMENTS
        );
        return Err(Error::invalid("volumes", reason));
    }
    Ok(volumes)
}

/// A variable that execve(2) can pass on.
pub(crate) fn check_env(name: &str, value: &str) -> Result<(), Error> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(Error::invalid("env", format!("expected a name without '=' and NUL, got {name:?}")));
    }
    if value.contains('\0') {
        return Err(Error::invalid("env", format!("the value of {name} has a NUL byte")));
    }
    Ok(())
}

fn check_hostname(name: &str) -> Result<(), Error> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    // 64 is Linux's limit (HOST_NAME_MAX).
    if name.len() <= 64 && name.split('.').all(label) {
        return Ok(());
    }
    Err(Error::invalid(
        "hostname",
        format!("expected at most 64 of letters, digits, '-' and '.', got {name:?}"),
    ))
}

fn within(what: &str, value: u64, low: u64, high: u64, unit: &str) -> Result<(), Error> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(what, format!("expected {low} to {high}{unit}, got {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_template;

    #[test]
    fn the_template_fills_in_what_the_caller_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let template = test_template::write(dir.path());
        let spec = SandboxSpec::parse(&format!(
            r#"{{"schema_version":1,"template":{template:?},"cpus":2,"env":{{"A":"mine"}},"channel":"vhost-user-vsock"}}"#
        ))
        .unwrap()
        .check()
        .unwrap();
        assert_eq!((spec.cpus, spec.memory_mib, spec.disk_mib), (2, 512, 1024));
        assert_eq!(spec.env["A"], "mine");
        assert_eq!(spec.env["PATH"], "/bin");
        assert_eq!((spec.user.as_str(), spec.workdir.as_str()), ("user", "/work"));
        assert_eq!(spec.hostname, spec.id.as_str());
        assert_eq!(spec.channel, ChannelChoice::VhostUserVsock);
        assert_eq!(spec.boot_timeout.as_secs(), DEFAULT_BOOT_TIMEOUT_S);
    }

    #[test]
    fn bad_input_is_told_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let template = test_template::write(dir.path());
        for (fields, expected) in [
            (r#""cpus":0"#, "invalid cpus: expected 1 to 64, got 0"),
            (r#""memory_mib":5"#, "invalid memory: expected 64 to 1048576 MiB, got 5"),
            (r#""disk_mib":1"#, "invalid disk: expected 16 to"),
            (r#""boot_timeout_s":0"#, "invalid boot timeout: expected 1 to"),
            (r#""cpu":1"#, "unknown field `cpu`, expected one of"),
            (r#""profile":"none""#, "unknown variant `none`, expected `sandbox` or `restricted`"),
            (r#""init":"systemd""#, "invalid init: expected envd, image or the absolute path"),
            (r#""channel":"tcp""#, "unknown variant `tcp`"),
            (r#""id":"A""#, "invalid sandbox id \"A\""),
            (r#""hostname":"a_b""#, "invalid hostname"),
            (r#""env":{"a=b":""}"#, "invalid env: expected a name without '='"),
            (r#""env":{"a":"\u0000"}"#, "the value of a has a NUL byte"),
            (r#""workdir":"tmp""#, "invalid workdir: expected an absolute path, got \"tmp\""),
            (r#""access_token":"a b""#, "invalid access_token"),
        ] {
            let text = format!(r#"{{"schema_version":1,"template":{template:?},{fields}}}"#);
            let error = SandboxSpec::parse(&text).and_then(SandboxSpec::check).unwrap_err();
            assert!(error.to_string().contains(expected), "{fields}: {error}");
            assert!(error.is_bad_input());
        }
    }

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
    fn paths_in_a_spec_are_relative_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("spec.json");
        std::fs::write(&file, r#"{"schema_version":1,"template":"t","kernel":"/k"}"#).unwrap();
        let spec = SandboxSpec::read(&file).unwrap();
        assert_eq!(spec.template, dir.path().join("t"));
        assert_eq!(spec.kernel.as_deref(), Some(Path::new("/k")));
        assert!(matches!(spec.check(), Err(Error::Template(template::Error::Missing { .. }))));
    }

    #[test]
    fn the_schema_changes_only_on_purpose() {
        insta::assert_json_snapshot!(SandboxSpec::schema());
    }
}
