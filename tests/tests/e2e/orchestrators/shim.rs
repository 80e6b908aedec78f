//! A `host-shim run` of an orchestrator that knows nothing but its command line, its streams and its folder.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{DEADLINE, binary, made, template};
use rustix::process::{Pid, Signal, kill_process};
use sandbox_folder::client::SandboxClient;
use serde_json::{Value, json};

/// Waits for what another process brings about.
#[track_caller]
pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// host-shim, with what `make test` has made.
pub(super) fn host_shim() -> Command {
    let mut command = Command::new(binary("host-shim"));
    command
        .env("TIFFIN_DATA_DIR", made("TIFFIN_E2E_DATA"))
        .env("TIFFIN_KERNEL", made("TIFFIN_KERNEL"))
        .env("TIFFIN_GUEST_IMAGE", made("TIFFIN_GUEST_IMAGE"))
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null());
    command
}

/// A sandbox folder with a spec in it, and a service manager's socket.
pub(super) struct Place {
    root: tempfile::TempDir,
    manager: UnixDatagram,
}

/// A shim on it. Dropped, it is ended.
pub(super) struct Shim {
    pub(super) child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Place {
    pub(super) fn new() -> Self {
        // Short: sockets must fit into their addresses.
        let root = tempfile::Builder::new().prefix("tio").tempdir_in("/tmp").expect("a folder");
        fs::create_dir(root.path().join("s")).expect("the sandbox's folder");
        let manager = UnixDatagram::bind(root.path().join("notify")).expect("a socket");
        let place = Self { root, manager };
        place.write_spec(&json!({ "schema_version": 1, "template": template() }));
        place
    }

    pub(super) fn write_spec(&self, spec: &Value) {
        fs::write(self.spec(), spec.to_string()).expect("a spec");
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.root.path().join("s")
    }

    pub(super) fn spec(&self) -> PathBuf {
        self.dir().join("spec.json")
    }

    /// `host-shim run --quiet --dir DIR`, with these options.
    pub(super) fn start(&self, options: &[&str]) -> Shim {
        let mut command = host_shim();
        command.args(["run", "--quiet", "--dir"]).arg(self.dir());
        for &option in options {
            match option {
                "--spec" => drop(command.arg("--spec").arg(self.spec())),
                option => drop(command.arg(option)),
            }
        }
        command.env("NOTIFY_SOCKET", self.root.path().join("notify"));
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("host-shim starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Shim { child, stdout }
    }

    /// What the service manager is told next, as lines.
    pub(super) fn told(&self) -> Vec<String> {
        let mut message = vec![0; 4096];
        self.manager.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        let length = self.manager.recv(&mut message).expect("a word to the service manager");
        message.truncate(length);
        String::from_utf8(message).expect("text").lines().map(str::to_owned).collect()
    }

    /// Nothing more was told.
    #[track_caller]
    pub(super) fn assert_nothing_told(&self) {
        self.manager.set_nonblocking(true).expect("a socket");
        let more = self.manager.recv(&mut [0; 64]).map_err(|error| error.kind());
        assert_eq!(more, Err(std::io::ErrorKind::WouldBlock));
        self.manager.set_nonblocking(false).expect("a socket");
    }

    pub(super) fn state(&self) -> Value {
        let text = fs::read(self.dir().join("state.json")).expect("state.json");
        serde_json::from_slice(&text).expect("JSON")
    }

    /// Whether the state is in this phase by now.
    pub(super) fn is(&self, phase: &str) -> bool {
        let Ok(text) = fs::read(self.dir().join("state.json")) else { return false };
        serde_json::from_slice::<Value>(&text).is_ok_and(|state| state["phase"] == phase)
    }

    pub(super) fn vmm(&self) -> Pid {
        let pid = self.state()["vmm_pid"].as_i64().expect("a VMM runs");
        Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
    }

    /// What a command in the sandbox prints.
    #[track_caller]
    pub(super) fn exec(&self, script: &str) -> String {
        let mut command = host_shim();
        command.args(["exec", &format!("{}/", self.dir().display()), "--", "sh", "-c", script]);
        let output = command.output().expect("host-shim runs");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Whether a command succeeds in the sandbox, which nobody may have been told of yet.
    pub(super) fn answers(&self, script: &str) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = SandboxClient::unix(self.dir().join("vsock.sock"));
        let done = runtime.block_on(client.output("/bin/sh", ["-c", script]));
        done.is_ok_and(|done| done.exit.code() == 0)
    }

    /// A verb of host-shim on the sandbox, in the background.
    pub(super) fn verb(&self, verb: &str) -> Child {
        let mut command = host_shim();
        command.arg(verb).arg(format!("{}/", self.dir().display()));
        command.stdout(Stdio::null()).spawn().expect("host-shim starts")
    }

    /// What of a running sandbox is in the folder.
    pub(super) fn left(&self) -> Vec<&'static str> {
        let live = ["api.sock", "vsock.sock", "vmm", "base", "scratch.ext4", "scratch.qcow2"];
        live.into_iter().filter(|name| self.dir().join(name).exists()).collect()
    }
}

impl Shim {
    /// The line of readiness.
    #[track_caller]
    pub(super) fn ready(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("its output can be read");
        if line.is_empty() {
            let mut said = String::new();
            self.child.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
            panic!("it did not become ready: {said}");
        }
        serde_json::from_str(&line).expect("a line of JSON")
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// The pid of its reaper.
    pub(super) fn reaper(&self) -> Pid {
        let shim = self.child.id();
        let children =
            fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).expect("its children");
        let is_reaper = |pid: &&str| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).nth(1) == Some(b"reap")
        };
        let pid = children.split_whitespace().find(is_reaper).expect("a reaper");
        Pid::from_raw(pid.parse().expect("a pid")).expect("a pid")
    }

    /// Waits for its end: exit code (none after a signal), what is left on its standard output, all of its standard error.
    #[track_caller]
    pub(super) fn ended(mut self) -> (Option<i32>, String, String) {
        let mut status = None;
        until("the shim ends", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).expect("text");
        self.child.stderr.take().expect("a pipe").read_to_string(&mut stderr).expect("text");
        (status.and_then(|status| status.code()), stdout, stderr)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // Its VMM dies with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines of JSON.
#[track_caller]
pub(super) fn lines_of_json(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("a log");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}
