//! Firecracker's words for a [`VmSpec`].
//!
//! ```text
//! DIR/vmm/   api          its API                        we dial
//!            vsock        the guest's ports              we dial: CONNECT 49983\n
//!            vsock_1024   the control door               the guest dials, we listen before it runs
//!            rootfs   ──► /proc/self/fd/9                the very file that the spec was checked with
//!            scratch  ──► ../scratch.ext4
//!            snapshot ──► a snapshot that is written     for as long as it is
//! ```
//!
//! It runs in that folder and is given names relative to it: they are in the state of its devices, and so lead every clone
//! of a snapshot to the files and sockets of its own. What it only reads once comes as a file descriptor.

mod api;
mod machine;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use command_fds::FdMapping;
use envd_proto::boot as words;
use serde_json::json;
use tokio::sync::watch;

pub use api::ApiError;
pub use machine::{Machine, Prepare};

use super::qemu::{RAM_FD, ROOTFS_FD, agent_arguments};
use super::{Boot, Console, Driver, Files, Place, Scratch, SnapshotFiles, VmSpec, Vmm, process};
use crate::Error;
use api::Call;

/// Environment variable that names the program.
pub const PROGRAM_ENV: &str = "FIRECRACKER_BIN";

const PROGRAM: &str = "firecracker";

/// Virtual CPUs at most (`MachineConfiguration.vcpu_count`).
pub const MAX_CPUS: u32 = 32;

/// The VMM's file descriptor for a snapshot's device state.
const STATE_FD: i32 = 10;
/// The VMM's file descriptor for the guest kernel.
const KERNEL_FD: i32 = 11;
/// The VMM's file descriptor for the guest image.
const GUEST_IMAGE_FD: i32 = 12;

/// Its API's socket.
const API: &str = "api";
/// The socket of its vsock device. The guest's port N of CID 2 is the socket of this name with `_N` behind it.
pub const VSOCK: &str = "vsock";
/// The drive of the root file system, and its name.
const ROOTFS_DRIVE: &str = "rootfs";
/// The drive of the scratch disk, and its name.
const SCRATCH_DRIVE: &str = "scratch";
/// The folder of a snapshot that is being written.
const SNAPSHOT_LINK: &str = "snapshot";

/// The guest's CID. Each guest has a vsock of its own, and the state of a clone says its source's.
const GUEST_CID: u32 = 3;

/// From this version on a `Diff` snapshot is written into an existing file of the RAM.
const FIRST_TO_MERGE: (u32, u32) = (1, 6);

/// From this version on what was `enable_diff_snapshots` is `track_dirty_pages`.
const FIRST_TO_TRACK: (u32, u32) = (1, 13);

/// The Firecracker that the environment names, else the one in PATH.
pub fn find() -> Result<PathBuf, Error> {
    if let Some(named) = std::env::var_os(PROGRAM_ENV) {
        let named = std::path::absolute(&named).map_err(Error::io("resolve", &named))?;
        if crate::tools::is_executable(&named) {
            return Ok(named);
        }
        return Err(Error::invalid(PROGRAM_ENV, format!("{} is no executable file", named.display())));
    }
    crate::tools::find_in_path(PROGRAM).ok_or_else(|| Error::Missing {
        what: PROGRAM.to_owned(),
        remedy: format!(
            "not found in PATH; take a release from github.com/firecracker-microvm/firecracker, name it in \
             ${PROGRAM_ENV} or put it into PATH, or use --vmm qemu"
        ),
    })
}

/// What has a Firecracker of that version count the pages that a restored machine writes, where it can write those into the
/// RAM that the machine goes on from. (Without a count it would take what is resident for what was written, which on a host
/// with swap is less.)
fn counting(version: &str) -> Option<&'static str> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let version = (numbers.next()??, numbers.next()??);
    if version >= FIRST_TO_TRACK {
        Some("track_dirty_pages")
    } else {
        (version >= FIRST_TO_MERGE).then_some("enable_diff_snapshots")
    }
}

