//! Checks a `spec.json` against the template and against what this program can do.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use envd_proto::boot;
use oci_spec::image::Digest;
use sandbox_folder::SandboxId;
use sandbox_folder::calls::ConfigureRequest;
use sandbox_folder::spec::{
    AcceleratorChoice, ChannelChoice, DiskSpec, RestoreChoice, SandboxSpec, VmmChoice,
};
use template::{ROOTFS_FILE, RuntimeConfig, TemplateFolder};

use crate::Error;
use crate::network::Plan;
use crate::snapshot::{Description, FileName, SnapshotFolder};
use crate::vmm::{Kind, Wishes};

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

/// Further disks at most: the guest's kernel numbers 15 partitions of a virtio disk without more ado.
const MAX_DISKS: usize = 15;

/// The longest serial number of a further disk: what virtio takes, though they are names of partitions.
const MAX_SERIAL: usize = 20;

/// Seconds that a boot may take. An emulated boot on a busy machine was seen to take 4.
pub const DEFAULT_BOOT_TIMEOUT_S: u64 = 60;

/// The longest life that can be asked for, a hundred years.
const MAX_TIMEOUT_S: u64 = 100 * 366 * 24 * 3600;

/// A spec whose values are all there and all make sense.
#[derive(Clone, Debug)]
pub struct CheckedSpec {
    /// The sandbox's id.
    pub id: SandboxId,
    /// The template; absent only for a paused sandbox that outlived its template.
    pub template: Option<TemplateFolder>,
    /// The root file system: open, since what the template's path leads to may be another one later.
    pub rootfs: Arc<File>,
    /// Its digest.
    pub rootfs_digest: Digest,
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
    /// The caller's own disks.
    pub disks: Vec<DiskSpec>,
    /// The way out of the machine.
    pub network: Plan,
    /// The VMM that was asked for.
    pub vmm: VmmChoice,
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
    pub boot_timeout: Duration,
    /// Whether it goes on from a snapshot of its template.
    pub restore: RestoreChoice,
    /// The snapshot that it is a clone of, when the caller named one.
    pub snapshot: Option<PathBuf>,
    /// How long it lives from when it is somebody's.
    pub timeout: Option<Duration>,
    /// What was asked for, with absolute paths.
    pub asked: SandboxSpec,
}

