//! Virtual machines: a checked [`VmSpec`] in one VMM's words, and the process that runs it.
//!
//! ```text
//! Program { Kind, path } ──launch(VmSpec, Files, Place)──► Vmm ─┬ boot ─────────────┐
//!    │                                                          └ load, resume ─────┴─► pause, capture, resume │ kill
//!    └ lacks(Wishes): what it cannot do, before anything starts
//! ```
//!
//! The drivers are an enum and no trait: they are two, both known here, and what is theirs alone (QEMU's overlay of a disk,
//! Firecracker's own hand in a snapshot) is told apart by the compiler at every place that has to know.

mod console;
pub mod firecracker;
pub mod kvm_probe;
pub mod parts;
pub mod process;
pub mod program;
pub mod qemu;
mod qemu_machine;
mod qmp;
pub mod tsc;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use command_fds::FdMapping;
use envd_proto::boot;
use sandbox_folder::SandboxId;
use tokio::process::Child;
use tokio::sync::watch;

pub use console::Console;
pub use firecracker::{ApiError, Prepare};
pub use parts::Parts;
pub use program::{Kind, Program, Wishes};
pub use qmp::QmpError;

use crate::Error;

/// How long a killed process may take to be gone. SIGKILL needs no more than the kernel's freeing of its memory.
const REAP_DEADLINE: Duration = Duration::from_secs(10);

/// What a VMM has to make; every value is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// What a fresh VM begins with. One without it goes on from a snapshot.
    pub boot: Option<Boot>,
    /// The root file system; opened read-only, shared by many.
    pub rootfs: PathBuf,
    /// The scratch disk, of this VM only.
    pub scratch: Scratch,
    /// The devices with the caller's own disks.
    pub disks: Vec<Parts>,
    /// The guest's network device. Every VM of which there can be a snapshot has one, so that its clones may have a network.
    pub network: Netdev,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// How the channel reaches the guest.
    pub wiring: Wiring,
}

/// What a VM boots, and with which choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The kernel, an ELF with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub guest_image: PathBuf,
    /// What the container may do.
    pub profile: boot::Profile,
    /// PID 1 of the container.
    pub init: boot::Init,
    /// Paths of the container that sit on the scratch disk itself.
    pub volumes: Vec<String>,
}

/// A scratch disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scratch {
    /// The disk's bytes.
    Raw(PathBuf),
    /// What differs from another disk, of which only the descriptor is known ([`qemu::SCRATCH_BASE_FD`]).
    Overlay(PathBuf),
}

/// A network device, and what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netdev {
    /// There is no device.
    Absent,
    /// Nothing is behind it.
    Nothing,
    /// QEMU's own user networking.
    Slirp,
    /// The TAP on [`qemu::TAP_FD`].
    Tap,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// Its name in `state.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The devices of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Two virtio-serial ports, on [`qemu::CONTROL_FD`] and [`qemu::MUX_FD`].
    Serial,
    /// A vsock device of the host's kernel.
    VhostVsock {
        /// The guest's CID.
        cid: u32,
        /// The port on the host for the control door.
        control_port: u32,
    },
    /// A vsock device of an external daemon.
    VhostUserVsock {
        /// The daemon's vhost-user socket.
        socket: PathBuf,
    },
    /// A vsock device that the VMM itself shows as Unix sockets, at [`firecracker::VSOCK`] among its sockets.
    HybridVsock,
}

/// What a VM begins with that is behind no path.
#[derive(Debug)]
pub struct Files {
    /// The root file system: [`qemu::ROOTFS_FD`].
    pub rootfs: File,
    /// What it goes on from; a booted one has nothing.
    pub snapshot: Option<SnapshotFiles>,
    /// What is behind a [`Netdev::Tap`]: [`qemu::TAP_FD`].
    pub tap: Option<OwnedFd>,
    /// Those of its channel.
    pub channel: Vec<FdMapping>,
}

/// The files of a snapshot that a VM reads.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// All of the RAM.
    pub ram: File,
    /// The state of the devices.
    pub state: File,
    /// What is behind a [`Scratch::Overlay`].
    pub scratch_base: Option<File>,
}

/// Where a VM has its own files, and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sockets of its channel and of its VMM; there already.
    pub sockets: PathBuf,
    /// What the guest prints.
    pub console_log: PathBuf,
    /// What the VMM prints, where it has much to say.
    pub vmm_log: PathBuf,
    /// Its name, for those who look at processes.
    pub id: SandboxId,
}

/// A VM. Dropped, it is killed.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    console: Console,
    errors: Console,
    stalled: watch::Sender<bool>,
    driver: Driver,
}

/// The ways to tell a VMM what to do. Each knows one VMM's words; whoever has a [`Vmm`] knows none.
#[derive(Debug)]
enum Driver {
    Qemu(qemu_machine::Machine),
    Firecracker(firecracker::Machine),
}

