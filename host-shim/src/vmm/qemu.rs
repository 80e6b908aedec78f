//! QEMU's words for a [`VmSpec`].

use std::ffi::OsString;
use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use command_fds::FdMapping;
use envd_proto::boot as words;
use rustix::fs::MemfdFlags;
use sandbox_network::addresses::GUEST_MAC;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::qemu_machine::Machine;
use super::tsc;
use super::{
    Accelerator, Boot, Console, Driver, Files, Netdev, Parts, Place, Scratch, SnapshotFiles, VmSpec, Vmm,
    Wiring, process,
};
use crate::Error;

/// The VMM's file descriptor for the guest's console.
pub const CONSOLE_FD: i32 = 3;
/// The VMM's file descriptor for the control port of [`Wiring::Serial`].
pub const CONTROL_FD: i32 = 4;
/// The VMM's file descriptor for the mux port of [`Wiring::Serial`].
pub const MUX_FD: i32 = 5;
/// The VMM's file descriptor for its monitor.
pub const MONITOR_FD: i32 = 6;
/// The VMM's file descriptor for the file behind the guest's RAM.
pub const RAM_FD: i32 = 7;
/// The VMM's file descriptor for what the scratch disk is copied from on a write ([`Scratch::Overlay`]).
pub const SCRATCH_BASE_FD: i32 = 8;

/// The VMM's file descriptor for the root file system, which a spec of this process names by it.
pub const ROOTFS_FD: i32 = 9;

/// The VMM's file descriptor for the TAP of its guest ([`Netdev::Tap`]).
pub const TAP_FD: i32 = 10;

/// Where the network device is. A microvm without ACPI gives its devices the interrupts from 12 downwards, and the fifth would
/// get 8, which the clock has: a guest's driver that asks for it after the clock's does not start.
pub const NETWORK_BUS: &str = "virtio-mmio-bus.2";

/// The guest's CID behind a vhost-user daemon, which serves one guest only.
pub const VHOST_USER_CID: u32 = 3;

/// microvm is a machine of x86 only.
const PROGRAM: &str = "qemu-system-x86_64";

/// The QEMU in PATH.
pub fn find() -> Result<PathBuf, Error> {
    crate::tools::find_in_path(PROGRAM).ok_or_else(|| Error::Missing {
        what: PROGRAM.to_owned(),
        remedy: "not found in PATH; install it with `apt-get install qemu-system-x86` (Debian, Ubuntu) \
                 or `dnf install qemu-system-x86-core` (Fedora)"
            .to_owned(),
    })
}

/// The arguments for a VM. Pure: the same spec gives the same words.
///
/// A snapshot fits only a VM of the same devices: what is different between a boot and its restore is the RAM's mapping,
/// the disk's format and the kernel, which is in the RAM by then.
///
/// `tsc_khz` is the frequency of this host's time-stamp counter, where a guest must be told.
pub fn arguments(spec: &VmSpec, tsc_khz: Option<NonZeroU32>) -> Vec<OsString> {
    let mut args = Arguments::default();
    // No ACPI: QEMU 10's tables can be overwritten by the initrd, and without it a reset ends the VM (-no-reboot).
    // No description of the device state behind it: what is saved without RAM has none either.
    let machine = "microvm,acpi=off,rtc=on,isa-serial=on,memory-backend=ram,suppress-vmdesc=on";
    args.pair("-machine", machine);
    match spec.accelerator {
        Accelerator::Kvm => args.pair("-accel", "kvm").pair("-cpu", "host"),
        Accelerator::Tcg => args.pair("-accel", "tcg,thread=multi").pair("-cpu", "max"),
    };
    args.pair("-m", format!("{}M", spec.memory_mib)).pair("-smp", spec.cpus.to_string());
    // A booted VM writes to the file, which is its own and is read for its snapshots (and by a vhost-user daemon). A restored
    // one shares the file with others, and keeps what it writes to itself.
    let share = if spec.boot.is_some() { "on" } else { "off" };
    let (size, fd) = (spec.memory_mib, RAM_FD);
    args.pair(
        "-object",
        format!("memory-backend-file,id=ram,size={size}M,mem-path=/proc/self/fd/{fd},share={share}"),
    );
    isolation(&mut args);
    match &spec.boot {
        Some(boot) => {
            args.pair("-kernel", &boot.kernel).pair("-initrd", &boot.guest_image);
            args.pair("-append", kernel_arguments(boot, &spec.wiring, tsc_khz));
        }
        None => {
            args.pair("-incoming", "defer").flag("-S");
            args.pair("-global", "migration.send-configuration=off");
        }
    }

    args.pair("-chardev", format!("socket,id=console,fd={CONSOLE_FD}")).pair("-serial", "chardev:console");
    args.pair("-chardev", format!("socket,id=monitor,fd={MONITOR_FD}"))
        .pair("-mon", "chardev=monitor,mode=control");
    // Locking off: one file, many read-only readers, and no lock that a publisher of a new template could meet.
    let rootfs = [
        b"driver=file,locking=off,read-only=on,node-name=rootfs-file,filename=",
        escaped(&spec.rootfs).as_bytes(),
    ]
    .concat();
    args.pair("-blockdev", OsString::from_vec(rootfs));
    args.pair("-blockdev", "driver=raw,node-name=rootfs,read-only=on,file=rootfs-file");
    args.pair("-device", format!("virtio-blk-device,drive=rootfs,serial={}", words::ROOTFS_SERIAL));
    scratch(&mut args, &spec.scratch);
    args.pair("-device", format!("virtio-blk-device,drive=scratch,serial={}", words::SCRATCH_SERIAL));
    disks(&mut args, &spec.disks);
    network(&mut args, spec.network);
    args.pair("-object", "rng-random,id=rng,filename=/dev/urandom")
        .pair("-device", "virtio-rng-device,rng=rng");

    match &spec.wiring {
        Wiring::Serial => {
            args.pair("-device", "virtio-serial-device");
            for (name, fd) in [(words::CONTROL_SERIAL_PORT, CONTROL_FD), (words::MUX_SERIAL_PORT, MUX_FD)] {
                args.pair("-chardev", format!("socket,id={name},fd={fd}"));
                args.pair("-device", format!("virtserialport,chardev={name},name={name}"));
            }
        }
        Wiring::VhostVsock { cid, .. } => {
            args.pair("-device", format!("vhost-vsock-device,guest-cid={cid}"));
        }
        Wiring::VhostUserVsock { socket } => {
            let chardev = [b"socket,id=vsock,path=", escaped(socket).as_bytes()].concat();
            args.pair("-chardev", OsString::from_vec(chardev));
            args.pair("-device", "vhost-user-vsock-device,chardev=vsock");
        }
        // Nobody asks QEMU for another VMM's device.
        Wiring::HybridVsock => {}
    }
    args.0
}

