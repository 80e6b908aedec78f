//! A data folder, shims on it, and what must hold after each case.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use e2e::{DEADLINE, TestSandbox, binary, made, template};
use rustix::process::{Pid, Signal, kill_process};
use sandbox_folder::client::{ClientError, Code, Completed, SandboxClient};
use serde_json::{Value, json};

/// Whether every step is tried, and not only a sample.
pub(super) fn every() -> bool {
    std::env::var_os("TIFFIN_CRASH_EVERY").is_some_and(|value| value == "1")
}

/// Waits for what another process brings about.
#[track_caller]
pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// What a sandbox is once nothing of it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its shim had not come so far as to say anything.
    Unsaid,
    Paused,
    Ended,
}

/// A host with a template.
pub(super) struct Host {
    root: tempfile::TempDir,
    data: PathBuf,
    count: AtomicU32,
    warm: BTreeMap<PathBuf, Stamp>,
}

/// Length, mtime and inode of a file.
type Stamp = (u64, i64, i64, u64);

impl Host {
    /// A host whose template is warm.
    pub(super) fn warm() -> Self {
        let root = Self::root();
        let data = root.path().join("d");
        Self::on(root, data)
    }

    /// An empty folder for one. Short: sockets must fit into their addresses.
    pub(super) fn root() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("tc").tempdir_in("/tmp").expect("a folder")
    }

    /// A host with its data folder at `data`, which goes with `root`.
    pub(super) fn on(root: tempfile::TempDir, data: PathBuf) -> Self {
        let mut host = Self { root, data, count: 0.into(), warm: BTreeMap::new() };
        let to = host.template();
        fs::create_dir_all(to.join("x")).expect("a folder for the template");
        fs::remove_dir(to.join("x")).expect("it is empty");
        for name in ["template.json", "rootfs.ext4"] {
            fs::copy(template().join(name), to.join(name)).expect("the template is copied");
        }
        host.must(&["template", "warm", "--accel", "tcg", "e2e"]);
        host.warm = host.stamps();
        host
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    pub(super) fn template(&self) -> PathBuf {
        self.data.join("templates/e2e")
    }

    /// host-shim with these arguments on this host.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("host-shim"));
        command.args(arguments);
        self.prepare(&mut command);
        command
    }

    pub(super) fn prepare(&self, command: &mut Command) {
        command
            .env("TIFFIN_DATA_DIR", &self.data)
            .env("TIFFIN_KERNEL", made("TIFFIN_KERNEL"))
            .env("TIFFIN_GUEST_IMAGE", made("TIFFIN_GUEST_IMAGE"))
            .stdin(Stdio::null());
    }

    pub(super) fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("host-shim runs")
    }

    /// Runs it, which must succeed; gives what it printed.
    pub(super) fn must(&self, arguments: &[&str]) -> String {
        let Output { status, stdout, stderr } = self.output(arguments);
        assert!(status.success(), "{arguments:?}: {status}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).expect("text")
    }

    /// A folder for one more sandbox, with its spec in it.
    pub(super) fn case(&self) -> Case<'_> {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let dir = self.data.join(format!("sandboxes/case{number}"));
        fs::create_dir_all(&dir).expect("a folder for the sandbox");
        let spec = json!({
            "schema_version": 1, "template": self.template(), "accelerator": "tcg", "id": format!("case{number}"),
        });
        fs::write(dir.join("spec.json"), spec.to_string()).expect("its spec is written");
        Case { host: self, dir, shim: None }
    }

    /// What the template's files are.
    fn stamps(&self) -> BTreeMap<PathBuf, Stamp> {
        let mut stamps = BTreeMap::new();
        let mut folders = vec![self.template()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("the template can be listed").flatten() {
                let metadata = entry.metadata().expect("a file of the template");
                if metadata.is_dir() {
                    folders.push(entry.path());
                } else {
                    let stamp = (metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino());
                    stamps.insert(entry.path(), stamp);
                }
            }
        }
        stamps
    }

    /// The template's files are the very files that they were, and no others.
    #[track_caller]
    pub(super) fn assert_template_unchanged(&self) {
        assert_eq!(self.stamps(), self.warm, "somebody wrote to the template");
    }

    /// A sandbox of the template is a clone still, and what it was cloned from has the digests of its manifest.
    #[track_caller]
    pub(super) fn assert_template_whole(&self) {
        let snapshots = fs::read_dir(self.template().join("snapshots")).expect("snapshots");
        for entry in snapshots.flatten() {
            let snapshot =
                host_shim::snapshot::SnapshotFolder::open(&entry.path()).expect("a whole snapshot");
            snapshot.verify().expect("its files are what was written");
        }
        let mut case = self.case();
        let ready = case.start(&[]);
        assert_eq!(ready["start"], "cloned", "{ready}");
        case.kill();
        assert_eq!(case.settle(false), Phase::Ended);
    }

    /// Nothing unfinished is anywhere.
    #[track_caller]
    pub(super) fn assert_nothing_unfinished(&self) {
        let left = unfinished(self.root.path());
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Unfinished files and folders below a folder.
pub(super) fn unfinished(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        // The stamps of what was verified are a cache, whose oldest go.
        for entry in
            fs::read_dir(&folder).into_iter().flatten().flatten().filter(|_| !folder.ends_with("verified"))
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".new") || name.contains(".used") || name.ends_with(".old") {
                found.push(entry.path());
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
    }
    found
}

