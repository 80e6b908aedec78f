//! The yardstick of a restore: a machine of the same devices, whose guest is an init that runs `/bin/echo` for each byte.
//!
//! It is started as host-shim's driver starts its own: the same arguments, the RAM mapped privately from a file, the device
//! state by descriptor, the scratch disk an overlay. Nothing else is done for it, by nobody.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use e2e::made;
use envd_proto::boot;
use host_shim::vmm::{Accelerator, Boot, Netdev, Scratch, VmSpec, Wiring, qemu};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::wire::DEADLINE;

const MEMORY_MIB: u64 = 256;
const SCRATCH_BYTES: u64 = 64 << 20;

/// A bare machine that was stopped.
pub(crate) struct BareSnapshot {
    folder: PathBuf,
    qemu: PathBuf,
}

impl BareSnapshot {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// A bare machine; killed when it is dropped.
pub(crate) struct Bare {
    vmm: Child,
    monitor: Monitor,
    port: UnixStream,
    // Nobody reads or writes them, but QEMU would notice their end.
    _others: [UnixStream; 2],
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// Boots the machine, and keeps it as it is when its agent is there.
pub(crate) fn snapshot(folder: &Path) -> BareSnapshot {
    let folder = folder.join("bare");
    fs::create_dir(&folder).unwrap();
    let snapshot = BareSnapshot { folder, qemu: qemu::find().unwrap() };
    let guest_image = snapshot.at("guest-image.cpio");
    rootfs_tools::guest_image(&made("TIFFIN_BARE_EXEC"), &guest_image).unwrap();
    let scratch = snapshot.at("scratch.ext4");
    rootfs_tools::empty(&scratch, SCRATCH_BYTES, None, b"bare").unwrap();
    File::create_new(snapshot.at("ram")).unwrap().set_len(MEMORY_MIB << 20).unwrap();
    let boot = Boot {
        kernel: made("TIFFIN_KERNEL"),
        guest_image,
        profile: boot::Profile::default(),
        init: boot::Init::default(),
        volumes: Vec::new(),
    };
    let mut machine = Bare::launch(&snapshot, Some(boot), Scratch::Raw(scratch));
    let mut there = [0];
    machine.port.read_exact(&mut there).unwrap();
    machine.monitor.execute("stop", json!({}), None);
    let state = json!({ "filename": snapshot.at("state"), "live": true });
    machine.monitor.execute("xen-save-devices-state", state, None);
    drop(machine);
    snapshot
}

impl Bare {
    /// Another machine that goes on from there; gives when its process was started.
    pub(crate) fn restore(snapshot: &BareSnapshot) -> (Self, Instant) {
        let overlay = snapshot.at("scratch.qcow2");
        let _ = fs::remove_file(&overlay);
        let begun = Instant::now();
        host_shim::snapshot::overlay(&overlay, SCRATCH_BYTES, SCRATCH_BYTES).unwrap();
        let mut machine = Self::launch(snapshot, None, Scratch::Overlay(overlay));
        let monitor = &mut machine.monitor;
        let on = |name: &str| json!({ "capability": name, "state": true });
        let both = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        monitor.execute("migrate-set-capabilities", both, None);
        let state = File::open(snapshot.at("state")).unwrap();
        monitor.execute("getfd", json!({ "fdname": "state" }), Some(&state));
        monitor.execute("migrate-incoming", json!({ "uri": "fd:state" }), None);
        monitor.loaded();
        monitor.execute("cont", json!({}), None);
        (machine, begun)
    }

    fn launch(snapshot: &BareSnapshot, boot: Option<Boot>, scratch: Scratch) -> Self {
        let overlay = matches!(scratch, Scratch::Overlay(_));
        let booted = boot.is_some();
        let spec = VmSpec {
            boot,
            rootfs: e2e::template().join("rootfs.ext4"),
            scratch,
            disks: Vec::new(),
            network: Netdev::Nothing,
            cpus: 1,
            memory_mib: MEMORY_MIB,
            accelerator: Accelerator::Tcg,
            wiring: Wiring::Serial,
        };
        let mut fds = Vec::new();
        let mut pair = |child_fd| {
            let (near, far) = UnixStream::pair().unwrap();
            fds.push(FdMapping { parent_fd: OwnedFd::from(far), child_fd });
            near.set_read_timeout(Some(DEADLINE)).unwrap();
            near
        };
        let [port, mux, console, monitor] =
            [qemu::CONTROL_FD, qemu::MUX_FD, qemu::CONSOLE_FD, qemu::MONITOR_FD].map(&mut pair);
        let ram = File::options().read(true).write(booted).open(snapshot.at("ram")).unwrap();
        fds.push(FdMapping { parent_fd: ram.into(), child_fd: qemu::RAM_FD });
        if overlay {
            let base = File::open(snapshot.at("scratch.ext4")).unwrap();
            fds.push(FdMapping { parent_fd: base.into(), child_fd: qemu::SCRATCH_BASE_FD });
        }
        let mut command = Command::new(&snapshot.qemu);
        command.args(qemu::arguments(&spec, None)).stdin(Stdio::null()).stdout(Stdio::null());
        command.fd_mappings(fds).unwrap();
        let vmm = command.spawn().unwrap();
        // It holds the VMM's ends of the sockets.
        drop(command);
        Self { vmm, monitor: Monitor::new(monitor), port, _others: [mux, console] }
    }

    /// Has its agent run the command, until the output is here.
    pub(crate) fn echo(&mut self) {
        self.port.write_all(b"!").unwrap();
        let mut output = [0; 6];
        self.port.read_exact(&mut output).unwrap();
        assert_eq!(&output, b"hello\n");
    }
}

/// QEMU's monitor, for one command after the other.
struct Monitor {
    lines: BufReader<UnixStream>,
    loaded: bool,
}

impl Monitor {
    fn new(stream: UnixStream) -> Self {
        let mut monitor = Self { lines: BufReader::new(stream), loaded: false };
        monitor.next();
        monitor.execute("qmp_capabilities", json!({}), None);
        monitor
    }

    fn execute(&mut self, command: &str, arguments: Value, file: Option<&File>) {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        send(self.lines.get_ref(), line.as_bytes(), file).unwrap();
        loop {
            let message = self.next();
            if message.get("event").is_some() {
                self.loaded |= is_loaded(&message);
                continue;
            }
            assert!(message.get("return").is_some(), "{command}: {message}");
            return;
        }
    }

    fn loaded(&mut self) {
        while !self.loaded {
            let message = self.next();
            self.loaded = is_loaded(&message);
        }
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).expect("a line of JSON")
    }
}

fn is_loaded(message: &Value) -> bool {
    let status = &message["data"]["status"];
    assert!(status != "failed", "{message}");
    message["event"] == "MIGRATION" && status == "completed"
}

fn send(stream: &UnixStream, bytes: &[u8], file: Option<&File>) -> io::Result<()> {
    let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    assert_eq!(sent, bytes.len(), "a short line goes at once");
    Ok(())
}
