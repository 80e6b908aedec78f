//! Whether a snapshot fits: the host that it was made on, and the first difference.

use std::collections::BTreeSet;
use std::fmt;

use oci_spec::image::Digest;
use serde::{Deserialize, Serialize};

use super::manifest::{GuestKey, SnapshotMachine};
use super::{Error, hash};
use crate::vmm::Accelerator;

const CPUINFO: &str = "/proc/cpuinfo";

/// Hexadecimal digits of the CPU's digest in the name of a folder.
const CPU_DIGITS: usize = 12;

/// Bytes of a version in the name of a folder: distributions append their own to it.
const MAX_VERSION: usize = 64;

/// What a host must have for a snapshot's device state and RAM to mean the same on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKey {
    /// Name of the VMM, as `QEMU`.
    pub vmm: String,
    /// Its version, as it prints it.
    pub vmm_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// [`cpu_digest`].
    pub cpu: Digest,
}

impl HostKey {
    /// This host with that VMM.
    pub fn of_this_host(vmm: &str, vmm_version: &str, accelerator: Accelerator) -> Result<Self, Error> {
        Ok(Self {
            vmm: vmm.to_owned(),
            vmm_version: vmm_version.to_owned(),
            accelerator: accelerator.name().to_owned(),
            cpu: cpu_digest(accelerator)?,
        })
    }

    /// The name of a template's folder for such snapshots: `<vmm>-<version>-<accelerator>-<cpu digest, 12 hex digits>`.
    /// Keys that differ can have one name; the manifest decides.
    pub fn folder_name(&self) -> String {
        let cpu = self.cpu.digest();
        format!(
            "{}-{}-{}-{}",
            plain(&self.vmm),
            plain(&self.vmm_version),
            plain(&self.accelerator),
            plain(&cpu[..cpu.len().min(CPU_DIGITS)])
        )
    }

    /// The first difference of a snapshot's key (`self`) to a host's.
    pub fn mismatch(&self, host: &Self) -> Option<Mismatch> {
        let differ = |what: &str, ours: &str, theirs: &str| {
            (ours != theirs).then(|| Mismatch::new(Demand::Host, what, ours, theirs))
        };
        differ("VMM", &self.vmm, &host.vmm)
            .or_else(|| differ(&self.vmm, &self.vmm_version, &host.vmm_version))
            .or_else(|| differ("accelerator", &self.accelerator, &host.accelerator))
            .or_else(|| differ("CPU", self.cpu.as_ref(), host.cpu.as_ref()))
    }
}

/// What is safe in a file name everywhere.
fn plain(text: &str) -> String {
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
    let plain: String = text
        .bytes()
        .take(MAX_VERSION)
        .map(|byte| if safe(byte) { char::from(byte.to_ascii_lowercase()) } else { '_' })
        .collect();
    // "..", and names that tools take for hidden, need a first character of another kind.
    if plain.starts_with('.') || plain.is_empty() { format!("_{plain}") } else { plain }
}

impl SnapshotMachine {
    /// The first difference of a snapshot's machine (`self`) to the one that is asked for. A larger disk is none: an
    /// overlay can be longer than what it lies over.
    pub fn mismatch(&self, asked: &Self) -> Option<Mismatch> {
        let differ = |what: &str, ours: String, theirs: String| {
            (ours != theirs).then(|| Mismatch::new(Demand::Sandbox, what, ours, theirs))
        };
        let mib = |mib: u64| format!("{mib} MiB");
        let shrinks = asked.disk_mib < self.disk_mib;
        differ("--cpus", self.cpus.to_string(), asked.cpus.to_string())
            .or_else(|| differ("--memory", mib(self.memory_mib), mib(asked.memory_mib)))
            .or_else(|| differ("--disk", mib(self.disk_mib), mib(asked.disk_mib)).filter(|_| shrinks))
            .or_else(|| differ("--channel", self.channel.name().to_owned(), asked.channel.name().to_owned()))
            .or_else(|| differ("--profile", self.profile.name().to_owned(), asked.profile.name().to_owned()))
            .or_else(|| differ("--init", self.init.to_string(), asked.init.to_string()))
            .or_else(|| differ("volumes", format!("{:?}", self.volumes), format!("{:?}", asked.volumes)))
    }
}

impl GuestKey {
    /// The first difference of what runs in a snapshot (`self`) to what would be booted.
    pub fn mismatch(&self, host: &Self) -> Option<Mismatch> {
        [
            ("guest kernel", &self.kernel, &host.kernel),
            ("guest image", &self.guest_image, &host.guest_image),
            ("rootfs", &self.rootfs, &host.rootfs),
        ]
        .into_iter()
        .find(|(_, ours, theirs)| ours != theirs)
        .map(|(what, ours, theirs)| Mismatch::new(Demand::Host, what, ours.as_ref(), theirs.as_ref()))
    }
}

/// Who wants what the snapshot does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// The host has something else.
    Host,
    /// The sandbox asks for something else.
    Sandbox,
}

/// Why a snapshot does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What differs, as `QEMU` or `--cpus`.
    pub what: String,
    /// The snapshot's value.
    pub snapshot: String,
    /// The other value.
    pub host: String,
    /// Whose the other value is.
    pub demand: Demand,
}

impl Mismatch {
    fn new(demand: Demand, what: &str, snapshot: impl Into<String>, host: impl Into<String>) -> Self {
        Self { what: what.to_owned(), snapshot: snapshot.into(), host: host.into(), demand }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, snapshot, host, demand } = self;
        write!(f, "the snapshot was made with {what} {snapshot}, ")?;
        match demand {
            Demand::Host => write!(f, "this host has {host}"),
            Demand::Sandbox => write!(f, "the sandbox asks for {host}"),
        }
    }
}

