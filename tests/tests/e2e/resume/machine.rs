//! A virtual machine that can be cut into a snapshot, and be there again, once or twice.
//!
//! ```text
//! boot ──► stop, device state, copy of the scratch disk ──► Snapshot { RAM file, state, disk }
//!                                                                        │ restore: RAM mapped privately
//!                                                                        ├──► Machine "one"
//!                                                                        └──► Machine "two"
//! ```
//!
//! The command line is host-shim's own; QEMU is started here, so that a test sees every step of the agent's.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use e2e::{binary, made, template};
use envd_proto::boot::{Init, Profile};
use host_shim::vmm::{Accelerator, Boot, Netdev, Scratch, VmSpec, Wiring, process, qemu};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::qmp::Qmp;
use super::timely;

const MEMORY_MIB: u64 = 256;
const SCRATCH_BYTES: u64 = 64 << 20;

/// The identity of a machine that boots with a VM generation ID; a restored one gets a new one.
const FIRST_GUID: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

/// A folder for the machines of a test.
pub(super) struct Lab {
    folder: tempfile::TempDir,
    /// Devices that all of its machines have beside host-shim's.
    devices: Vec<&'static str>,
    init: Init,
    profile: Profile,
    vmgenid: bool,
}

/// A machine. Dropped, it is killed; it also dies with the test.
pub(super) struct Machine {
    vmm: Child,
    pub(super) qmp: Qmp,
    serial: Option<Serial>,
    console: PathBuf,
    scratch: PathBuf,
    // The daemon outlives the VMM: fields are dropped in this order.
    _daemon: Option<Child>,
}

/// The host's ends of the two serial ports.
pub(super) struct Serial {
    pub(super) control: UnixStream,
    pub(super) mux: UnixStream,
}

/// A machine that was stopped.
pub(super) struct Snapshot {
    ram: PathBuf,
    state: Vec<u8>,
    scratch: PathBuf,
}

impl Lab {
    pub(super) fn new(devices: Vec<&'static str>) -> Self {
        let folder = tempfile::Builder::new().prefix("tiffin-resume-").tempdir().expect("a folder");
        Self { folder, devices, init: Init::Envd, profile: Profile::Sandbox, vmgenid: false }
    }

    /// A program of the image is PID 1 of its machines' containers.
    pub(super) fn with_init(mut self, path: &str) -> Self {
        self.init = Init::Path(path.to_owned());
        self
    }

    /// Its machines' containers have Docker's rights only.
    pub(super) fn restricted(mut self) -> Self {
        self.profile = Profile::Restricted;
        self
    }

    /// Its machines have a VM generation ID. QEMU has that for machines with ACPI alone, so they are PCs.
    pub(super) fn with_vmgenid(mut self) -> Self {
        self.vmgenid = true;
        self
    }