/// The scratch disk's node is named `scratch` in every VM.
fn scratch(args: &mut Arguments, scratch: &Scratch) {
    let (Scratch::Raw(path) | Scratch::Overlay(path)) = scratch;
    let file =
        [b"driver=file,discard=unmap,node-name=scratch-file,filename=", escaped(path).as_bytes()].concat();
    args.pair("-blockdev", OsString::from_vec(file));
    // Flushes are not passed on: the disk is thrown away with the VM, and a snapshot of it is synced when it is taken.
    let top = "node-name=scratch,discard=unmap,cache.no-flush=on,file=scratch-file";
    match scratch {
        Scratch::Raw(_) => args.pair("-blockdev", format!("driver=raw,{top}")),
        Scratch::Overlay(_) => args
            .pair("-add-fd", format!("fd={SCRATCH_BASE_FD},set={SCRATCH_BASE_FD}"))
            .pair(
                "-blockdev",
                format!(
                    "driver=file,locking=off,read-only=on,node-name=base-file,filename=/dev/fdset/{SCRATCH_BASE_FD}"
                ),
            )
            .pair("-blockdev", "driver=raw,node-name=base,read-only=on,file=base-file")
            .pair("-blockdev", format!("driver=qcow2,{top},backing=base")),
    };
}

/// Devices with the caller's disks.
fn disks(args: &mut Arguments, disks: &[Parts]) {
    for Parts { descriptor, read_only } in disks {
        let (node, file, top) = match read_only {
            true => ("disks-ro", "locking=off,read-only=on,", "read-only=on"),
            // As with the scratch disk.
            false => ("disks-rw", "", "cache.no-flush=on"),
        };
        let file = format!("driver=file,{file}node-name={node}-file,filename=");
        let name = escaped(descriptor);
        args.pair("-blockdev", OsString::from_vec([file.as_bytes(), name.as_bytes()].concat()));
        args.pair("-blockdev", format!("driver=vmdk,node-name={node},{top},file={node}-file"));
        args.pair("-device", format!("virtio-blk-device,drive={node},serial={node}"));
    }
}

/// The one network device. The guest is offered the same with every peer and with none.
fn network(args: &mut Arguments, netdev: Netdev) {
    let peer = match netdev {
        Netdev::Absent => return,
        Netdev::Nothing => None,
        // IPv4 alone: its one way to the host's loopback is known, and the guest's to close.
        Netdev::Slirp => Some("user,id=network,ipv6=off".to_owned()),
        Netdev::Tap => Some(format!("tap,id=network,fd={TAP_FD}")),
    };
    let mut device = format!("virtio-net-device,bus={NETWORK_BUS},mac={GUEST_MAC}");
    if let Some(peer) = peer {
        args.pair("-netdev", peer);
        device.push_str(",netdev=network");
    }
    args.pair("-device", device);
}

