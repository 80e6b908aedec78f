//! A process or terminal: started, read, told about, ended.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envd_proto::process::{OutputPolicy, ProcessConfig, Pty, Scope, Signal, StartOptions, StartRequest, pty};
use sandbox_folder::client::{ClientError, Exit, Output, Process, SandboxClient};
use serde_json::json;
use tokio::sync::oneshot;

use super::call::{Key, Kind, Start, Topic};
use super::rpc::RpcError;
use super::session::{Live, Run, Session};
use super::text::{Characters, Lines};

/// What commands are given to.
const SHELL: &str = "/bin/bash";

/// Starts it; returns once it runs. One of that name that runs already is taken for it.
pub(super) async fn start(session: &Arc<Session>, start: Start) -> Result<(), RpcError> {
    let Some(run) = session.begin(&start.key)? else { return Ok(()) };
    let (started, outcome) = oneshot::channel();
    // A task of its own: the connection may end at any moment, and the process must be known to somebody then.
    tokio::spawn(Ending(Arc::clone(session), start.key.clone()).of(run, start, started));
    outcome.await.unwrap_or_else(|_| Err(RpcError::failed("the process was not started")))
}

/// Frees the name at the end, also at a sudden one.
struct Ending(Arc<Session>, Key);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end(&self.1);
    }
}

impl Ending {
    async fn of(self, run: Arc<Run>, start: Start, started: oneshot::Sender<Result<(), RpcError>>) {
        let (session, key) = (Arc::clone(&self.0), self.1.clone());
        let opened = async {
            let client = session.client().await?;
            Ok((client, client.start(request(&start)).await?))
        };
        let (client, process) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                drop(self);
                let _ = started.send(Err(refusal(&key, &error)));
                return;
            }
        };
        let input = tokio::sync::Mutex::new(match key.kind {
            Kind::Process => process.stdin(),
            Kind::Terminal => process.terminal(),
        });
        // Nobody else sets it.
        let _ = run.live.set(Live { pid: process.pid(), input });
        let _ = started.send(Ok(()));
        let exit = follow(&session, client, &key, &run, process).await;
        // Free before it is told: whoever hears of the end may start another one.
        drop(self);
        match key.kind {
            Kind::Process => session.tell(&key, Topic::Exit, &exit).await,
            Kind::Terminal => session.tell(&key, Topic::Exit, &json!({})).await,
        }
    }
}

/// Tells what it prints until its end; gives the exit code, -1 after a signal.
async fn follow(
    session: &Session,
    client: &SandboxClient,
    key: &Key,
    run: &Run,
    mut process: Process,
) -> i32 {
    let lines = || Lines::new(Arc::clone(&session.unfinished));
    let (mut stdout, mut stderr, mut shown) = (lines(), lines(), Characters::default());
    let exit = loop {
        let output = tokio::select! {
            output = process.next() => output,
            () = run.abandoned.notified() => {
                if let Err(error) = kill(client, process.pid()).await {
                    tracing::debug!(%error, "cannot kill a process without subscribers");
                }
                continue;
            }
        };
        match output {
            Ok(Output::Stdout(bytes)) => tell_lines(session, key, Topic::Stdout, stdout.push(&bytes)).await,
            Ok(Output::Stderr(bytes)) => tell_lines(session, key, Topic::Stderr, stderr.push(&bytes)).await,
            Ok(Output::Pty(bytes)) => tell_text(session, key, shown.push(&bytes)).await,
            Ok(Output::Ended(Exit::Code(code))) => break i32::from(code),
            Ok(Output::Ended(Exit::Signal(_))) => break -1,
            Err(error) => {
                tracing::debug!(%error, "lost a process");
                break -1;
            }
        }
    };
    tell_lines(session, key, Topic::Stdout, stdout.finish()).await;
    tell_lines(session, key, Topic::Stderr, stderr.finish()).await;
    tell_text(session, key, shown.finish()).await;
    exit
}

async fn tell_lines(session: &Session, key: &Key, topic: Topic, lines: impl IntoIterator<Item = String>) {
    let kind = if topic == Topic::Stdout { "Stdout" } else { "Stderr" };
    for line in lines {
        let said = json!({ "type": kind, "line": line, "timestamp": timestamp() });
        session.tell(key, topic, &said).await;
    }
}

async fn tell_text(session: &Session, key: &Key, text: String) {
    if !text.is_empty() {
        session.tell(key, Topic::Data, &text).await;
    }
}

/// Kills a process and what it started.
pub(super) async fn kill(client: &SandboxClient, pid: u32) -> Result<(), ClientError> {
    client.send_signal_to(pid, Signal::Sigkill, Scope::Tree).await
}

/// Nanoseconds since 1970; they fit until the year 2554.
pub(super) fn timestamp() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn request(start: &Start) -> StartRequest {
    let mut env = start.env.clone();
    let mut args = Vec::from(["-l"].map(str::to_owned));
    let mut pty = None;
    if start.key.kind == Kind::Terminal {
        args.insert(0, "-i".to_owned());
        env.entry("TERM".to_owned()).or_insert_with(|| "xterm".to_owned());
        let (cols, rows) = start.size;
        pty = Some(Pty { size: Some(pty::Size { cols, rows }) });
    }
    if let Some(command) = &start.command {
        args.extend(["-c".to_owned(), command.clone()]);
    }
    let cwd = if start.cwd.is_empty() { "~" } else { &start.cwd };
    StartRequest {
        process: Some(ProcessConfig {
            cmd: SHELL.to_owned(),
            args,
            envs: env.into_iter().collect(),
            cwd: Some(cwd.to_owned()),
        }),
        pty,
        stdin: Some(true),
        // The protocol cannot tell what was lost, so nothing may be: a slow client slows the process.
        options: Some(StartOptions { output_policy: OutputPolicy::Block.into(), ..Default::default() }),
        ..Default::default()
    }
}

/// The client knows a missing directory by the old server's words.
fn refusal(key: &Key, error: &ClientError) -> RpcError {
    let reason = match error {
        ClientError::Call { message, .. } if message.starts_with("cwd '") => {
            format!("fork/exec {SHELL}: no such file or directory")
        }
        error => error.to_string(),
    };
    RpcError::failed(format!("error starting {} '{}': {reason}", key.kind.namespace(), key.id))
}

#[cfg(test)]
mod tests {
    use sandbox_folder::client::Code;

    use super::*;

    #[test]
    fn a_missing_directory_is_told_in_the_words_that_the_client_knows() {
        let key = Key { kind: Kind::Process, id: "aB3".into() };
        let error =
            |message: &str| ClientError::Call { code: Code::InvalidArgument, message: message.into() };
        assert_eq!(
            refusal(&key, &error("cwd '/nope' does not exist")).message,
            "error starting process 'aB3': fork/exec /bin/bash: no such file or directory"
        );
        assert_eq!(
            refusal(&key, &error("no")).message,
            "error starting process 'aB3': no (invalid_argument)"
        );
    }
}
