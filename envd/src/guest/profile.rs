//! The two profiles: what the container may do.
//!
//! | | `sandbox` | `restricted` |
//! |---|---|---|
//! | capabilities | all | Docker's default ones |
//! | setuid programs | work | give nothing (no_new_privs) |
//! | system calls | all | Docker's default ones ([`super::seccomp`]) |
//! | devices | all but the disks of the rootfs and of the scratch | terminals, null, zero, full, random, urandom |
//! | /proc, /sys | writable | Docker's masked and read-only paths; /sys and cgroups read-only |
//!
//! In `sandbox` the virtual machine is the boundary, and root in the container is root in the guest: it can load a kernel
//! module and with that do everything that the agent can. Two things are kept from it all the same, since they cost
//! nothing and accidents happen: the disks below the overlay cannot be opened or made as nodes, and neither the device
//! rules nor the agent's cgroup are within its cgroup namespace.
//!
//! In `restricted` the container is a boundary too. PID 1 (envd's own) holds the container's capabilities and no more,
//! cannot be traced or looked into (not dumpable, and nobody has CAP_SYS_PTRACE), and is the one process without the
//! filter: it must clone into cgroups.

use std::io;

use envd_proto::boot::Profile;
use envd_sys::{Device, DeviceKind, DeviceRules, SeccompFilter};
use oci_spec::runtime::Capability;
use rustix::thread::CapabilitySet;

use super::seccomp;

const fn char_device(major: u32, minor: Option<u32>) -> Device {
    Device { kind: DeviceKind::Char, major, minor }
}

/// What `restricted` opens and makes (Documentation/admin-guide/devices.txt).
const RESTRICTED_DEVICES: [Device; 10] = [
    char_device(1, Some(3)), // null
    char_device(1, Some(5)), // zero
    char_device(1, Some(7)), // full
    char_device(1, Some(8)), // random
    char_device(1, Some(9)), // urandom
    char_device(5, Some(0)), // tty
    char_device(5, Some(1)), // console
    char_device(5, Some(2)), // ptmx
    char_device(136, None),  // pts, the first 1,048,576 terminals
    char_device(137, None),
];

/// Docker's (moby, `oci/defaults.go`).
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

/// Docker's (moby, `oci/defaults.go`).
const READ_ONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Docker's (moby, `oci/caps/defaults.go`).
const DOCKER_CAPABILITIES: [(Capability, CapabilitySet); 14] = [
    (Capability::Chown, CapabilitySet::CHOWN),
    (Capability::DacOverride, CapabilitySet::DAC_OVERRIDE),
    (Capability::Fsetid, CapabilitySet::FSETID),
    (Capability::Fowner, CapabilitySet::FOWNER),
    (Capability::Mknod, CapabilitySet::MKNOD),
    (Capability::NetRaw, CapabilitySet::NET_RAW),
    (Capability::Setgid, CapabilitySet::SETGID),
    (Capability::Setuid, CapabilitySet::SETUID),
    (Capability::Setfcap, CapabilitySet::SETFCAP),
    (Capability::Setpcap, CapabilitySet::SETPCAP),
    (Capability::NetBindService, CapabilitySet::NET_BIND_SERVICE),
    (Capability::SysChroot, CapabilitySet::SYS_CHROOT),
    (Capability::Kill, CapabilitySet::KILL),
    (Capability::AuditWrite, CapabilitySet::AUDIT_WRITE),
];

/// The capabilities of the container's processes.
pub(super) fn capabilities(profile: Profile) -> Vec<Capability> {
    match profile {
        Profile::Sandbox => ALL_CAPABILITIES.to_vec(),
        Profile::Restricted => DOCKER_CAPABILITIES.map(|(capability, _)| capability).to_vec(),
    }
}

/// Whether the agent has a capability itself: a service may lack some, and can give only what it has.
pub(super) fn is_held(capability: &Capability) -> bool {
    // The list is in the order of the kernel's numbers.
    let number = ALL_CAPABILITIES.iter().position(|known| known == capability);
    let held = rustix::thread::capabilities(None).map(|sets| sets.permitted);
    matches!((number, held), (Some(number), Ok(held)) if held.bits() & (1 << number) != 0)
}

/// The same for a process that takes them itself; `None` leaves it all.
pub(super) fn capability_set(profile: Profile) -> Option<CapabilitySet> {
    match profile {
        Profile::Sandbox => None,
        Profile::Restricted => {
            Some(DOCKER_CAPABILITIES.into_iter().map(|(_, capability)| capability).collect())
        }
    }
}

/// The seccomp filter of the container's processes.
pub(super) fn filter(profile: Profile) -> io::Result<Option<SeccompFilter>> {
    match profile {
        Profile::Sandbox => Ok(None),
        Profile::Restricted => seccomp::filter().map(Some),
    }
}

/// The device rules of a step of a build: Docker's, which let every node be made (moby, `oci/defaults.go`).
pub(super) fn device_rules_of_step() -> DeviceRules {
    DeviceRules::OpenOnly(RESTRICTED_DEVICES.to_vec())
}

/// The device rules of the box; `disks` are those below its file systems.
pub(super) fn device_rules(profile: Profile, disks: Vec<Device>) -> DeviceRules {
    match profile {
        Profile::Sandbox => DeviceRules::AllBut(disks),
        Profile::Restricted => DeviceRules::Only(RESTRICTED_DEVICES.to_vec()),
    }
}

/// Paths that show nothing.
pub(super) fn masked_paths(profile: Profile) -> Vec<String> {
    match profile {
        Profile::Sandbox => Vec::new(),
        Profile::Restricted => MASKED_PATHS.map(str::to_owned).to_vec(),
    }
}

/// Paths that cannot be written.
pub(super) fn read_only_paths(profile: Profile) -> Vec<String> {
    match profile {
        Profile::Sandbox => Vec::new(),
        Profile::Restricted => READ_ONLY_PATHS.map(str::to_owned).to_vec(),
    }
}

/// Every capability of Linux 6.1 (`linux/capability.h`).
const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];
