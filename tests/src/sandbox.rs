//! A sandbox of a test.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use sandbox_folder::client::{Completed, SandboxClient};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::{DEADLINE, TestData, binary, made, template, vmm};

/// What carries the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// The default of the VMM: with QEMU virtio-serial with the mux.
    Serial,
    /// AF_VSOCK in the guest, by the external daemon.
    Vsock,
}

impl Channel {
    /// Every channel that a machine without /dev/vhost-vsock has.
    pub const ALL: [Self; 2] = [Self::Serial, Self::Vsock];

    fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Vsock => "vhost-user-vsock",
        }
    }
}

/// A sandbox that somebody else's orchestrator could have started.
pub struct TestSandbox {
    pub(crate) shim: Child,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) data: PathBuf,
    pub(crate) token: Option<String>,
    ready: Value,
}

/// What a test asks for.
#[derive(Clone)]
pub struct TestSandboxBuilder {
    pub(crate) spec: Value,
    pub(crate) data: PathBuf,
    park: bool,
}

impl TestSandboxBuilder {
    pub(crate) fn from_spec(spec: Value, data: PathBuf) -> Self {
        Self { spec, data, park: false }
    }

    /// Sets a field of the spec.
    pub fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.spec[field] = value.into();
        self
    }

    /// Takes a template of the test's own.
    pub fn template(mut self, data: &TestData, name: &str) -> Self {
        self.data = data.path().to_owned();
        self.set("template", data.template(name).to_str().expect("a plain path"))
    }

    /// It is to wait for a Configure.
    pub fn parked(mut self) -> Self {
        self.park = true;
        self
    }

    /// Starts it; returns when it is ready.
    pub async fn start(self) -> TestSandbox {
        match self.try_start().await {
            Ok(sandbox) => sandbox,
            Err(failure) => panic!("the sandbox did not start: {failure}"),
        }
    }

    /// Starts it, or gives what the shim said on its standard error, with its exit status.
    pub async fn try_start(self) -> Result<TestSandbox, String> {
        let folder =
            tempfile::Builder::new().prefix("tiffin-e2e-").tempdir().expect("a folder for the sandbox");
        let spec = folder.path().join("spec.json");
        std::fs::write(&spec, self.spec.to_string()).expect("the spec is written");
        let mut arguments: Vec<OsString> = vec!["--spec".into(), spec.into()];
        if self.park {
            arguments.push("--park".into());
        }
        let token = self.spec["access_token"].as_str().map(str::to_owned);
        TestSandbox::run(folder, self.data, token, arguments).await.map_err(|failed| failed.said)
    }
}

/// A shim that ended instead of becoming ready.
pub(crate) struct Failed {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) data: PathBuf,
    pub(crate) token: Option<String>,
    /// What it said on its standard error, with its exit status.
    pub(crate) said: String,
}

impl TestSandbox {
    /// A sandbox of the template `e2e`.
    pub fn of(channel: Channel) -> TestSandboxBuilder {
        let mut spec = json!({
            "schema_version": 1,
            "template": template(),
            "kernel": made("TIFFIN_KERNEL"),
            "guest_image": made("TIFFIN_GUEST_IMAGE"),
            "channel": channel.name(),
        });
        if channel == Channel::Serial && vmm() != "qemu" {
            // Another VMM has a channel of its own.
            spec["vmm"] = vmm().into();
            spec["channel"] = "auto".into();
        }
        TestSandboxBuilder {
            spec,
            // What host-shim finds out about this host is kept beside the tests' templates.
            data: made("TIFFIN_E2E_DATA"),
            park: false,
        }
    }

    /// A sandbox of a warm template of the test's own, over serial ports.
    pub fn clone_of(data: &TestData, name: &str) -> TestSandboxBuilder {
        Self::of(Channel::Serial).template(data, name).set("restore", "always")
    }

