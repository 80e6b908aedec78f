//! QEMU's words for a [`VmSpec`].

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use command_fds::FdMapping;
use envd_proto::boot;
use tokio::net::UnixStream;

use super::{Accelerator, Console, VmSpec, Vmm, Wiring, process};
use crate::Error;

/// The VMM's file descriptor for the guest's console.
pub const CONSOLE_FD: i32 = 3;
/// The VMM's file descriptor for the control port of [`Wiring::Serial`].
pub const CONTROL_FD: i32 = 4;
/// The VMM's file descriptor for the mux port of [`Wiring::Serial`].
pub const MUX_FD: i32 = 5;

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
pub fn arguments(spec: &VmSpec) -> Vec<OsString> {
    let mut args = Arguments::default();
    let memory_backend = if spec.wiring.shares_memory() { ",memory-backend=ram" } else { "" };
    // No ACPI: QEMU 10's tables can be overwritten by the initrd, and without it a reset ends the VM (-no-reboot).
    args.pair("-machine", format!("microvm,acpi=off,rtc=on,isa-serial=on{memory_backend}"));
    match spec.accelerator {
        Accelerator::Kvm => args.pair("-accel", "kvm").pair("-cpu", "host"),
        Accelerator::Tcg => args.pair("-accel", "tcg,thread=multi").pair("-cpu", "max"),
    };
    args.pair("-m", format!("{}M", spec.memory_mib)).pair("-smp", spec.cpus.to_string());
    if spec.wiring.shares_memory() {
        args.pair("-object", format!("memory-backend-memfd,id=ram,size={}M,share=on", spec.memory_mib));
    }
    isolation(&mut args);
    args.pair("-kernel", &spec.kernel).pair("-initrd", &spec.guest_image);
    args.pair("-append", kernel_arguments(spec));

    args.pair("-chardev", format!("socket,id=console,fd={CONSOLE_FD}")).pair("-serial", "chardev:console");
    // Locking off: one file, many read-only readers, and no lock that a publisher of a new template could meet.
    let rootfs = [
        b"driver=file,locking=off,read-only=on,node-name=rootfs-file,filename=",
        escaped(&spec.rootfs).as_bytes(),
    ]
    .concat();
    args.pair("-blockdev", OsString::from_vec(rootfs));
    args.pair("-blockdev", "driver=raw,node-name=rootfs,read-only=on,file=rootfs-file");
    args.pair("-device", format!("virtio-blk-device,drive=rootfs,serial={}", boot::ROOTFS_SERIAL));
    // Flushes are not passed on: the disk is thrown away with the VM.
    let scratch =
        [b"driver=file,discard=unmap,node-name=scratch-file,filename=", escaped(&spec.scratch).as_bytes()]
            .concat();
    args.pair("-blockdev", OsString::from_vec(scratch));
    args.pair("-blockdev", "driver=raw,node-name=scratch,discard=unmap,cache.no-flush=on,file=scratch-file");
    args.pair("-device", format!("virtio-blk-device,drive=scratch,serial={}", boot::SCRATCH_SERIAL));
    args.pair("-object", "rng-random,id=rng,filename=/dev/urandom")
        .pair("-device", "virtio-rng-device,rng=rng");

    match &spec.wiring {
        Wiring::Serial => {
            args.pair("-device", "virtio-serial-device");
            for (name, fd) in [(boot::CONTROL_SERIAL_PORT, CONTROL_FD), (boot::MUX_SERIAL_PORT, MUX_FD)] {
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
    }
    args.0
}

/// Starts the VM. Its console goes to `console_log`; `fds` are those of its channel.
pub fn launch(
    program: &Path,
    spec: &VmSpec,
    mut fds: Vec<FdMapping>,
    console_log: PathBuf,
) -> Result<Vmm, Error> {
    let pair = || -> std::io::Result<(UnixStream, OwnedFd)> {
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        near.set_nonblocking(true)?;
        Ok((UnixStream::from_std(near)?, far.into()))
    };
    let (console, far) = pair().map_err(Error::io("make a socket for", &console_log))?;
    fds.push(FdMapping { parent_fd: far, child_fd: CONSOLE_FD });
    let mut child = process::bound(program, arguments(spec), fds)?
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
    Ok(Vmm::new(child, Console::spawn(console, Some(console_log)), errors))
}

impl Wiring {
    fn shares_memory(&self) -> bool {
        // The daemon reads and writes the guest's rings in the guest's RAM.
        matches!(self, Self::VhostUserVsock { .. })
    }
}

/// The arguments that keep a VMM small and quiet, in every VM and in the probe.
pub(super) fn isolation(args: &mut Arguments) {
    args.flag("-nodefaults").flag("-no-user-config").pair("-display", "none").flag("-no-reboot");
    args.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
}

fn kernel_arguments(spec: &VmSpec) -> String {
    // A panic resets at once, and a reset ends the VM. Serial output is slow under emulation: errors only.
    let mut line = "console=ttyS0 quiet panic=-1 reboot=t".to_owned();
    let mut argument = |name: &str, value: &str| line.push_str(&format!(" {name}={value}"));
    match &spec.wiring {
        Wiring::Serial => argument(boot::ARG_CHANNEL, "serial"),
        Wiring::VhostUserVsock { .. } => argument(boot::ARG_CHANNEL, "vsock"),
        Wiring::VhostVsock { control_port, .. } => {
            argument(boot::ARG_CHANNEL, "vsock");
            argument(boot::ARG_CONTROL_PORT, &control_port.to_string());
        }
    }
    // What is the agent's default is not said, so that an older one boots too.
    if spec.profile != boot::Profile::default() {
        argument(boot::ARG_PROFILE, spec.profile.name());
    }
    if spec.init != boot::Init::default() {
        argument(boot::ARG_INIT, &boot::encode_path(&spec.init.to_string()));
    }
    for path in &spec.volumes {
        argument(boot::ARG_VOLUME, &boot::encode_path(path));
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
            kernel: "/k/vmlinux".into(),
            guest_image: "/k/guest-image.cpio".into(),
            rootfs: "/t,1/rootfs.ext4".into(),
            scratch: "/s/scratch.ext4".into(),
            cpus: 2,
            memory_mib: 512,
            accelerator,
            wiring,
            profile: boot::Profile::Sandbox,
            init: boot::Init::Envd,
            volumes: Vec::new(),
        }
    }

    fn lines(accelerator: Accelerator, wiring: Wiring) -> String {
        let spec = spec(accelerator, wiring);
        let mut out = String::new();
        for argument in arguments(&spec) {
            let argument = argument.into_string().unwrap();
            out.push_str(if argument.starts_with('-') { "\n" } else { " " });
            out.push_str(&argument);
        }
        out
    }

    #[test]
    fn the_command_line_of_each_channel() {
        insta::assert_snapshot!("serial_tcg", lines(Accelerator::Tcg, Wiring::Serial));
        insta::assert_snapshot!(
            "vhost_user_tcg",
            lines(Accelerator::Tcg, Wiring::VhostUserVsock { socket: "/s/vmm/vhost".into() })
        );
        insta::assert_snapshot!(
            "vhost_vsock_kvm",
            lines(Accelerator::Kvm, Wiring::VhostVsock { cid: 77, control_port: 1025 })
        );
    }

    #[test]
    fn the_kernel_carries_the_choices_to_the_agent() {
        let plain = spec(Accelerator::Tcg, Wiring::Serial);
        assert!(kernel_arguments(&plain).ends_with("reboot=t envd.channel=serial"));
        let chosen = VmSpec {
            profile: boot::Profile::Restricted,
            init: boot::Init::Path("/my init".to_owned()),
            volumes: vec!["/data".to_owned(), "/x\"y".to_owned()],
            ..plain
        };
        let words = "envd.profile=restricted envd.init=/my%20init envd.volume=/data envd.volume=/x%22y";
        assert!(kernel_arguments(&chosen).ends_with(words), "{}", kernel_arguments(&chosen));
    }
}
