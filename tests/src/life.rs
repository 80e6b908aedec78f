//! What the owner of a sandbox does with it beside using it: pause and resume, fork, snapshot, configure.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::owner::{self, Answer};
use crate::sandbox::Failed;
use crate::{TestSandbox, TestSandboxBuilder};

/// The exit code of a shim whose sandbox is paused.
const PAUSED: i32 = 3;

/// A sandbox of which nothing runs.
pub struct Paused {
    folder: tempfile::TempDir,
    data: PathBuf,
    token: Option<String>,
    taken: Value,
}

/// What a sandbox was at one moment, for others to go on from.
pub struct Forked {
    folder: tempfile::TempDir,
    data: PathBuf,
    taken: Value,
}

impl TestSandbox {
    /// Makes one of the owner's calls.
    pub async fn call(&self, request: &str, body: Value) -> Answer {
        owner::call(&self.dir().join("api.sock"), request, &body).await
    }

    /// Makes a parked one somebody's; gives its state.
    pub async fn configure(&mut self, request: Value) -> Value {
        let state = self.call("POST /configure", request.clone()).await.ok();
        self.token = request["access_token"].as_str().map(str::to_owned).or(self.token.take());
        state
    }

    /// Pauses it; returns when its shim has ended.
    pub async fn pause(self) -> Paused {
        let taken = self.call("POST /pause", Value::Null).await.ok();
        self.paused(taken).await
    }

    /// Waits for the end of a shim whose sandbox is being paused.
    async fn paused(mut self, taken: Value) -> Paused {
        let ending = tokio::time::timeout(crate::DEADLINE, self.shim.wait());
        let status = ending.await.expect("the shim ends").expect("the shim ends");
        assert_eq!(status.code(), Some(PAUSED), "{status}");
        Paused { folder: self.folder, data: self.data, token: self.token, taken }
    }

    /// Forks it: others can be started that go on from here.
    pub async fn fork(&self) -> Forked {
        let folder =
            tempfile::Builder::new().prefix("tiffin-fork-").tempdir().expect("a folder for the fork");
        let taken = self.call("POST /fork", json!({ "path": folder.path().join("fork") })).await.ok();
        Forked { folder, data: self.data.clone(), taken }
    }

    /// Makes a template of it at this path.
    pub async fn snapshot(&self, path: &Path) -> Value {
        self.call("POST /snapshot", json!({ "path": path })).await.ok()
    }
}

impl Paused {
    /// Its folder.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("dir")
    }

    /// What pausing it cost.
    pub fn taken(&self) -> &Value {
        &self.taken
    }

    /// Its state.
    pub fn state(&self) -> Value {
        let text = std::fs::read(self.dir().join("state.json")).expect("state.json is there");
        serde_json::from_slice(&text).expect("state.json is JSON")
    }

    /// The same sandbox in another folder, as `cp -a` makes it; the first one is gone.
    pub fn moved(self) -> Self {
        let folder = tempfile::Builder::new().prefix("tiffin-moved-").tempdir().expect("another folder");
        let copy = Command::new("cp").arg("-a").arg(self.dir()).arg(folder.path()).status();
        assert!(copy.expect("cp runs").success());
        Self { folder, ..self }
    }

    /// Lets it go on.
    pub async fn resume(self) -> TestSandbox {
        match self.try_resume(&[]).await {
            Ok(sandbox) => sandbox,
            Err((_, said)) => panic!("it was not resumed: {said}"),
        }
    }

    /// Lets it go on, with more arguments of `host-shim run`. One that cannot be resumed is still paused.
    pub async fn try_resume(self, more: &[&OsStr]) -> Result<TestSandbox, (Self, String)> {
        let mut arguments: Vec<OsString> = vec!["--resume".into()];
        arguments.extend(more.iter().map(|&more| more.to_owned()));
        TestSandbox::run(self.folder, self.data, self.token, arguments).await.map_err(|failed| {
            let Failed { folder, data, token, said } = failed;
            (Self { folder, data, token, taken: self.taken }, said)
        })
    }
}

impl Forked {
    /// What forking it cost.
    pub fn taken(&self) -> &Value {
        &self.taken
    }

    /// The snapshot.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("fork")
    }

    /// A sandbox that goes on from it. It can be started as often as wanted, as long as this is there.
    pub fn child(&self) -> TestSandboxBuilder {
        TestSandboxBuilder::from_spec(self.taken["spec"].clone(), self.data.clone())
    }
}