/// Starts the VM: a booted one runs, a restored one waits for its device state.
pub(super) async fn launch(program: &Path, spec: &VmSpec, files: Files, place: Place) -> Result<Vmm, Error> {
    let pair = || -> std::io::Result<(UnixStream, OwnedFd)> {
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        near.set_nonblocking(true)?;
        Ok((UnixStream::from_std(near)?, far.into()))
    };
    let mut fds = files.channel;
    let (console, far) = pair().map_err(Error::io("make a socket for", &place.console_log))?;
    fds.push(FdMapping { parent_fd: far, child_fd: CONSOLE_FD });
    let (monitor, far) = pair().map_err(Error::io("make a monitor for", &place.console_log))?;
    fds.push(FdMapping { parent_fd: far, child_fd: MONITOR_FD });
    let (ram, state, scratch_base) = match files.snapshot {
        Some(SnapshotFiles { ram, state, scratch_base }) => (ram, Some(state), scratch_base),
        None => (memory(spec.memory_mib)?, None, None),
    };
    let mapped = ram.try_clone().map_err(Error::io("share", "the file of the guest's RAM"))?;
    fds.push(FdMapping { parent_fd: mapped.into(), child_fd: RAM_FD });
    fds.push(FdMapping { parent_fd: files.rootfs.into(), child_fd: ROOTFS_FD });
    if let Some(base) = scratch_base {
        fds.push(FdMapping { parent_fd: base.into(), child_fd: SCRATCH_BASE_FD });
    }
    if let Some(tap) = files.tap {
        fds.push(FdMapping { parent_fd: tap, child_fd: TAP_FD });
    }
    // With KVM the guest has a clock of the host's, and a restored one knows its counter.
    let told = spec.accelerator == Accelerator::Tcg && spec.boot.is_some();
    let tsc_khz = if told { tsc::frequency().await } else { None };
    let mut child = process::bound(program, arguments(spec, tsc_khz), fds)?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn { program: program.display().to_string(), source })?;
    let stderr = child.stderr.take();
    let errors = match stderr {
        Some(stderr) => Console::spawn(stderr, None),
        None => Console::spawn(tokio::io::empty(), None),
    };
    let console = Console::spawn(console, Some(place.console_log));
    let stalled = watch::Sender::new(false);
    let driver = Driver::Qemu(Machine::new(monitor, ram, state, stalled.clone()));
    Ok(Vmm { child, console, errors, stalled, driver })
}