/// The digest of the CPU as a guest of that accelerator sees it.
///
/// Under TCG (`-cpu max`) a guest sees what the VMM's version emulates, on whatever host. Under KVM (`-cpu host`) it sees
/// the host's model and features: vendor, family, model, stepping and flags. Microcode, frequency and the names of
/// known flaws are left out: they change without the instructions changing.
pub fn cpu_digest(accelerator: Accelerator) -> Result<Digest, Error> {
    match accelerator {
        Accelerator::Tcg => Ok(hash::digest_of(b"tcg max\n")),
        Accelerator::Kvm => {
            let text = std::fs::read_to_string(CPUINFO).map_err(Error::io("read", CPUINFO))?;
            Ok(hash::digest_of(host_cpu(&text).as_bytes()))
        }
    }
}

/// What matters of the first CPU; a VM may run on any.
fn host_cpu(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let value = |name: &str| {
        let mut fields = first.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.trim() == name).map_or("", |(_, value)| value.trim())
    };
    // In a fixed order: newer kernels list new flags between the old ones.
    let flags: BTreeSet<&str> = value("flags").split_whitespace().collect();
    let mut text = "kvm host\n".to_owned();
    for name in ["vendor_id", "cpu family", "model", "stepping"] {
        text.push_str(&format!("{name}={}\n", value(name)));
    }
    for flag in flags {
        text.push_str(&format!("{flag}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::manifest::tests::description;

    fn said(mismatch: Option<Mismatch>) -> String {
        mismatch.expect("they differ").to_string()
    }

    #[test]
    fn the_first_difference_is_told_with_both_values() {
        let description = description();
        let key = description.key;
        assert_eq!(key.mismatch(&key), None);
        let other = HostKey { vmm_version: "8.0.1".into(), accelerator: "kvm".into(), ..key.clone() };
        assert_eq!(said(key.mismatch(&other)), "the snapshot was made with QEMU 7.2.22, this host has 8.0.1");
        let other = HostKey { vmm: "Firecracker".into(), ..key.clone() };
        assert_eq!(
            said(key.mismatch(&other)),
            "the snapshot was made with VMM QEMU, this host has Firecracker"
        );
        let other = HostKey { accelerator: "kvm".into(), ..key.clone() };
        assert_eq!(
            said(key.mismatch(&other)),
            "the snapshot was made with accelerator tcg, this host has kvm"
        );
        let other = HostKey { cpu: hash::digest_of(b"another"), ..key.clone() };
        assert!(said(key.mismatch(&other)).starts_with("the snapshot was made with CPU sha256:"));

        let machine = description.machine;
        assert_eq!(machine.mismatch(&machine), None);
        let mut asked = machine.clone();
        asked.disk_mib += 1;
        assert_eq!(machine.mismatch(&asked), None, "a disk may grow");
        asked.disk_mib = 1000;
        let disk = "the snapshot was made with --disk 1024 MiB, the sandbox asks for 1000 MiB";
        assert_eq!(said(machine.mismatch(&asked)), disk);
        asked.volumes.clear();
        asked.disk_mib = machine.disk_mib;
        assert!(said(machine.mismatch(&asked)).contains("volumes [\"/data\"], the sandbox asks for []"));
        asked.memory_mib = 512;
        assert_eq!(
            said(machine.mismatch(&asked)),
            "the snapshot was made with --memory 256 MiB, the sandbox asks for 512 MiB"
        );
        asked.cpus = 2;
        assert_eq!(
            said(machine.mismatch(&asked)),
            "the snapshot was made with --cpus 1, the sandbox asks for 2"
        );

        let guest = description.guest;
        assert_eq!(guest.mismatch(&guest), None);
        let other = GuestKey { rootfs: hash::digest_of(b"another"), ..guest.clone() };
        assert!(said(guest.mismatch(&other)).starts_with("the snapshot was made with rootfs sha256:"));
    }

    #[test]
    fn folder_names_are_safe() {
        let mut key = description().key;
        key.cpu = cpu_digest(Accelerator::Tcg).unwrap();
        assert_eq!(key.folder_name(), format!("qemu-7.2.22-tcg-{}", &key.cpu.digest()[..12]));
        key.vmm_version = "7.2.22 (Debian 1:7.2+dfsg-7/../..)".into();
        assert!(
            key.folder_name().starts_with(
                "qemu-7.2.22__debian_1_7.2_dfsg_7_.._..__tcg".replace("__tcg", "_-tcg").as_str()
            ),
            "{}",
            key.folder_name()
        );
        key.vmm = "../..".into();
        key.vmm_version = "1".repeat(300);
        let name = key.folder_name();
        assert!(name.starts_with("_.._..-111") && name.len() < 120 && !name.contains('/'), "{name}");
    }

    #[test]
    fn a_cpu_is_its_model_and_its_flags() {
        let info = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\
                    stepping\t: 1\nmicrocode\t: 0x1\ncpu MHz\t: 1.0\nflags\t\t: sse fpu\n\nprocessor\t: 1\nflags\t: avx\n";
        let text = host_cpu(info);
        assert_eq!(text, "kvm host\nvendor_id=AuthenticAMD\ncpu family=25\nmodel=17\nstepping=1\nfpu\nsse\n");
        let same = info.replace("0x1", "0x2").replace("1.0", "2.0").replace("sse fpu", "fpu sse");
        assert_eq!(host_cpu(&same), text);
        assert_ne!(host_cpu(&info.replace("sse fpu", "fpu sse avx")), text);
        assert_ne!(cpu_digest(Accelerator::Kvm).unwrap(), cpu_digest(Accelerator::Tcg).unwrap());
    }
}
