//! A gateway with two teams, its scripts, and calls to it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const GATEWAY: &str = env!("CARGO_BIN_EXE_tiffin-gateway");

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        let host = Self { dir: tempfile::Builder::new().prefix("builds").tempdir_in("/tmp").unwrap() };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_builder.py");
        fs::copy(script, host.path("image-builder")).unwrap();
        host.command(&["teams", "create", "theirs"]);
        host
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program(&self) -> Command {
        let mut command = Command::new(GATEWAY);
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        command.env("TIFFIN_DATA_DIR", self.path("data")).env("FAKE_KVM", "ok").stdin(Stdio::null());
        for name in ["TIFFIN_LISTEN", "TIFFIN_KERNEL", "TIFFIN_GUEST_IMAGE", "TIFFIN_LOG", "TIFFIN_REGISTRY"]
        {
            command.env_remove(name);
        }
    }

    /// What the program prints.
    pub(crate) fn command(&self, args: &[&str]) -> String {
        let output = self.program().args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(crate) fn serve(&self, more: &[&str]) -> Served {
        self.serve_by(self.program(), more)
    }

    /// The same, by a command that ends with the gateway's options.
    pub(crate) fn serve_by(&self, mut command: Command, more: &[&str]) -> Served {
        self.environment(&mut command);
        let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_shim.py");
        command.args(["serve", "--listen", "127.0.0.1:0", "--no-base", "--host-shim"]).arg(shim);
        command.arg("--image-builder").arg(self.path("image-builder")).args(more);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log = std::thread::spawn({
            let mut stderr = child.stderr.take().unwrap();
            move || {
                let mut log = String::new();
                let _ = stderr.read_to_string(&mut log);
                log
            }
        });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let exports: Vec<String> = lines.by_ref().take(3).map_while(Result::ok).collect();
        let mut served =
            Served { child, log: Some(log), address: String::new(), keys: [String::new(), String::new()] };
        if exports.len() < 3 {
            panic!("it does not serve: {}", served.stop());
        }
        let value = |line: &str| line.split_once('=').unwrap().1.to_owned();
        served.address = value(&exports[0]).strip_prefix("http://").unwrap().to_owned();
        served.keys = [value(&exports[2]), self.command(&["keys", "create", "--team", "theirs"])];
        served
    }

    /// Has the builder stop at a stage.
    pub(crate) fn hang_at(&self, stage: &str) {
        fs::write(self.path("hang"), stage).unwrap();
    }

    /// Lets it go on from now on.
    pub(crate) fn go_on(&self) {
        let _ = fs::remove_file(self.path("hang"));
        let _ = fs::remove_file(self.path("at"));
    }

    /// Waits until the builder has stopped where it was told to; its process.
    #[track_caller]
    pub(crate) fn at_stage(&self) -> Pid {
        let text = until("the builder stops", || fs::read_to_string(self.path("at")).ok());
        fs::remove_file(self.path("at")).unwrap();
        Pid::from_raw(text.parse().unwrap()).unwrap()
    }

    /// How the builder was called, each call's words joined; names of folders and builds are left as they are.
    pub(crate) fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        calls.lines().map(|line| serde_json::from_str::<Vec<String>>(line).unwrap().join(" ")).collect()
    }

    /// Names in a folder of the data folder, those of temporary files left out.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path("data").join(folder)).into_iter().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }

    /// Processes that builds have started and that live.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let needle = format!("TIFFIN_HOST_SHIM={}", env!("CARGO_MANIFEST_DIR"));
        let data = self.path("data");
        let pids = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let of_ours = |pid: &i32| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let text = String::from_utf8_lossy(&environ);
            text.contains(&needle)
                && text.contains(&*data.to_string_lossy())
                && text.contains("TIFFIN_BUILD_ID=")
        };
        pids.filter(of_ours).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let shims = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let data = self.path("data/sandboxes");
            String::from_utf8_lossy(&line).contains(&*data.to_string_lossy()).then_some(pid)
        });
        for pid in shims.chain(self.processes()) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

/// Looks until there is something to see.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A gateway that serves; killed with the test.
pub(crate) struct Served {
    child: Child,
    log: Option<std::thread::JoinHandle<String>>,
    pub(crate) address: String,
    /// Of the team `default`, and of `theirs`.
    keys: [String; 2],
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn is(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { serde_json::from_str(&self.text).unwrap() }
    }

    #[track_caller]
    pub(crate) fn refuses(self, status: u16, words: &str) {
        let body = self.is(status);
        assert!(body["message"].as_str().unwrap().contains(words), "{words:?} is not in {body}");
    }
}

/// A build that was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Build {
    pub(crate) template: String,
    pub(crate) build: String,
}

impl Build {
    pub(crate) fn path(&self) -> String {
        format!("/templates/{}/builds/{}", self.template, self.build)
    }

    pub(crate) fn folder(&self) -> String {
        format!("{}.{}", self.template, self.build)
    }
}

impl Served {
    pub(crate) fn raw(&self, head: &str, body: &[u8]) -> Option<Answer> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        write!(stream, "{head}\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address).ok()?;
        stream.write_all(body).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some(Answer { status: head.split(' ').nth(1)?.parse().ok()?, text: body.to_owned() })
    }

    fn call_as(&self, team: usize, request: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (key, length) = (&self.keys[team], body.len());
        let head = format!(
            "{request} HTTP/1.1\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\nContent-Length: {length}"
        );
        self.raw(&head, body.as_bytes()).expect("an answer")
    }

    pub(crate) fn call(&self, request: &str, body: Value) -> Answer {
        self.call_as(0, request, &body)
    }

    /// As another team.
    pub(crate) fn theirs(&self, request: &str, body: Value) -> Answer {
        self.call_as(1, request, &body)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.call(&format!("GET {path}"), Value::Null)
    }

    pub(crate) fn request(&self, body: Value) -> Build {
        let begun = self.call("POST /v3/templates", body).is(202);
        let text = |name: &str| begun[name].as_str().unwrap().to_owned();
        Build { template: text("templateID"), build: text("buildID") }
    }

    pub(crate) fn start(&self, build: &Build, body: Value) -> Answer {
        self.call(&format!("POST /v2{}", build.path()), body)
    }

    /// Asks for a build with these RUN steps, and starts it.
    pub(crate) fn begin(&self, name: &str, steps: &[&str]) -> Build {
        let build = self.request(json!({ "name": name, "cpuCount": 1, "memoryMB": 128 }));
        let steps: Vec<Value> = steps.iter().map(|step| json!({ "type": "RUN", "args": [step] })).collect();
        self.start(&build, json!({ "fromImage": "debian:bookworm", "steps": steps })).is(202);
        build
    }

    pub(crate) fn status(&self, build: &Build) -> Value {
        self.get(&format!("{}/status", build.path())).is(200)
    }

    /// Waits until it has that status, or another from which it does not come back.
    #[track_caller]
    pub(crate) fn until(&self, build: &Build, wanted: &str) -> Value {
        let found = until(wanted, || {
            let status = self.status(build);
            let now = status["status"].as_str().unwrap();
            (now == wanted || ["ready", "error"].contains(&now)).then_some(status)
        });
        assert_eq!(found["status"], wanted, "{found}");
        found
    }

    /// Builds, and waits for it.
    pub(crate) fn build(&self, name: &str) -> Build {
        let build = self.begin(name, &["true"]);
        self.until(&build, "ready");
        build
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as an operator does; what it has logged.
    pub(crate) fn stop(&mut self) -> String {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
        self.log.take().map(|log| log.join().unwrap()).unwrap_or_default()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