    /// The VMM's arguments: host-shim's, and what is this lab's own.
    fn arguments(&self, spec: &VmSpec) -> Vec<OsString> {
        let mut arguments = qemu::arguments(spec, None);
        if self.vmgenid {
            for argument in &mut arguments {
                let text = argument.to_str().expect("plain paths");
                let pc = match text.split_once(',') {
                    Some(("microvm", _)) => "pc,memory-backend=ram,suppress-vmdesc=on".to_owned(),
                    Some((device, rest)) if device.starts_with("virtio-") => {
                        // It has no buses of the other kind.
                        let rest = rest.replace(&format!("bus={},", qemu::NETWORK_BUS), "");
                        format!("{},{rest}", device.replace("-device", "-pci"))
                    }
                    None if text.starts_with("virtio-") => text.replace("-device", "-pci"),
                    _ => continue,
                };
                *argument = pc.into();
            }
            let guid = if spec.boot.is_some() { FIRST_GUID } else { "auto" };
            arguments.extend(["-device".into(), format!("vmgenid,guid={guid}").into()]);
        }
        arguments.extend(self.devices.iter().map(OsString::from));
        arguments
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn scratch(&self, name: &str) -> PathBuf {
        let scratch = self.at(&format!("{name}.ext4"));
        rootfs_tools::empty(&scratch, SCRATCH_BYTES, None, name.as_bytes()).expect("a scratch disk");
        scratch
    }

    /// Boots a machine with serial ports, whose RAM is a file.
    pub(super) async fn boot(&self) -> Machine {
        Machine::launch(self, "source", Wiring::Serial, self.scratch("source"), &self.fresh_ram("ram")).await
    }

    fn fresh_ram(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        let file = std::fs::File::create_new(&path).expect("a file for the RAM");
        file.set_len(MEMORY_MIB << 20).expect("a sparse file");
        path
    }

    /// Boots a machine with vsock, behind a daemon that makes the sockets `vsock` and `vsock_*`.
    pub(super) async fn boot_vsock(&self) -> Machine {
        let socket = self.at("vhost");
        let daemon = Command::new(made("TIFFIN_VHOST_DEVICE_VSOCK"))
            .arg("--guest-cid")
            .arg(qemu::VHOST_USER_CID.to_string())
            .arg("--socket")
            .arg(&socket)
            .arg("--uds-path")
            .arg(self.at("vsock"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("vhost-device-vsock starts");
        // A connection would be taken for the VMM's: the kernel's table is asked.
        timely("vhost-device-vsock", async {
            while !crate::own_image::listens(&socket) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        let wiring = Wiring::VhostUserVsock { socket };
        let ram = self.fresh_ram("vsock.ram");
        let mut machine = Machine::launch(self, "vsock", wiring, self.scratch("vsock"), &ram).await;
        machine._daemon = Some(daemon);
        machine
    }

    /// Another machine that goes on where the snapshot's source was stopped. It stands still until [`Machine::go`].
    pub(super) async fn restore(&self, snapshot: &Snapshot, name: &str) -> Machine {
        let scratch = self.at(&format!("{name}.ext4"));
        std::fs::copy(&snapshot.scratch, &scratch).expect("a copy of the disk");
        let mut machine = Machine::launch(self, name, Wiring::Serial, scratch, &snapshot.ram).await;
        machine.capabilities().await;
        let socket = self.at(&format!("{name}.state"));
        machine.qmp.execute("migrate-incoming", uri(&socket)).await;
        let mut stream = UnixStream::connect(&socket).await.expect("the VMM listens for the state");
        stream.write_all(&snapshot.state).await.expect("the VMM takes the state");
        machine.qmp.migrated().await;
        machine
    }
}

impl Machine {
    /// Boots with a fresh file for its RAM; with a snapshot's it waits for the state, and what it writes is its own.
    async fn launch(lab: &Lab, name: &str, wiring: Wiring, scratch: PathBuf, ram: &Path) -> Self {
        let has_serial = wiring == Wiring::Serial;
        let is_fresh = std::fs::metadata(ram).expect("a file for the RAM").blocks() == 0;
        let boot = Boot {
            kernel: made("TIFFIN_KERNEL"),
            guest_image: made("TIFFIN_GUEST_IMAGE"),
            profile: lab.profile,
            init: lab.init.clone(),
            volumes: Vec::new(),
        };
        let spec = VmSpec {
            boot: is_fresh.then_some(boot),
            rootfs: template().join("rootfs.ext4"),
            scratch: Scratch::Raw(scratch.clone()),
            disks: Vec::new(),
            network: Netdev::Nothing,
            cpus: 1,
            memory_mib: MEMORY_MIB,
            accelerator: Accelerator::Tcg,
            wiring,
        };
        let mut mappings = Vec::new();
        let mut pair = |child_fd| {
            let (near, far) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
            near.set_nonblocking(true).expect("a socket that does not block");
            mappings.push(FdMapping { parent_fd: OwnedFd::from(far), child_fd });
            UnixStream::from_std(near).expect("a socket")
        };
        let (mut said, monitor) = (pair(qemu::CONSOLE_FD), pair(qemu::MONITOR_FD));
        let serial = has_serial.then(|| Serial { control: pair(qemu::CONTROL_FD), mux: pair(qemu::MUX_FD) });
        let ram = std::fs::File::options().read(true).write(true).open(ram).expect("the file of the RAM");
        mappings.push(FdMapping { parent_fd: ram.into(), child_fd: qemu::RAM_FD });
        // Through host-shim's own starter, so that no machine outlives a test that is killed.
        let mut command = Command::new(binary("host-shim"));
        command
            .arg(process::EXEC)
            .arg(std::process::id().to_string())
            .arg(qemu::find().expect("QEMU is installed"))
            .args(lab.arguments(&spec))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command.fd_mappings(mappings).expect("distinct descriptors");
        let vmm = command.spawn().expect("the VMM starts");
        // It holds the VMM's ends of the sockets: an end of the VMM is to be seen here as theirs.
        drop(command);
        let console = lab.at(&format!("{name}.console"));
        let mut log = std::fs::File::create(&console).expect("a console log");
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = said.read(&mut buffer).await {
                // A test that fails for want of disk says so elsewhere.
                let _ = std::io::Write::write_all(&mut log, &buffer[..count]);
            }
        });
        let qmp = Qmp::connect(monitor).await;
        Self { vmm, qmp, serial, console, scratch, _daemon: None }
    }

    /// The host's ends of the serial ports; once.
    pub(super) fn serial(&mut self) -> Serial {
        self.serial.take().expect("a machine with serial ports, asked once")
    }

    /// The serial port of the streams before a session is on it.
    pub(super) fn mux(&mut self) -> &mut UnixStream {
        &mut self.serial.as_mut().expect("serial ports that were not taken").mux
    }

    async fn capabilities(&mut self) {
        let on = |name: &str| json!({"capability": name, "state": true});
        let both = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
        self.qmp.execute("migrate-set-capabilities", both).await;
    }

    /// Stops its CPUs.
    pub(super) async fn stop(&mut self) {
        self.qmp.execute("stop", json!({})).await;
    }

    /// Lets them go on.
    pub(super) async fn go(&mut self) {
        self.qmp.execute("cont", json!({})).await;
    }

    /// Makes its scratch disk as large.
    pub(super) async fn resize_scratch(&mut self, bytes: u64) {
        self.qmp.execute("block_resize", json!({"node-name": "scratch", "size": bytes})).await;
    }

    /// Waits until its console has said this: the agent's log, also while it is busy with a request.
    pub(super) async fn says(&self, text: &str) {
        timely(text, async {
            while !std::fs::read_to_string(&self.console).is_ok_and(|said| said.contains(text)) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Waits until it has ended by itself; gives its scratch disk.
    pub(super) async fn ended(mut self) -> PathBuf {
        timely("the VMM's end", self.vmm.wait()).await.expect("the VMM ends");
        self.scratch.clone()
    }

    /// Stops it for good, and keeps what it was.
    pub(super) async fn into_snapshot(mut self, lab: &Lab) -> Snapshot {
        self.stop().await;
        let state = lab.at("source.state");
        self.qmp.execute("xen-save-devices-state", json!({"filename": state, "live": true})).await;
        let state = std::fs::read(state).expect("the VMM's state");
        let scratch = lab.at("snapshot.ext4");
        std::fs::copy(&self.scratch, &scratch).expect("a copy of the disk");
        // It would write to the RAM file, which is the snapshot's from now on.
        timely("the VMM's end", self.vmm.kill()).await.expect("the VMM is killed");
        Snapshot { ram: lab.at("ram"), state, scratch }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let console = std::fs::read(&self.console).unwrap_or_default();
            eprintln!("{}:\n{}", self.console.display(), String::from_utf8_lossy(&console));
        }
    }
}

fn uri(socket: &Path) -> serde_json::Value {
    json!({"uri": format!("unix:{}", socket.display())})
}