impl CheckedSpec {
    /// Opens the template and checks every value; what is absent is taken from the template.
    pub fn new(mut spec: SandboxSpec) -> Result<Self, Error> {
        let others = [spec.kernel.as_mut(), spec.guest_image.as_mut(), spec.snapshot.as_mut()];
        let disks = spec.disks.iter_mut().map(|disk| &mut disk.path);
        for path in others.into_iter().flatten().chain([&mut spec.template]).chain(disks) {
            *path = absolute(path)?;
        }
        let asked = spec.clone();
        let (template, rootfs) = open_template(&spec.template)?;
        let machine = template.template().machine;
        let RuntimeConfig { mut env, user, workdir, volumes, .. } = template.template().runtime.clone();

        let cpus = spec.cpus.unwrap_or(machine.cpus);
        within("cpus", u64::from(cpus), 1, u64::from(MAX_CPUS), "")?;
        let network = Plan::of(&spec.network)?;
        if let Some(vmm) = Kind::chosen(spec.vmm) {
            let extras = !spec.disks.is_empty() || network != Plan::None;
            vmm.check(&Wishes { channel: spec.channel, accelerator: spec.accelerator, cpus, extras })?;
        }
        let memory_mib = spec.memory_mib.unwrap_or(machine.memory_mib);
        within("memory", memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB, " MiB")?;
        let disk_mib = spec.disk_mib.unwrap_or(machine.disk_mib);
        within("disk", disk_mib, MIN_DISK_MIB, MAX_DISK_MIB, " MiB")?;
        let boot_timeout_s = spec.boot_timeout_s.unwrap_or(DEFAULT_BOOT_TIMEOUT_S);
        within("boot timeout", boot_timeout_s, 1, 24 * 3600, " s")?;
        if let Some(timeout_s) = spec.timeout_s {
            within("timeout", timeout_s, 1, MAX_TIMEOUT_S, " s")?;
        }
        check_disks(&spec.disks)?;
        if spec.restore == RestoreChoice::Always || spec.snapshot.is_some() {
            // A snapshot has neither.
            refuse_extras(&spec.disks, &network, "restored from a snapshot")?;
        }
        let init: boot::Init = spec.init.parse().map_err(|error: boot::InvalidChoice| {
            Error::invalid(error.what, format!("expected {}, got {:?}", error.expected, error.got))
        })?;
        let volumes = check_volumes(&volumes)?;
        for (name, value) in &spec.env {
            check_env(name, value)?;
        }
        env.extend(spec.env);

        let id = match spec.id {
            Some(id) => id,
            None => {
                SandboxId::generate_here().map_err(Error::io("read random bytes from", "getrandom(2)"))?
            }
        };
        let hostname = spec.hostname.unwrap_or_else(|| id.to_string());
        check_hostname(&hostname)?;
        for (what, text) in [("user", &spec.user), ("workdir", &spec.workdir)] {
            if text.as_ref().is_some_and(|text| text.contains('\0')) {
                return Err(Error::invalid(what, "expected a text without NUL bytes"));
            }
        }
        let workdir = spec.workdir.unwrap_or(workdir);
        if !workdir.is_empty() && !workdir.starts_with('/') {
            return Err(Error::invalid("workdir", format!("expected an absolute path, got {workdir:?}")));
        }
        let access_token = spec.access_token;
        if let Some(token) = &access_token
            && (token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            // It travels in an HTTP header.
            return Err(Error::invalid("access_token", "expected one or more visible ASCII characters"));
        }
        Ok(Self {
            id,
            rootfs: Arc::new(rootfs),
            rootfs_digest: template.template().rootfs.digest.clone(),
            template: Some(template),
            kernel: spec.kernel,
            guest_image: spec.guest_image,
            cpus,
            memory_mib,
            disk_mib,
            disks: spec.disks,
            network,
            vmm: spec.vmm,
            channel: spec.channel,
            accelerator: spec.accelerator,
            profile: spec.profile.into(),
            init,
            volumes,
            env,
            user: spec.user.unwrap_or(user),
            workdir,
            hostname,
            access_token,
            labels: spec.labels,
            boot_timeout: Duration::from_secs(boot_timeout_s),
            restore: spec.restore,
            snapshot: spec.snapshot,
            timeout: spec.timeout_s.map(Duration::from_secs),
            asked,
        })
    }

