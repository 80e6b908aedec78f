//! The OCI spec of a step's container: what Docker gives a container, as far as this user may.

use std::path::Path;

use serde_json::{Value, json};

use crate::ids;
use crate::limits::StepLimits;
use crate::plan::RunAction;
use crate::seccomp;
use crate::users::User;

/// Docker's default set.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// Hidden from the container, as Docker does.
const MASKED: [&str; 12] = [
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
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What the container is made of.
pub(crate) struct Container<'a> {
    pub(crate) root: &'a Path,
    pub(crate) id: &'a str,
    pub(crate) user: &'a User,
    pub(crate) env: &'a [(String, String)],
    /// After those that every container has.
    pub(crate) mounts: Vec<Value>,
}

/// The spec. Without a network namespace: the helper's is the container's.
pub(crate) fn spec(action: &RunAction, container: Container<'_>, limits: &StepLimits) -> Value {
    let Container { root, id, user, env, mounts } = container;
    let mut all = system_mounts(limits.shm_size);
    all.extend(mounts);
    // With one id there is nobody else to be.
    let (uid, gid, groups) =
        if ids::are_one() { (0, 0, &[][..]) } else { (user.uid, user.gid, user.groups.as_slice()) };
    // Only root keeps them past exec, as with Docker.
    let kept = if uid == 0 { &CAPABILITIES[..] } else { &[] };
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": root, "readonly": false},
        "hostname": "build",
        "process": {
            "terminal": false,
            "user": {"uid": uid, "gid": gid, "additionalGids": groups, "umask": 0o022},
            "args": action.argv,
            "env": env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
            "cwd": action.workdir,
            "capabilities": {"bounding": CAPABILITIES, "effective": kept, "permitted": kept},
            // noNewPrivileges is not there at all: with `false` libcontainer would set the seccomp filter when it has no
            // capability for that any more.
            "rlimits": limits.ulimits.iter().map(|limit| json!({
                "type": limit.name, "soft": limit.soft, "hard": limit.hard,
            })).collect::<Vec<_>>(),
        },
        "mounts": all,
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            "seccomp": seccomp::profile(ids::are_one()),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}

/// A bind mount.
pub(crate) fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn system_mounts(shm_size: u64) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let shm_size = format!("size={shm_size}");
    let mut pts = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    if !ids::are_one() {
        // The group tty.
        pts.push("gid=5");
    }
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", &pts),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        if ids::are_limited() {
            // A new one belongs to whoever the network belongs to.
            bind(Path::new("/sys"), "/sys", &["rbind", "rro", "nosuid", "noexec", "nodev"])
        } else {
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"])
        },
    ]
}