/// Where the guest's RAM is.
#[derive(Clone, Copy, Debug)]
pub enum Ram<'vm> {
    /// All of it in this file, which the VMM shares.
    Shared(&'vm File),
    /// In this file, which others map too, but for the pages that the process has made its own.
    Private {
        /// The file.
        base: &'vm File,
        /// The VMM's process.
        pid: u32,
    },
}

/// How a paused VM's RAM and devices come into a snapshot.
#[derive(Debug)]
pub enum Capture<'vm> {
    /// The shim writes what it finds here.
    Read {
        /// The state of the devices.
        devices: Vec<u8>,
        /// The RAM.
        ram: Ram<'vm>,
    },
    /// The VMM has written both.
    Written,
}

impl Vmm {
    /// Starts a VMM. A machine of QEMU's that boots runs then; the others wait for [`Vmm::boot`] or [`Vmm::load`].
    pub async fn launch(
        program: &Program,
        version: &str,
        spec: &VmSpec,
        files: Files,
        place: Place,
    ) -> Result<Self, Error> {
        match program.kind {
            Kind::Qemu => qemu::launch(&program.path, spec, files, place).await,
            Kind::Firecracker => firecracker::launch(&program.path, version, spec, files, place).await,
        }
    }

    /// Which VMM it is.
    pub fn kind(&self) -> Kind {
        match self.driver {
            Driver::Qemu(_) => Kind::Qemu,
            Driver::Firecracker(_) => Kind::Firecracker,
        }
    }

    /// Whether [`Vmm::capture`] writes by itself, into files that are there.
    pub fn writes_captures(&self) -> bool {
        self.kind() == Kind::Firecracker
    }

    /// Boots a VM that was launched with a [`Boot`].
    pub async fn boot(&mut self) -> Result<(), Error> {
        match &mut self.driver {
            // By its command line.
            Driver::Qemu(_) => Ok(()),
            Driver::Firecracker(machine) => alive(&mut self.child, machine.boot()).await,
        }
    }

    /// Waits until the machine and its RAM are made.
    pub async fn made(&mut self) -> Result<(), Error> {
        match &mut self.driver {
            Driver::Qemu(machine) => machine.made().await,
            Driver::Firecracker(machine) => alive(&mut self.child, machine.made()).await,
        }
    }

    /// Gives a VM that was launched without a boot what it goes on from. Its CPUs stand still until [`Vmm::resume`].
    pub async fn load(&mut self) -> Result<(), Error> {
        match &mut self.driver {
            Driver::Qemu(machine) => machine.load().await,
            Driver::Firecracker(machine) => alive(&mut self.child, machine.load()).await,
        }
    }

    /// Stops its CPUs; what its disks were given is in their files when this returns.
    pub async fn pause(&mut self) -> Result<(), Error> {
        match &mut self.driver {
            Driver::Qemu(machine) => machine.pause().await,
            Driver::Firecracker(machine) => Ok(machine.pause().await?),
        }
    }

    /// Lets its CPUs go on.
    pub async fn resume(&mut self) -> Result<(), Error> {
        // Before the command: it may stop again before its answer is read.
        self.stalled.send_replace(false);
        match &mut self.driver {
            Driver::Qemu(machine) => machine.resume().await,
            Driver::Firecracker(machine) => Ok(machine.resume().await?),
        }
    }

    /// What a snapshot of this VM has in it before the VM stands still: what it shares with the one that it goes on from is
    /// the caller's business where the VMM has no hand in it.
    pub fn prepare_capture(&self) -> Result<Prepare, Error> {
        match &self.driver {
            Driver::Qemu(_) => Ok(Prepare::Base),
            Driver::Firecracker(machine) => machine.prepare_capture(),
        }
    }

    /// Takes the RAM and the devices of a paused VM. `folder` is the snapshot's; a VMM that writes by itself writes
    /// `state` and `ram` there, which are there and private.
    pub async fn capture(&mut self, folder: &Path) -> Result<Capture<'_>, Error> {
        let pid = self.child.id();
        match &mut self.driver {
            Driver::Qemu(machine) => {
                // By way of memory: QEMU says nothing but "an IO error" of a disk that is full.
                let devices = machine.save_devices().await?;
                let ram = match (machine.ram(), pid) {
                    ((file, false), _) => Ram::Shared(file),
                    ((base, true), Some(pid)) => Ram::Private { base, pid },
                    ((_, true), None) => return Err(QmpError::Ended.into()),
                };
                Ok(Capture::Read { devices, ram })
            }
            Driver::Firecracker(machine) => {
                machine.capture(folder).await?;
                Ok(Capture::Written)
            }
        }
    }

    /// Whether a capture has cut the guest's connections since this was asked last.
    pub fn take_disconnected(&mut self) -> bool {
        match &mut self.driver {
            Driver::Qemu(_) => false,
            Driver::Firecracker(machine) => machine.take_disconnected(),
        }
    }

    /// Whether it stands still because there is no space for what its guest writes. [`Vmm::resume`] tries again. Only QEMU
    /// does that; Firecracker gives its guest an error.
    pub fn stalled(&self) -> watch::Receiver<bool> {
        self.stalled.subscribe()
    }

    /// Tells a running guest that its scratch disk has grown to this size. The file of a raw one has.
    pub async fn resize_scratch(&mut self, bytes: u64) -> Result<(), Error> {
        match &mut self.driver {
            Driver::Qemu(machine) => machine.resize_scratch(bytes).await,
            Driver::Firecracker(machine) => Ok(machine.resize_scratch().await?),
        }
    }

    /// The process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for its end. Cancel safe.
    pub async fn wait(&mut self) -> Result<ExitStatus, Error> {
        self.child.wait().await.map_err(Error::io("wait for the VMM of", "this sandbox"))
    }

    /// Kills it and waits until it is gone.
    pub async fn kill(&mut self) -> Result<(), Error> {
        end(&mut self.child).await
    }

    /// The end of what the guest and the VMM itself printed. Complete once the VMM is gone.
    pub async fn last_words(&mut self) -> String {
        if self.child.id().is_none() {
            self.console.drained().await;
            self.errors.drained().await;
        }
        let (errors, console) = (self.errors.tail(), self.console.tail());
        if errors.is_empty() { console } else { format!("{console}{errors}") }
    }
}

