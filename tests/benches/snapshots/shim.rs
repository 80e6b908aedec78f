//! Sandboxes as an orchestrator has them: a host-shim each, its line of readiness, its two sockets.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use e2e::{binary, made};
use envd_proto::CLIENT_PORT;
use envd_proto::process::process_event::Event;
use serde_json::{Value, json};

use crate::milliseconds;
use crate::table::Row;
use crate::wire::{Wire, connect};

/// What a host-shim may take until it is ready, on a machine that runs fifty at once.
const BOOT_TIMEOUT_S: u64 = 600;

/// A data folder with one template that has a snapshot.
pub(crate) struct Host {
    data: PathBuf,
    next: AtomicU32,
}

/// How a sandbox is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Booted,
    Restored,
    Parked,
}

impl Host {
    pub(crate) fn new(folder: &Path) -> Self {
        let host = Self { data: folder.join("data"), next: AtomicU32::new(0) };
        let shared = e2e::template();
        fs::create_dir_all(host.template()).unwrap();
        // Only linked: nobody writes it.
        if fs::hard_link(shared.join("rootfs.ext4"), host.template().join("rootfs.ext4")).is_err() {
            fs::copy(shared.join("rootfs.ext4"), host.template().join("rootfs.ext4")).unwrap();
        }
        fs::copy(shared.join("template.json"), host.template().join("template.json")).unwrap();
        let mut warm = Command::new(binary("host-shim"));
        warm.args(["template", "warm", "--quiet", "--data-dir"]).arg(&host.data).arg(host.template());
        let warm = warm.output().unwrap();
        assert!(warm.status.success(), "{}", String::from_utf8_lossy(&warm.stderr));
        host
    }

    pub(crate) fn template(&self) -> PathBuf {
        self.data.join("templates/bench")
    }

    /// A new path on the disk of the data folder.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        self.data.join(format!("{name}-{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }
}

/// A sandbox with its shim. Dropped, it is killed with all that it has started.
pub(crate) struct Sandbox {
    shim: Child,
    dir: PathBuf,
    ready: Value,
}

impl Sandbox {
    /// Starts one; gives when its process was started.
    pub(crate) fn start(host: &Host, start: Start) -> (Self, Instant) {
        let dir = host.fresh("s");
        fs::create_dir(&dir).unwrap();
        let spec = json!({
            "schema_version": 1,
            "template": host.template(),
            "kernel": made("TIFFIN_KERNEL"),
            "guest_image": made("TIFFIN_GUEST_IMAGE"),
            "channel": "serial",
            "restore": if start == Start::Booted { "never" } else { "always" },
            "boot_timeout_s": BOOT_TIMEOUT_S,
        });
        let file = dir.join("spec.json");
        fs::write(&file, spec.to_string()).unwrap();
        let mut command = Command::new(binary("host-shim"));
        command.args(["run", "--quiet", "--spec"]).arg(&file).arg("--dir").arg(&dir);
        command.arg("--data-dir").arg(&host.data).stdin(Stdio::null()).stdout(Stdio::piped());
        if start == Start::Parked {
            command.arg("--park");
        }
        let begun = Instant::now();
        let mut shim = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(shim.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).expect("a line of readiness");
        (Self { shim, dir, ready }, begun)
    }

    /// Runs `/bin/echo` until its output is here.
    pub(crate) fn first_output(&self) {
        let mut wire = self.wire();
        wire.start(None, "/bin/echo", &["hello"]).unwrap();
        loop {
            match wire.event().unwrap() {
                Event::Data(_) => return,
                Event::Start(_) | Event::Keepalive(_) => {}
                Event::End(end) => panic!("no output: {end:?}"),
            }
        }
    }

    /// Runs a shell script that must succeed.
    pub(crate) fn sh(&self, script: &str) {
        let (_, code) = self.wire().run("/bin/sh", &["-c", script]).unwrap();
        assert_eq!(code, 0, "{script}");
    }

    fn wire(&self) -> Wire {
        let mut stream = connect(&self.dir.join("vsock.sock")).unwrap();
        stream.write_all(format!("CONNECT {CLIENT_PORT}\n").as_bytes()).unwrap();
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while !answer.ends_with(b"\n") {
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        assert!(answer.starts_with(b"OK"), "{}", String::from_utf8_lossy(&answer));
        Wire::new(stream)
    }

    /// A call on its `api.sock`.
    pub(crate) fn call(&self, path: &str, body: &str) -> Value {
        let mut wire = Wire::new(connect(&self.dir.join("api.sock")).unwrap());
        let status = wire.request("POST", path, "application/json", body.as_bytes()).unwrap();
        let answer = wire.rest().unwrap();
        assert!(status < 300, "{path}: {status} {}", String::from_utf8_lossy(&answer));
        serde_json::from_slice(&answer).unwrap()
    }

    /// Its pids: the shim's, the VMM's, and all of them.
    pub(crate) fn processes(&self) -> (u32, u32, Vec<u32>) {
        let state: Value = serde_json::from_slice(&fs::read(self.dir.join("state.json")).unwrap()).unwrap();
        let (shim, vmm) = (self.shim.id(), u32::try_from(state["vmm_pid"].as_u64().unwrap()).unwrap());
        let tasks = format!("/proc/{shim}/task/{shim}/children");
        let children = fs::read_to_string(tasks).unwrap();
        let mut all: Vec<u32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        all.push(shim);
        (shim, vmm, all)
    }

    /// Ends it in order.
    pub(crate) fn end(mut self) {
        self.call("/stop", r#"{"grace_ms":0}"#);
        let status = self.shim.wait().unwrap();
        assert!(status.success(), "{status}");
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // It has ended already unless something failed; its VMM dies with it.
        let _ = self.shim.kill();
        let _ = self.shim.wait();
    }
}

/// Where the time of a restored sandbox goes.
#[derive(Default)]
pub(crate) struct Phases {
    names: Vec<String>,
    samples: Vec<Vec<Duration>>,
}

impl Phases {
    pub(crate) fn add(&mut self, sandbox: &Sandbox, ready: Duration, took: Duration) {
        let phases = sandbox.ready["phases"].as_array().unwrap();
        let told =
            phases.iter().map(|phase| (phase["name"].as_str().unwrap(), phase["ms"].as_f64().unwrap()));
        let told = told.map(|(name, ms)| (name, Duration::from_secs_f64(ms / 1e3)));
        let shim: Duration = told.clone().map(|(_, took)| took).sum();
        let around =
            [("the process's start, sockets", ready.saturating_sub(shim)), ("the first exec", took - ready)];
        for (n, (name, took)) in told.chain(around).enumerate() {
            if self.names.len() == n {
                self.names.push(name.to_owned());
                self.samples.push(Vec::new());
            }
            assert_eq!(self.names[n], name, "every restore has the same phases");
            self.samples[n].push(took);
        }
    }

    pub(crate) fn rows(self) -> impl Iterator<Item = Row> {
        let samples = self.samples.into_iter().map(|samples| milliseconds(crate::median(samples)));
        self.names
            .into_iter()
            .zip(samples)
            .map(|(name, took)| Row::plain(format!("  of the restored: {name}"), took))
    }
}