    /// Runs a shim on `folder/dir`; returns when it is ready, or with what it said on its standard error and its status.
    pub(crate) async fn run(
        folder: tempfile::TempDir,
        data: PathBuf,
        token: Option<String>,
        arguments: Vec<OsString>,
    ) -> Result<Self, Failed> {
        let mut shim = Command::new(binary("host-shim"))
            .arg("run")
            .args(arguments)
            .arg("--dir")
            .arg(folder.path().join("dir"))
            .env("TIFFIN_DATA_DIR", &data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("host-shim starts");
        let stdout = shim.stdout.take().expect("its standard output is a pipe");
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let reading = tokio::time::timeout(DEADLINE, stdout.read_line(&mut line));
        reading.await.expect("the shim neither became ready nor failed").expect("its output can be read");
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Self { shim, folder, data, token, ready }),
            Err(_) => {
                let mut said = String::new();
                let mut stderr = shim.stderr.take().expect("its standard error is a pipe");
                let reading = tokio::time::timeout(DEADLINE, stderr.read_to_string(&mut said));
                reading.await.expect("the shim ends").expect("its errors can be read");
                let status = shim.wait().await.expect("the shim ends");
                Err(Failed { folder, data, token, said: format!("{said}({status})") })
            }
        }
    }

    /// Starts one with nothing special.
    pub async fn start(channel: Channel) -> Self {
        Self::of(channel).start().await
    }

    /// The line that said that it is ready.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("dir")
    }

    /// Its state at this moment.
    pub fn state(&self) -> Value {
        let text = std::fs::read(self.dir().join("state.json")).expect("state.json is there");
        serde_json::from_slice(&text).expect("state.json is JSON")
    }

    /// The pid of its VMM.
    pub fn vmm(&self) -> rustix::process::Pid {
        let pid = self.state()["vmm_pid"].as_i64().expect("a VMM runs");
        rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
    }

    /// The pid of its shim.
    pub fn shim(&self) -> rustix::process::Pid {
        let pid = self.shim.id().expect("the shim runs");
        rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid")
    }

    /// A client over its public socket.
    pub fn client(&self) -> SandboxClient {
        let client = SandboxClient::unix(self.dir().join("vsock.sock"));
        match &self.token {
            Some(token) => client.with_token(token),
            None => client,
        }
    }

    /// Runs a shell script in it.
    pub async fn sh(&self, script: &str) -> Completed {
        let client = self.client();
        let running = client.output("/bin/sh", ["-c", script]);
        tokio::time::timeout(DEADLINE, running).await.expect("the command ends").expect("the command runs")
    }

    /// Runs a shell script that must succeed, and gives what it printed.
    pub async fn stdout(&self, script: &str) -> String {
        let done = self.sh(script).await;
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.exit.code(), 0, "{script}: {stderr}");
        String::from_utf8(done.stdout).expect("text")
    }

    /// Asks the shim to stop and waits for its end; gives its status and what it said.
    pub async fn stop(self) -> (ExitStatus, String) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(self.shim(), rustix::process::Signal::TERM);
        self.ended().await
    }

    /// Waits for the shim's end; gives its status and what it said.
    pub async fn ended(self) -> (ExitStatus, String) {
        self.ended_keeping(|| {}).await
    }

    /// As [`TestSandbox::ended`]; `look` can look at the folder before it goes.
    pub async fn ended_keeping(mut self, look: impl FnOnce()) -> (ExitStatus, String) {
        let mut said = String::new();
        let mut stderr = self.shim.stderr.take().expect("its standard error is a pipe");
        let ending = async {
            stderr.read_to_string(&mut said).await.expect("its errors can be read");
            self.shim.wait().await.expect("the shim ends")
        };
        let status = tokio::time::timeout(DEADLINE, ending).await.expect("the shim ends");
        look();
        (status, said)
    }

    /// The processes of this machine that have the sandbox's folder on their command line.
    pub fn processes_of(dir: &Path) -> Vec<i32> {
        let needle = dir.as_os_str().as_encoded_bytes().to_vec();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc is there").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            if line.windows(needle.len()).any(|window| window == needle) {
                found.push(pid);
            }
        }
        found
    }
}
