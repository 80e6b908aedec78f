//! A shim of its own session, started and waited for until it says that its sandbox is ready.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sandbox_folder::SPEC;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use super::error::Error;

/// Where the shim's errors go.
pub(crate) const SHIM_STDERR: &str = "shim.stderr";

/// The longest line of readiness; it has some dozens of phases and the caller's labels.
const MAX_READY_LINE: u64 = 1 << 20;

/// How much of a failed shim's words is read; the console's end is in them.
const MAX_WORDS: u64 = 16 << 10;

/// How long a shim may take to end in order: it kills its VMM and cleans up.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// What a shim is to do with its folder.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    /// Run what its spec says.
    Run,
    /// Go on with what was paused.
    Resume,
}

/// A shim that has not said yet that it is ready.
pub(crate) struct Launch {
    child: Child,
    stdout: BufReader<tokio::io::Take<ChildStdout>>,
    dir: PathBuf,
}

impl Launch {
    pub(crate) fn start(dir: &Path, data: &Path, how: How) -> Result<Self, Error> {
        let program = std::env::current_exe().map_err(Error::io("find", "host-shim"))?;
        let words = dir.join(SHIM_STDERR);
        let stderr = std::fs::File::create(&words).map_err(Error::io("make", &words))?;
        let mut command = Command::new(&program);
        command.args(["run", "--new-session", "--quiet"]);
        match how {
            How::Run => command.arg("--spec").arg(dir.join(SPEC)),
            How::Resume => command.arg("--resume"),
        };
        command.arg("--dir").arg(dir).arg("--data-dir").arg(data);
        // It outlives us: nothing of it may depend on our streams, our folder or our service manager.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        command.current_dir("/").env_remove("NOTIFY_SOCKET");
        let mut child = command.spawn().map_err(Error::io("start", &program))?;
        let Some(stdout) = child.stdout.take() else {
            return Err(Error::io("read from", &program)(std::io::ErrorKind::BrokenPipe.into()));
        };
        Ok(Self { child, stdout: BufReader::new(stdout.take(MAX_READY_LINE)), dir: dir.to_owned() })
    }

    /// Waits for its readiness: the line that it says then.
    pub(crate) async fn ready(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line).await;
        read.map_err(Error::io("read from", "host-shim"))?;
        if line.is_empty() {
            // It closed its output, so it is about to end.
            let status = self.child.wait().await.map_err(Error::io("wait for", "host-shim"))?;
            let words = self.words().await;
            let fallback = || format!("host-shim ended without a word ({status})");
            return Err(Error::Start(if words.is_empty() { fallback() } else { words }));
        }
        serde_json::from_str(&line)
            .map_err(|error| Error::Start(format!("expected a line of JSON from host-shim: {error}")))
    }

    /// Ends it; nothing of it is left afterwards.
    pub(crate) async fn end(mut self) {
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
            if tokio::time::timeout(END_DEADLINE, self.child.wait()).await.is_err() {
                // Its VMM dies with it.
                let _ = self.child.kill().await;
            }
        }
    }

    async fn words(&self) -> String {
        let mut words = Vec::new();
        if let Ok(file) = tokio::fs::File::open(self.dir.join(SHIM_STDERR)).await {
            // What could be read is better than nothing.
            let _ = file.take(MAX_WORDS).read_to_end(&mut words).await;
        }
        let words = super::sandboxes::plain(&String::from_utf8_lossy(&words));
        words.trim().trim_start_matches("host-shim: ").to_owned()
    }
}