    /// The spec of a paused sandbox: its machine is the snapshot's, and nothing of the template counts but the root file
    /// system, which may be in the snapshot too.
    pub fn of_paused(mut asked: SandboxSpec, snapshot: &SnapshotFolder) -> Result<Self, Error> {
        let Description { key, machine, guest, origin, .. } = &snapshot.manifest().description;
        let opened = open_template(&asked.template);
        let own = match snapshot.file(FileName::Rootfs) {
            Some(file) => {
                Some(file.try_clone().map_err(Error::io("share", snapshot.path().join(ROOTFS_FILE)))?)
            }
            None => None,
        };
        let (template, of_template) = match opened {
            Ok((template, rootfs)) if template.template().rootfs.digest == guest.rootfs => {
                (Ok(template), Some(rootfs))
            }
            Ok((template, _)) => (Ok(template), None),
            Err(error) => (Err(error), None),
        };
        let Some(rootfs) = of_template.or(own) else {
            let reason = match template {
                Ok(template) => format!(
                    "the sandbox was paused with the root file system {}, {} has {}",
                    guest.rootfs,
                    template.path().display(),
                    template.template().rootfs.digest
                ),
                Err(error) => error.to_string(),
            };
            return Err(Error::invalid("template", format!("{reason} (--template names another folder)")));
        };
        asked.id.get_or_insert_with(|| origin.sandbox.clone());
        let id = asked.id.clone().unwrap_or_else(|| origin.sandbox.clone());
        Ok(Self {
            hostname: asked.hostname.clone().unwrap_or_else(|| id.to_string()),
            id,
            template: template.ok(),
            rootfs: Arc::new(rootfs),
            rootfs_digest: guest.rootfs.clone(),
            kernel: asked.kernel.clone(),
            guest_image: asked.guest_image.clone(),
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            disk_mib: machine.disk_mib,
            disks: Vec::new(),
            network: Plan::of(&asked.network)?,
            // Another one could not read its state.
            vmm: Kind::named(&key.vmm).map_or(asked.vmm, Kind::choice),
            channel: ChannelChoice::Auto,
            accelerator: asked.accelerator,
            profile: machine.profile,
            init: machine.init.clone(),
            volumes: machine.volumes.clone(),
            env: asked.env.clone(),
            user: asked.user.clone().unwrap_or_default(),
            workdir: asked.workdir.clone().unwrap_or_default(),
            access_token: asked.access_token.clone(),
            labels: asked.labels.clone(),
            boot_timeout: Duration::from_secs(asked.boot_timeout_s.unwrap_or(DEFAULT_BOOT_TIMEOUT_S)),
            restore: RestoreChoice::Always,
            snapshot: None,
            timeout: asked.timeout_s.map(Duration::from_secs),
            asked,
        })
    }

    /// Refuses what a machine with disks of its own or a network of its VMM cannot be.
    pub fn refuse_extras(&self, what: &str) -> Result<(), Error> {
        refuse_extras(&self.disks, &self.network, what)
    }

    /// Whether the machine has what no snapshot has.
    pub fn has_extras(&self) -> bool {
        !self.disks.is_empty() || self.network == Plan::Slirp
    }

    /// What it asks of a VMM.
    pub fn wishes(&self) -> Wishes {
        Wishes {
            channel: self.channel,
            accelerator: self.accelerator,
            cpus: self.cpus,
            extras: !self.disks.is_empty() || self.network != Plan::None,
        }
    }

    /// Whether the template, as it is now, has the root file system that this sandbox runs from.
    pub fn rootfs_is_at_template(&self) -> bool {
        TemplateFolder::open(&self.asked.template)
            .is_ok_and(|template| template.template().rootfs.digest == self.rootfs_digest)
    }

