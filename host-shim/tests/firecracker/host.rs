//! A host with a template, and the model in Firecracker's place.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use template::{Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Beside this test's own folder: cargo builds examples with the tests.
fn model() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let model = test.parent().unwrap().parent().unwrap().join("examples/firecracker_model");
    assert!(model.exists(), "{} is not built: `cargo build -p host-shim --examples`", model.display());
    model
}

pub(crate) struct Host {
    dir: tempfile::TempDir,
    /// What goes wrong in the model.
    pub(crate) fault: String,
    /// Which version it says to be.
    pub(crate) version: String,
}

impl Host {
    /// A data folder with the template `demo`, and a kernel and a guest image that nothing reads.
    pub(crate) fn new() -> Self {
        // Short: sockets must fit into their addresses.
        let dir = tempfile::Builder::new().prefix("fc").tempdir_in("/tmp").unwrap();
        let host = Self { dir, fault: String::new(), version: "1.16.1".to_owned() };
        for file in ["vmlinux", "guest.cpio"] {
            fs::write(host.path(file), "x").unwrap();
        }
        let new = NewTemplate::begin(&host.path("data/templates"), &"demo".parse().unwrap()).unwrap();
        fs::write(new.rootfs(), b"rootfs").unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        let template = Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "demo".into(), digest: digest.parse().unwrap() },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
            runtime: RuntimeConfig { cmd: vec!["true".into()], ..RuntimeConfig::default() },
            machine: Machine { cpus: 2, memory_mib: 64, disk_mib: 16 },
            snapshot_only: false,
        };
        new.publish(&template).unwrap();
        host
    }

    pub(crate) fn with_fault(fault: &str) -> Self {
        let mut host = Self::new();
        host.fault = fault.to_owned();
        host
    }

    pub(crate) fn of_version(version: &str) -> Self {
        let mut host = Self::new();
        host.version = version.to_owned();
        host
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_host-shim"));
        command
            .args(args)
            .env("PATH", "/usr/bin:/bin")
            .env("TIFFIN_DATA_DIR", self.path("data"))
            .env("TIFFIN_KERNEL", self.path("vmlinux"))
            .env("TIFFIN_GUEST_IMAGE", self.path("guest.cpio"))
            .env("FIRECRACKER_BIN", model())
            .env("MODEL_LOG", self.path("requests"))
            .env("MODEL_FAULT", &self.fault)
            .env("MODEL_VERSION", &self.version)
            .env_remove("TIFFIN_VHOST_DEVICE_VSOCK")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stderr}\n{}", self.shim_logs());
        stdout.trim_end().to_owned()
    }

    pub(crate) fn shim_logs(&self) -> String {
        let logs = self.sandboxes().into_iter().map(|dir| fs::read_to_string(dir.join("shim.log")));
        logs.map(Result::unwrap_or_default).collect()
    }

    pub(crate) fn start(&self) -> String {
        // Said, so that nobody asks a device that this host may not have.
        self.ok(&["start", "--vmm", "firecracker", "--accel", "kvm", "demo"])
    }

    #[track_caller]
    pub(crate) fn exec(&self, id: &str, command: &[&str]) -> String {
        self.ok(&[&["exec", id, "--"], command].concat())
    }

    /// The requests since this was asked last, without what they say.
    pub(crate) fn requests(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("requests")).unwrap_or_default();
        fs::write(self.path("requests"), "").unwrap();
        text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect()
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path("requests")).unwrap_or_default()
    }

    pub(crate) fn state(&self, id: &str) -> Value {
        let text = fs::read(self.path("data/sandboxes").join(id).join("state.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub(crate) fn sandboxes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path("data/sandboxes")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).filter(|path| !path.ends_with(".lock")).collect()
    }

    /// Models that run in this host's folders.
    pub(crate) fn models(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let entry = entry.unwrap();
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(self.dir.path())) {
                found.push(pid);
            }
        }
        found
    }

    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        until("every VMM is gone", || self.models().is_empty());
        until("every folder is gone", || self.sandboxes().is_empty());
    }

    pub(crate) fn end(&self, ids: &[&str]) {
        self.ok(&[&["stop"], ids].concat());
        self.ok(&[&["rm"], ids].concat());
        self.assert_nothing_left();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a failed test has left.
        for pid in self.models() {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

#[track_caller]
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