fn fd_path(fd: i32) -> String {
    format!("/proc/self/fd/{fd}")
}

/// What brings a machine to life, in this order. Pure: the same spec gives the same words.
fn boot_calls(spec: &VmSpec, boot: &Boot) -> Vec<Call> {
    let drive = |name: &str, read_only: bool| {
        let body = json!({
            "drive_id": name,
            "path_on_host": name,
            // The root of the kernel's is the guest image.
            "is_root_device": false,
            "is_read_only": read_only,
            // Flushes are not passed on: the disk is thrown away with the VM, and a snapshot of it is synced when it is taken.
            "cache_type": "Unsafe",
        });
        Call::put(format!("/drives/{name}"), body)
    };
    vec![
        Call::put("/machine-config", json!({ "vcpu_count": spec.cpus, "mem_size_mib": spec.memory_mib })),
        Call::put(
            "/boot-source",
            json!({
                "kernel_image_path": fd_path(KERNEL_FD),
                "initrd_path": fd_path(GUEST_IMAGE_FD),
                "boot_args": kernel_arguments(boot),
            }),
        ),
        // In the order of their names in the guest.
        drive(ROOTFS_DRIVE, true),
        drive(SCRATCH_DRIVE, false),
        Call::put("/vsock", json!({ "guest_cid": GUEST_CID, "uds_path": VSOCK })),
        Call::put("/actions", json!({ "action_type": "InstanceStart" })),
    ]
}

/// Gives a machine the RAM and the devices of a snapshot. `counting`: the field that has it count what it writes.
fn load_call(counting: Option<&str>) -> Call {
    let mut body = json!({
        "snapshot_path": fd_path(STATE_FD),
        // Mapped privately: what the guest writes stays its own.
        "mem_backend": { "backend_type": "File", "backend_path": fd_path(RAM_FD) },
        "resume_vm": false,
    });
    if let Some(field) = counting {
        body[field] = true.into();
    }
    Call::put("/snapshot/load", body)
}

fn pause_call() -> Call {
    Call::patch("/vm", json!({ "state": "Paused" }))
}

fn resume_call() -> Call {
    Call::patch("/vm", json!({ "state": "Resumed" }))
}

/// The words of the kernel's command line. Firecracker adds where its devices are.
fn kernel_arguments(boot: &Boot) -> String {
    // A panic resets at once, and a reset by the keyboard's controller ends the VM. Of that controller there is nothing else,
    // so nothing else of it is looked for. Errors only on the console: each byte is an exit of the guest.
    let line = "console=ttyS0 quiet panic=-1 reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd";
    // Its disks have serials that it makes from the host's inodes: they are known by their order.
    format!(
        "{line} {}=vsock {}=/dev/vda {}=/dev/vdb{}",
        words::ARG_CHANNEL,
        words::ARG_ROOTFS,
        words::ARG_SCRATCH,
        agent_arguments(boot)
    )
}

/// The configuration of a machine that boots a kernel and has nothing else, for the probe of KVM.
pub(super) fn probe_configuration() -> String {
    json!({
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "boot-source": {
            "kernel_image_path": fd_path(KERNEL_FD),
            "boot_args": "console=ttyS0 quiet panic=-1 reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd",
        },
        "drives": [],
    })
    .to_string()
}

/// The descriptor of the kernel, for the probe of KVM.
pub(super) fn kernel_descriptor(kernel: &Path) -> Result<FdMapping, Error> {
    mapping(kernel, KERNEL_FD)
}

fn mapping(path: &Path, child_fd: i32) -> Result<FdMapping, Error> {
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    Ok(FdMapping { parent_fd: file.into(), child_fd })
}

