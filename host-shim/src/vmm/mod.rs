//! Virtual machines: a checked [`VmSpec`] in one VMM's words, and the process that runs it.
//!
//! QEMU is the only VMM so far. A second driver brings a trait; until then its functions are called by name.

mod console;
pub mod kvm_probe;
pub mod parts;
pub mod process;
pub mod qemu;
mod qmp;

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use envd_proto::boot;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use console::Console;
pub use parts::Parts;
pub use qmp::QmpError;

use crate::Error;
use crate::snapshot::MAX_STATE;
use qmp::Qmp;

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
    /// What is behind the guest's network device, which every VM has: a snapshot is restored with a network or without.
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

/// What is behind a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netdev {
    /// Nothing.
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
}

/// A VM. Dropped, it is killed.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    console: Console,
    errors: Console,
    monitor: Monitor,
    ram: File,
    restored: bool,
    stalled: watch::Sender<bool>,
}

/// The way to a VMM's monitor.
#[derive(Debug)]
enum Monitor {
    /// It has not greeted yet, or nobody has looked.
    Greeting(JoinHandle<Result<Qmp, QmpError>>),
    Ready(Qmp),
    Gone,
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

impl Vmm {
    pub(crate) fn new(
        child: Child,
        console: Console,
        errors: Console,
        monitor: UnixStream,
        ram: File,
        restored: bool,
    ) -> Self {
        let stalled = watch::Sender::new(false);
        let monitor = Monitor::Greeting(tokio::spawn(Qmp::connect(monitor, stalled.clone())));
        Self { child, console, errors, monitor, ram, restored, stalled }
    }

    async fn monitor(&mut self) -> Result<&Qmp, Error> {
        if let Monitor::Greeting(greeting) = &mut self.monitor {
            let greeted = greeting.await.map_err(|_| QmpError::Ended)?;
            // What failed once is not tried again: the connection is spent.
            self.monitor = Monitor::Gone;
            self.monitor = Monitor::Ready(greeted?);
        }
        match &self.monitor {
            Monitor::Ready(qmp) => Ok(qmp),
            Monitor::Greeting(_) | Monitor::Gone => Err(QmpError::Ended.into()),
        }
    }

    /// Where the guest's RAM is, while the VMM lives.
    pub fn ram(&self) -> Option<Ram<'_>> {
        Some(match self.restored {
            false => Ram::Shared(&self.ram),
            true => Ram::Private { base: &self.ram, pid: self.pid()? },
        })
    }

    /// Waits until the machine and its RAM are made.
    pub async fn made(&mut self) -> Result<(), Error> {
        self.monitor().await.map(drop)
    }

    /// Gives a VM that was launched without a boot the state of its devices. Its CPUs stand still until [`Vmm::resume`].
    pub async fn load(&mut self, state: &File) -> Result<(), Error> {
        let qmp = self.monitor().await?;
        let on = |name: &str| json!({ "capability": name, "state": true });
        let both = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        qmp.execute("migrate-set-capabilities", both).await?;
        qmp.execute_with_fd("getfd", json!({ "fdname": "state" }), state).await?;
        qmp.execute("migrate-incoming", json!({ "uri": "fd:state" })).await?;
        qmp.loaded().await?;
        Ok(())
    }

    /// Stops its CPUs; what its disks were given is in their files when this returns.
    pub async fn pause(&mut self) -> Result<(), Error> {
        self.monitor().await?.execute("stop", json!({})).await?;
        Ok(())
    }

    /// Lets its CPUs go on.
    pub async fn resume(&mut self) -> Result<(), Error> {
        // Before the command: it may stop again before its answer is read.
        self.stalled.send_replace(false);
        self.monitor().await?.execute("cont", json!({})).await?;
        Ok(())
    }

    /// The state of a paused VM's devices.
    pub async fn save_devices(&mut self) -> Result<Vec<u8>, Error> {
        const SET: u32 = 1;
        const NAME: &str = "the state of the devices (memfd_create)";
        let memory = rustix::fs::memfd_create("device-state", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = File::from(memory.map_err(|error| Error::io("make", NAME)(error.into()))?);
        // QEMU takes only a descriptor of the mode in which it would open the file.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
        let out = File::options().write(true).open(&path).map_err(Error::io("open", path))?;
        let qmp = self.monitor().await?;
        qmp.execute_with_fd("add-fd", json!({ "fdset-id": SET }), out).await?;
        let file = json!({ "filename": format!("/dev/fdset/{SET}"), "live": true });
        // `live`: the disks stay this VM's, which may go on.
        let saved = qmp.execute("xen-save-devices-state", file).await;
        qmp.execute("remove-fd", json!({ "fdset-id": SET })).await?;
        saved?;
        let mut state = Vec::new();
        (&memory).take(MAX_STATE + 1).read_to_end(&mut state).map_err(Error::io("read", NAME))?;
        if state.is_empty() || state.len() as u64 > MAX_STATE {
            let got = format!("a device state of {} bytes or more", state.len());
            return Err(QmpError::Protocol { expected: "one of 1 byte to 64 MiB", got }.into());
        }
        Ok(state)
    }

    /// Whether it stands still because there is no space for what its guest writes. [`Vmm::resume`] tries again.
    pub fn stalled(&self) -> watch::Receiver<bool> {
        self.stalled.subscribe()
    }

    /// Tells a running guest that its scratch disk has grown to this size.
    pub async fn resize_scratch(&mut self, bytes: u64) -> Result<(), Error> {
        let size = json!({ "node-name": "scratch", "size": bytes });
        self.monitor().await?.execute("block_resize", size).await?;
        Ok(())
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
            let own = line("qemu-system-").or_else(|| line("qemu: ")).unwrap_or_default();
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
        ] {
            assert_eq!(cause_of_end(status, words), expected);
        }
    }
}
