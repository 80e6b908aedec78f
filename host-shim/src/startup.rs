//! A template's own commands: before anybody gets a sandbox, its start command runs and its ready command has succeeded.
//!
//! Both are the tenant's: bounded in time, and in what is kept of their words.

use std::time::Duration;

use bytes::Bytes;
use envd_proto::process::{OutputPolicy, ProcessConfig, StartOptions, StartRequest};
use sandbox_folder::client::{ClientError, Exit, Output, Process, SandboxClient};
use template::RuntimeConfig;

/// What commands are given to: the shell of the SDKs' own commands.
const SHELL: &str = "/bin/bash";

/// By which clients find the process of the start command.
const TAG: &str = "start";

/// Until the ready command must have succeeded. A server that takes long on emulation fits in.
const DEADLINE: Duration = Duration::from_secs(300);

/// Between two tries of the ready command.
const INTERVAL: Duration = Duration::from_millis(200);

/// How much of a command's last words an error tells.
const MAX_WORDS: usize = 2 << 10;

/// A template's commands did not make its sandbox ready.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// A command could not be run.
    #[error("cannot run the template's {which} command: {source}")]
    Call {
        /// `start` or `ready`.
        which: &'static str,
        /// The agent's refusal, or a lost connection.
        source: ClientError,
    },
    /// The start command failed before the sandbox was ready.
    #[error("the template's start command ended with {}: {words}", code.code())]
    Ended {
        /// How it ended.
        code: Exit,
        /// The end of what it printed.
        words: String,
    },
    /// The ready command did not succeed in time, or the agent does not answer.
    #[error("the template's commands did not make the sandbox ready within {} s: {words}", DEADLINE.as_secs())]
    Late {
        /// The end of what the last try of the ready command printed.
        words: String,
    },
}

fn call(which: &'static str) -> impl FnOnce(ClientError) -> StartupError {
    move |source| StartupError::Call { which, source }
}

/// Runs the commands; returns when the sandbox is ready. A template without commands is ready at once, one without a ready
/// command when its start command was started.
pub async fn run(client: &SandboxClient, runtime: &RuntimeConfig) -> Result<(), StartupError> {
    let mut words = Words::default();
    tokio::select! {
        done = start_and_wait(client, runtime, &mut words) => return done,
        () = tokio::time::sleep(DEADLINE) => {}
    }
    Err(StartupError::Late { words: words.told() })
}

async fn start_and_wait(
    client: &SandboxClient,
    runtime: &RuntimeConfig,
    words: &mut Words,
) -> Result<(), StartupError> {
    let start = match &runtime.start_command {
        Some(command) => Some(client.start(request(command, Some(TAG))).await.map_err(call("start"))?),
        None => None,
    };
    let Some(command) = &runtime.ready_command else { return Ok(()) };
    tokio::select! {
        ready = until_ready(client, command, words) => ready,
        failed = failure(start) => Err(failed),
    }
}

/// Returns when the start command has failed. One that succeeds has left something running, or had nothing to run.
async fn failure(start: Option<Process>) -> StartupError {
    let mut words = Words::default();
    match start {
        Some(process) => match follow(process, &mut words).await {
            Ok(Exit::Code(0)) => std::future::pending().await,
            Ok(code) => StartupError::Ended { code, words: words.told() },
            Err(source) => StartupError::Call { which: "start", source },
        },
        None => std::future::pending().await,
    }
}

async fn until_ready(client: &SandboxClient, command: &str, words: &mut Words) -> Result<(), StartupError> {
    loop {
        let process = client.start(request(command, None)).await.map_err(call("ready"))?;
        words.0.clear();
        if follow(process, words).await.map_err(call("ready"))? == Exit::Code(0) {
            return Ok(());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn follow(mut process: Process, words: &mut Words) -> Result<Exit, ClientError> {
    loop {
        match process.next().await? {
            Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => words.push(&bytes),
            Output::Ended(exit) => return Ok(exit),
        }
    }
}

fn request(command: &str, tag: Option<&str>) -> StartRequest {
    StartRequest {
        process: Some(ProcessConfig {
            cmd: SHELL.to_owned(),
            args: ["-l", "-c", command].map(str::to_owned).into(),
            ..Default::default()
        }),
        tag: tag.map(str::to_owned),
        stdin: Some(false),
        // Once the sandbox is ready nobody reads its words, and it must not wait for a reader.
        options: Some(StartOptions { output_policy: OutputPolicy::Drop.into(), ..Default::default() }),
        ..Default::default()
    }
}

/// The end of what a command printed.
#[derive(Debug, Default)]
struct Words(Vec<u8>);

impl Words {
    fn push(&mut self, bytes: &Bytes) {
        self.0.extend_from_slice(&bytes[bytes.len().saturating_sub(MAX_WORDS)..]);
        self.0.drain(..self.0.len().saturating_sub(MAX_WORDS));
    }

    fn told(&self) -> String {
        match String::from_utf8_lossy(&self.0).trim() {
            "" => "it printed nothing".to_owned(),
            words => words.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_that_never_is_ready_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let silent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            std::future::pending::<()>().await;
        };
        let client = SandboxClient::unix(socket);
        let commands = RuntimeConfig { start_command: Some("x".into()), ..Default::default() };
        tokio::select! {
            done = run(&client, &commands) => assert!(matches!(done, Err(StartupError::Late { .. })), "{done:?}"),
            () = silent => {}
        }
    }

    #[test]
    fn the_last_words_are_kept() {
        let mut words = Words::default();
        assert_eq!(words.told(), "it printed nothing");
        words.push(&Bytes::from(vec![b'a'; 3 * MAX_WORDS]));
        words.push(&Bytes::from_static(b"the end\n"));
        assert_eq!(words.0.len(), MAX_WORDS);
        assert!(words.told().ends_with("aathe end"));
    }
}