/// Starts the VMM, whose machine waits for [`Vmm::boot`] or [`Vmm::load`].
pub(super) async fn launch(
    program: &Path,
    version: &str,
    spec: &VmSpec,
    files: Files,
    place: Place,
) -> Result<Vmm, Error> {
    let mut fds = files.channel;
    fds.push(FdMapping { parent_fd: files.rootfs.into(), child_fd: ROOTFS_FD });
    let folder = &place.sockets;
    let (Scratch::Raw(scratch) | Scratch::Overlay(scratch)) = &spec.scratch;
    for (name, target) in [(ROOTFS_DRIVE, &spec.rootfs), (SCRATCH_DRIVE, scratch)] {
        let link = folder.join(name);
        symlink(target, &link).map_err(Error::io("make the link", link))?;
    }
    let machine = match (files.snapshot, &spec.boot) {
        (Some(SnapshotFiles { ram, state, scratch_base: _ }), _) => {
            let base = ram.try_clone().map_err(Error::io("share", "the file of the guest's RAM"))?;
            fds.push(FdMapping { parent_fd: ram.into(), child_fd: RAM_FD });
            fds.push(FdMapping { parent_fd: state.into(), child_fd: STATE_FD });
            Machine::restored(folder, base, counting(version))
        }
        (None, Some(boot)) => {
            fds.push(mapping(&boot.kernel, KERNEL_FD)?);
            fds.push(mapping(&boot.guest_image, GUEST_IMAGE_FD)?);
            Machine::booting(folder, boot_calls(spec, boot))
        }
        (None, None) => {
            return Err(Error::invalid(
                "machine",
                "expected something to boot or to go on from, got neither",
            ));
        }
    };
    // Its log is a pipe of ours, which it writes without waiting: what nobody reads is lost, and the file is bounded.
    let args =
        ["--api-sock", API, "--id", place.id.as_str(), "--level", "Warning", "--log-path", "/proc/self/fd/2"];
    let mut child = process::bound(program, args, fds)?
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn { program: program.display().to_string(), source })?;
    let console = match child.stdout.take() {
        Some(stdout) => Console::spawn(stdout, Some(place.console_log)),
        None => Console::spawn(tokio::io::empty(), None),
    };
    let errors = match child.stderr.take() {
        Some(stderr) => Console::spawn(stderr, Some(place.vmm_log)),
        None => Console::spawn(tokio::io::empty(), None),
    };
    // It never stands still for want of space: the guest's write fails.
    let stalled = watch::Sender::new(false);
    Ok(Vmm { child, console, errors, stalled, driver: Driver::Firecracker(machine) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Accelerator, Netdev, Wiring};

    #[test]
    fn the_requests_of_a_boot_and_of_a_restore() {
        let boot = Boot {
            kernel: "/k/vmlinux".into(),
            guest_image: "/k/guest-image.cpio".into(),
            profile: words::Profile::Restricted,
            init: words::Init::Envd,
            volumes: vec!["/data".to_owned()],
        };
        let spec = VmSpec {
            boot: None,
            rootfs: fd_path(ROOTFS_FD).into(),
            scratch: Scratch::Raw("/s/scratch.ext4".into()),
            disks: Vec::new(),
            network: Netdev::Nothing,
            cpus: 2,
            memory_mib: 512,
            accelerator: Accelerator::Kvm,
            wiring: Wiring::HybridVsock,
        };
        let mut out = String::new();
        for call in boot_calls(&spec, &boot).into_iter().chain([
            pause_call(),
            load_call(counting("1.13.0")),
            resume_call(),
        ]) {
            out.push_str(&format!("{} {}\n  {}\n", call.method, call.path, call.body));
        }
        insta::assert_snapshot!(out);
    }

    #[test]
    fn only_what_a_version_knows_is_asked_of_it() {
        for (version, field) in [
            ("1.14.0-dev", Some("track_dirty_pages")),
            ("2.0.0", Some("track_dirty_pages")),
            ("1.12.1", Some("enable_diff_snapshots")),
            ("1.6.0", Some("enable_diff_snapshots")),
            ("1.5.1", None),
            ("0.25.2", None),
            ("main", None),
            ("", None),
            ("1", None),
        ] {
            assert_eq!(counting(version), field, "{version}");
        }
        assert!(!load_call(None).body.to_string().contains("track"));
    }
}