/// Work that a process which has ended before it listens would leave waiting.
async fn alive<T>(child: &mut Child, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, Error> {
    tokio::select! {
        // An answer may have arrived together with the end, and says more.
        biased;
        done = work => Ok(done?),
        _ = child.wait() => Err(ApiError::Ended { request: "its start".to_owned() }.into()),
    }
}

/// Kills a child and waits until it is gone.
pub(crate) async fn end(child: &mut Child) -> Result<(), Error> {
    let gone = async {
        child.start_kill()?;
        child.wait().await
    };
    match tokio::time::timeout(REAP_DEADLINE, gone).await {
        Ok(result) => result.map(drop).map_err(Error::io("kill the VMM of", "this sandbox")),
        Err(_) => {
            let stuck =
                std::io::Error::other(format!("not gone {} s after SIGKILL", REAP_DEADLINE.as_secs()));
            Err(Error::io("kill the VMM of", "this sandbox")(stuck))
        }
    }
}

/// What ended a boot, in a sentence: the kernel's own words where it has some.
pub fn cause_of_end(status: ExitStatus, last_words: &str) -> String {
    let line = |needle: &str| {
        // That there is nothing behind a network device is QEMU's only word about a machine that is well.
        let said = |line: &&str| line.contains(needle) && !line.contains("has no peer");
        let found = last_words.lines().rev().find(said)?;
        Some(found[found.find(needle)?..].trim().to_owned())
    };
    if let Some(panic) = line("Kernel panic - not syncing:") {
        // Without /init the kernel looks for a root of its own.
        let no_init = panic.contains("Unable to mount root fs") || panic.contains("No working init");
        let hint = if no_init { "; the guest image has no /init that runs: make it again" } else { "" };
        return format!("the guest's kernel gave up: {panic}{hint}");
    }
    use std::os::unix::process::ExitStatusExt;
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("the VMM was killed by signal {signal}"),
        (_, Some(0)) => "the guest powered off before its agent was ready".to_owned(),
        (_, code) => {
            let own = ["qemu-system-", "qemu: ", "bad syscall", "Error: ", "panicked at "];
            let own = own.into_iter().find_map(line).unwrap_or_default();
            format!(
                "the VMM exited with code {}{}{own}",
                code.unwrap_or(-1),
                if own.is_empty() { "" } else { ": " }
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn the_cause_is_one_sentence() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        let panic =
            "[    0.65] Kernel panic - not syncing: Attempted to kill init!\n[    0.66] Call Trace:\n";
        for (status, words, expected) in [
            (
                exited(0),
                panic,
                "the guest's kernel gave up: Kernel panic - not syncing: Attempted to kill init!",
            ),
            (
                exited(0),
                "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
                "the guest's kernel gave up: Kernel panic - not syncing: VFS: Unable to mount root fs on \
                 unknown-block(0,0); the guest image has no /init that runs: make it again",
            ),
            (
                exited(1),
                "qemu: linux kernel too old\n",
                "the VMM exited with code 1: qemu: linux kernel too old",
            ),
            (exited(0), "", "the guest powered off before its agent was ready"),
            (ExitStatus::from_raw(9), "", "the VMM was killed by signal 9"),
            (
                exited(1),
                "qemu-system-x86_64: -kernel k: cannot open\n",
                "the VMM exited with code 1: qemu-system-x86_64: -kernel k: cannot open",
            ),
            (exited(3), "", "the VMM exited with code 3"),
            (
                exited(1),
                "[anonymous-instance:main] x\nError: RunWithApi(FailedToBindSocket(\"api\"))\n",
                "the VMM exited with code 1: Error: RunWithApi(FailedToBindSocket(\"api\"))",
            ),
        ] {
            assert_eq!(cause_of_end(status, words), expected);
        }
    }
}