    /// Takes on what a parked sandbox is made into.
    pub fn configure(&mut self, request: ConfigureRequest) -> Result<(), Error> {
        let mut asked = self.asked.clone();
        asked.id = Some(request.id.unwrap_or_else(|| self.id.clone()));
        asked.hostname = request.hostname.or(asked.hostname);
        asked.env.extend(request.env);
        asked.user = request.user.or(asked.user);
        asked.workdir = request.workdir.or(asked.workdir);
        asked.access_token = request.access_token.or(asked.access_token);
        asked.labels.extend(request.labels);
        asked.timeout_s = request.timeout_s.or(asked.timeout_s);
        *self = Self::new(asked)?;
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::io("resolve", path))
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

fn refuse_extras(disks: &[DiskSpec], network: &Plan, what: &str) -> Result<(), Error> {
    let extra = match (disks, network) {
        ([], Plan::None | Plan::Filtered(..)) => return Ok(()),
        ([], Plan::Slirp) => "a network of its VMM",
        _ => "disks of its caller's",
    };
    Err(Error::Conflict(format!("a sandbox with {extra} cannot be {what}")))
}

fn check_disks(disks: &[DiskSpec]) -> Result<(), Error> {
    within("number of disks", disks.len() as u64, 0, MAX_DISKS as u64, "")?;
    for (index, disk) in disks.iter().enumerate() {
        let serial = &disk.serial;
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if serial.is_empty() || serial.len() > MAX_SERIAL || !serial.bytes().all(fits) {
            let reason =
                format!("expected 1 to {MAX_SERIAL} lowercase letters, digits and dashes, got {serial:?}");
            return Err(Error::invalid("serial of a disk", reason));
        }
        let own = [boot::ROOTFS_SERIAL, boot::SCRATCH_SERIAL];
        if own.contains(&serial.as_str()) || disks[..index].iter().any(|other| other.serial == *serial) {
            return Err(Error::invalid("serial of a disk", format!("another disk has {serial:?}")));
        }
        let metadata = std::fs::metadata(&disk.path).map_err(Error::io("open", &disk.path))?;
        if !metadata.is_file() {
            let reason = format!("{} is no file", disk.path.display());
            return Err(Error::invalid("disk", reason));
        }
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

/// A template and its root file system. A template is replaced as a whole: what is opened between two looks at the same one
/// is of that one.
fn open_template(path: &Path) -> Result<(TemplateFolder, File), Error> {
    loop {
        let template = TemplateFolder::open(path)?;
        let rootfs = template.rootfs();
        let file = File::open(&rootfs).map_err(Error::io("open", &rootfs))?;
        if TemplateFolder::open(path)?.template().rootfs.digest == template.template().rootfs.digest {
            return Ok((template, file));
        }
    }
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
        .unwrap();
        let spec = CheckedSpec::new(spec).unwrap();
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
            (
                r#""disks":[{"path":"/etc/passwd","serial":"A"}]"#,
                "lowercase letters, digits and dashes, got \"A\"",
            ),
            (r#""disks":[{"path":"/etc/passwd","serial":"rootfs"}]"#, "another disk has \"rootfs\""),
            (r#""disks":[{"path":"/etc","serial":"a"}]"#, "/etc is no file"),
            (
                r#""network":{"mode":"host"}"#,
                "unknown variant `host`, expected one of `none`, `slirp`, `user`, `tap`",
            ),
            (r#""network":{"mode":"tap","allow":["10.0.0.1/8"]}"#, "the range of this prefix is 10.0.0.0/8"),
            (r#""boot_timeout_s":0"#, "invalid boot timeout: expected 1 to"),
            (r#""cpu":1"#, "unknown field `cpu`, expected one of"),
            (r#""profile":"none""#, "unknown variant `none`, expected `sandbox` or `restricted`"),
            (r#""init":"systemd""#, "invalid init: expected envd, image or the absolute path"),
            (r#""vmm":"xen""#, "unknown variant `xen`"),
            (
                r#""vmm":"firecracker","channel":"serial""#,
                "invalid --vmm firecracker: Firecracker has a channel of its own",
            ),
            (
                r#""vmm":"firecracker","accelerator":"tcg""#,
                "on KVM only, and not with --accel tcg; --vmm qemu can do it",
            ),
            (r#""vmm":"firecracker","cpus":33"#, "at most 32 virtual CPUs, and not 33"),
            (r#""channel":"tcp""#, "unknown variant `tcp`"),
            (r#""id":"A""#, "invalid sandbox id \"A\""),
            (r#""hostname":"a_b""#, "invalid hostname"),
            (r#""env":{"a=b":""}"#, "invalid env: expected a name without '='"),
            (r#""env":{"a":"\u0000"}"#, "the value of a has a NUL byte"),
            (r#""workdir":"tmp""#, "invalid workdir: expected an absolute path, got \"tmp\""),
            (r#""access_token":"a b""#, "invalid access_token"),
        ] {
            let text = format!(r#"{{"schema_version":1,"template":{template:?},{fields}}}"#);
            let error =
                SandboxSpec::parse(&text).map_err(Error::from).and_then(CheckedSpec::new).unwrap_err();
            assert!(error.to_string().contains(expected), "{fields}: {error}");
            assert!(error.is_bad_input());
        }
    }
}