/// One sandbox in a folder of its own. Dropped, it is ended.
pub(super) struct Case<'a> {
    pub(super) host: &'a Host,
    pub(super) dir: PathBuf,
    pub(super) shim: Option<Child>,
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Case<'_> {
    fn text(&self) -> &str {
        self.dir.to_str().expect("a path of ASCII")
    }

    /// The arguments of a run of this sandbox.
    pub(super) fn run(&self, more: &[&str]) -> Vec<String> {
        let mut arguments = vec!["run".to_owned(), "--dir".to_owned(), self.text().to_owned()];
        if !more.contains(&"--resume") {
            arguments.extend([
                "--spec".to_owned(),
                self.dir.join("spec.json").to_str().expect("ASCII").to_owned(),
            ]);
        }
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        arguments
    }

    /// Starts it with these arguments more; gives the line that says that it is ready.
    #[track_caller]
    pub(super) fn start(&mut self, more: &[&str]) -> Value {
        match self.try_start(more) {
            Ok(ready) => ready,
            Err(said) => panic!("{more:?} in {}: {said}", self.dir.display()),
        }
    }

    /// Starts it, or gives what was said instead.
    pub(super) fn try_start(&mut self, more: &[&str]) -> Result<Value, String> {
        let arguments = self.run(more);
        let mut command = Command::new(binary("host-shim"));
        command.args(&arguments);
        self.host.prepare(&mut command);
        self.spawn(command)
    }

    /// Starts it by a command; gives the line that says that it is ready, or what was said instead.
    pub(super) fn spawn(&mut self, mut command: Command) -> Result<Value, String> {
        let mut shim =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut line = String::new();
        let stdout = shim.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("its output can be read");
        if let Ok(ready) = serde_json::from_str(&line) {
            self.shim = Some(shim);
            return Ok(ready);
        }
        let mut said = String::new();
        shim.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
        let status = shim.wait().expect("it ends");
        Err(format!("{said}({status})"))
    }

    /// The shim's pid.
    pub(super) fn pid(&self) -> Pid {
        pid_of(self.shim.as_ref().expect("it runs").id())
    }

    /// The pid of its reaper.
    pub(super) fn reaper(&self) -> Pid {
        let shim = self.pid().as_raw_nonzero().get();
        let children =
            fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).expect("its children");
        let reaper = children.split_whitespace().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).nth(1) == Some(b"reap")
        });
        pid_of(reaper.expect("a reaper").parse().expect("a pid"))
    }

    /// Its state at this moment.
    pub(super) fn state(&self) -> Option<Value> {
        let text = fs::read(self.dir.join("state.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap_or_else(|error| {
            panic!("state.json: {error}: {}", String::from_utf8_lossy(&text));
        }))
    }

    /// The pid of its VMM.
    pub(super) fn vmm(&self) -> Pid {
        let state = self.state().expect("a state");
        pid_of(u32::try_from(state["vmm_pid"].as_u64().expect("a VMM runs")).expect("a pid"))
    }

    /// A call of the owner's: status and answer; nothing when the shim ended before its answer.
    pub(super) fn call(&self, call: &str, body: &Value) -> Option<(u16, Value)> {
        let mut stream = UnixStream::connect(self.dir.join("api.sock")).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        let body = body.to_string();
        let head = format!(
            "POST /{call} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).ok()?;
        let mut answer = String::new();
        if let Err(error) = stream.read_to_string(&mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{call}: {error}");
            return None;
        }
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, serde_json::from_str(body).ok()?))
    }

    fn try_sh(&self, script: &str) -> Result<Completed, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = SandboxClient::unix(self.dir.join("vsock.sock"));
        runtime.block_on(async {
            let running = client.output("/bin/sh", ["-c", script]);
            tokio::time::timeout(DEADLINE, running).await.expect("the command ends")
        })
    }

    /// Waits until the sandbox is frozen no more.
    #[track_caller]
    pub(super) fn assert_thaws(&self) {
        until("it is thawed", || match self.try_sh("true") {
            Ok(_) => true,
            Err(error) if error.code() == Some(Code::Unavailable) => false,
            Err(error) => panic!("{error}"),
        });
    }

    /// What a script in the sandbox prints, which must succeed.
    #[track_caller]
    pub(super) fn sh(&self, script: &str) -> String {
        let done = self.try_sh(script).unwrap_or_else(|error| panic!("{script}: {error}"));
        assert_eq!(done.exit.code(), 0, "{script}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    }

    /// Marks the sandbox: a process that runs, and a file.
    pub(super) fn mark(&self) {
        self.sh("echo marked > /root/mark; sleep 100000 >/dev/null 2>&1 & echo $! > /tmp/pid");
    }

    /// It is the one that was marked: the process runs, and the file is there.
    #[track_caller]
    pub(super) fn assert_marked(&self) {
        assert_eq!(self.sh("kill -0 $(cat /tmp/pid) && cat /root/mark"), "marked\n");
    }

    /// Kills the shim, if it runs.
    pub(super) fn kill(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            let _ = shim.kill();
            let _ = shim.wait();
        }
    }

    /// Waits for the shim's own end; its exit code and what it said.
    #[track_caller]
    pub(super) fn ended(&mut self) -> (Option<i32>, String) {
        let mut shim = self.shim.take().expect("it was started");
        let mut status = None;
        until("the shim ends", || {
            status = shim.try_wait().expect("a child");
            status.is_some()
        });
        let mut said = String::new();
        shim.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
        (status.and_then(|status| status.code()), said)
    }

    /// Waits until nothing of it runs, has it swept, and looks at what is left. `unreaped`: nobody has swept yet.
    #[track_caller]
    pub(super) fn settle(&mut self, unreaped: bool) -> Phase {
        self.kill();
        let dir = self.dir.clone();
        // The whole host: the sandbox of a warming has a folder of its own.
        until("no process is left", || TestSandbox::processes_of(self.host.root.path()).is_empty());
        let first = self.host.must(&["sweep"]);
        assert!(unreaped || !first.contains(self.text()), "the reaper has left something: {first}");
        assert_eq!(self.host.must(&["sweep"]), "", "one sweep is not enough");
        if !dir.exists() {
            return Phase::Unsaid;
        }
        let left: Vec<_> =
            fs::read_dir(&dir).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
        for name in
            ["api.sock", "vsock.sock", "vmm", "base", "scratch.ext4", "scratch.qcow2", "snapshot.used"]
        {
            assert!(!left.iter().any(|entry| entry == name), "{left:?}");
        }
        if let Ok(lock) = fs::File::open(dir.join("lock")) {
            lock.try_lock().expect("the lock is free");
        }
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        assert!(!mounts.contains(self.text()), "a mount is left");
        let whole = dir.join("snapshot/manifest.json").exists();
        let phase = match self.state() {
            None => Phase::Unsaid,
            Some(state) => match state["phase"].as_str() {
                Some("paused") => Phase::Paused,
                Some("ended") => {
                    assert!(!state["end"].is_null(), "{state}");
                    Phase::Ended
                }
                other => panic!("{other:?} of a sandbox of which nothing runs"),
            },
        };
        assert_eq!(whole, phase == Phase::Paused, "{phase:?}: {left:?}");
        assert_eq!(left.iter().any(|entry| entry == "snapshot"), whole, "{left:?}");
        phase
    }

    /// Resuming it works if it is paused, and the sandbox that comes back is the one that was marked; else it is refused.
    #[track_caller]
    pub(super) fn assert_resumes(&mut self, phase: Phase) {
        if phase == Phase::Paused {
            let ready = self.start(&["--resume"]);
            assert_eq!(ready["start"], "resumed");
            self.assert_marked();
            self.kill();
            assert_eq!(self.settle(false), Phase::Ended, "its snapshot was used up");
        } else if self.dir.exists() {
            let said = self.try_start(&["--resume"]).expect_err("there is nothing to be resumed");
            assert!(said.contains("no snapshot"), "{said}");
        }
    }

    /// `host-shim rm` removes all that is left.
    #[track_caller]
    pub(super) fn remove(self) {
        let dir = self.dir.clone();
        let done = self.host.output(&["rm", "-f", &format!("{}/", self.text())]);
        assert!(!dir.exists(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

pub(super) fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
}

/// Kills a process that may be gone.
pub(super) fn kill(pid: Pid) {
    let _ = kill_process(pid, Signal::KILL);
}