/// The RAM of a machine that boots.
fn memory(mib: u64) -> Result<File, Error> {
    let make = || {
        let file = File::from(rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        file.set_len(mib << 20)?;
        Ok(file)
    };
    make().map_err(Error::io("make", Path::new("the guest's RAM (memfd_create)")))
}

/// The arguments that keep a VMM small and quiet, in every VM and in the probe.
pub(super) fn isolation(args: &mut Arguments) {
    args.flag("-nodefaults").flag("-no-user-config").pair("-display", "none").flag("-no-reboot");
    args.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
}

fn kernel_arguments(boot: &Boot, wiring: &Wiring, tsc_khz: Option<NonZeroU32>) -> String {
    // A panic resets at once, and a reset ends the VM. Serial output is slow under emulation: errors only.
    let mut line = "console=ttyS0 quiet panic=-1 reboot=t".to_owned();
    let mut argument = |name: &str, value: &str| line.push_str(&format!(" {name}={value}"));
    if let Some(khz) = tsc_khz {
        argument("tsc_early_khz", &khz.to_string());
        // Nor is the counter measured by ticks that a busy host delivers late.
        argument("tsc", "reliable");
    }
    match wiring {
        Wiring::Serial => argument(words::ARG_CHANNEL, "serial"),
        Wiring::VhostUserVsock { .. } | Wiring::HybridVsock => argument(words::ARG_CHANNEL, "vsock"),
        Wiring::VhostVsock { control_port, .. } => {
            argument(words::ARG_CHANNEL, "vsock");
            argument(words::ARG_CONTROL_PORT, &control_port.to_string());
        }
    }
    line.push_str(&agent_arguments(boot));
    line
}

/// The words of the kernel's command line that are the agent's, each behind a blank: the same for every VMM.
pub(super) fn agent_arguments(boot: &Boot) -> String {
    let mut line = String::new();
    let mut argument = |name: &str, value: &str| line.push_str(&format!(" {name}={value}"));
    // What is the agent's default is not said, so that an older one boots too.
    if boot.profile != words::Profile::default() {
        argument(words::ARG_PROFILE, boot.profile.name());
    }
    if boot.init != words::Init::default() {
        argument(words::ARG_INIT, &words::encode_path(&boot.init.to_string()));
    }
    for path in &boot.volumes {
        argument(words::ARG_VOLUME, &words::encode_path(path));
    }
    line
}

/// A path inside an option: a comma is written twice.
fn escaped(path: &Path) -> OsString {
    let mut out = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        out.push(byte);
        if byte == b',' {
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

/// A command line that grows.
#[derive(Debug, Default)]
pub(super) struct Arguments(pub(super) Vec<OsString>);

impl Arguments {
    pub(super) fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    pub(super) fn pair(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.extend([name.into(), value.into()]);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(accelerator: Accelerator, wiring: Wiring) -> VmSpec {
        VmSpec {
            boot: Some(Boot {
                kernel: "/k/vmlinux".into(),
                guest_image: "/k/guest-image.cpio".into(),
                profile: words::Profile::Sandbox,
                init: words::Init::Envd,
                volumes: Vec::new(),
            }),
            rootfs: "/t,1/rootfs.ext4".into(),
            scratch: Scratch::Raw("/s/scratch.ext4".into()),
            disks: Vec::new(),
            network: Netdev::Nothing,
            cpus: 2,
            memory_mib: 512,
            accelerator,
            wiring,
        }
    }

    fn lines(spec: &VmSpec) -> String {
        let mut out = String::new();
        let tsc_khz = NonZeroU32::new(2_596_128).filter(|_| spec.accelerator == Accelerator::Tcg);
        for argument in arguments(spec, tsc_khz) {
            let argument = argument.into_string().unwrap();
            out.push_str(if argument.starts_with('-') { "\n" } else { " " });
            out.push_str(&argument);
        }
        out
    }

    #[test]
    fn the_command_line_of_each_channel() {
        insta::assert_snapshot!("serial_tcg", lines(&spec(Accelerator::Tcg, Wiring::Serial)));
        let vhost_user = Wiring::VhostUserVsock { socket: "/s/vmm/vhost".into() };
        insta::assert_snapshot!("vhost_user_tcg", lines(&spec(Accelerator::Tcg, vhost_user)));
        let vhost = Wiring::VhostVsock { cid: 77, control_port: 1025 };
        insta::assert_snapshot!("vhost_vsock_kvm", lines(&spec(Accelerator::Kvm, vhost)));
    }

    #[test]
    fn disks_and_a_network_of_the_callers() {
        let parts = |name: &str, read_only| Parts { descriptor: name.into(), read_only };
        let spec = VmSpec {
            disks: vec![parts("/s,1/vmm/disks-ro.vmdk", true), parts("/s,1/vmm/disks-rw.vmdk", false)],
            network: Netdev::Slirp,
            ..spec(Accelerator::Tcg, Wiring::Serial)
        };
        let lines = lines(&spec);
        let own: Vec<&str> =
            lines.lines().filter(|line| line.contains("disk") || line.contains("net")).collect();
        insta::assert_snapshot!("disks_and_network", own.join("\n"));
    }

    #[test]
    fn a_tap_changes_nothing_of_the_device() {
        let device = |network| {
            let line = lines(&VmSpec { network, ..spec(Accelerator::Tcg, Wiring::Serial) });
            line.lines().filter(|line| line.contains("net")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert!(device(Netdev::Absent).is_empty());
        let [none, tap] = [Netdev::Nothing, Netdev::Tap].map(device);
        assert_eq!(none, ["-device virtio-net-device,bus=virtio-mmio-bus.2,mac=02:74:69:66:66:02"]);
        assert_eq!(tap, ["-netdev tap,id=network,fd=10", &format!("{},netdev=network", none[0])]);
    }

    #[test]
    fn the_command_line_of_a_restore() {
        let restored = VmSpec {
            boot: None,
            scratch: Scratch::Overlay("/s/scratch.qcow2".into()),
            ..spec(Accelerator::Tcg, Wiring::Serial)
        };
        insta::assert_snapshot!("restore_tcg", lines(&restored));
    }

    #[test]
    fn the_kernel_carries_the_choices_to_the_agent() {
        let plain = spec(Accelerator::Tcg, Wiring::Serial).boot.unwrap();
        assert!(kernel_arguments(&plain, &Wiring::Serial, None).ends_with("reboot=t envd.channel=serial"));
        let chosen = Boot {
            profile: words::Profile::Restricted,
            init: words::Init::Path("/my init".to_owned()),
            volumes: vec!["/data".to_owned(), "/x\"y".to_owned()],
            ..plain
        };
        let words = "envd.profile=restricted envd.init=/my%20init envd.volume=/data envd.volume=/x%22y";
        let line = kernel_arguments(&chosen, &Wiring::Serial, None);
        assert!(line.ends_with(words), "{line}");
    }
}
