//! `host-shim run`: one command in a sandbox of its own, or a sandbox for whoever dials its sockets.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use envd_proto::process::{ProcessConfig, Signal, StartRequest};
use sandbox_folder::client::{ClientError, Code, Exit, Output, Process, SandboxClient, Stdin};
use sandbox_folder::{End, Lifecycle, Phase, SandboxId, Start, State};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::api::{Call, Request, Stop};
use crate::dir::SandboxDir;
use crate::sandbox::{Aim, GuestEnd, Sandbox, Watch};
use crate::spec::CheckedSpec;

use crate::{Error, notify};

/// How long a process may take to end after SIGTERM, as in `docker stop`.
pub const GRACE: Duration = Duration::from_secs(10);

/// Bytes of standard input that go to the sandbox at once. Larger ones would only wait for the process's pipe (64 KiB).
const STDIN_CHUNK: usize = 64 << 10;

/// The user's wish to end: asked once, and then again.
#[derive(Clone, Debug)]
pub struct Interrupt {
    /// SIGINT, SIGTERM or SIGHUP came.
    pub first: CancellationToken,
    /// It came a second time.
    pub second: CancellationToken,
}

impl Interrupt {
    /// Listens for the signals from now on.
    pub fn listen() -> io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let this = Self { first: CancellationToken::new(), second: CancellationToken::new() };
        let tokens = this.clone();
        tokio::spawn(async move {
            for token in [tokens.first, tokens.second] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                token.cancel();
            }
        });
        Ok(this)
    }
}

/// How a command of `run TEMPLATE` ended.
#[derive(Debug, Serialize)]
pub struct CommandReport {
    /// The sandbox that it ran in.
    pub id: SandboxId,
    /// Its exit code, 128 + n for signal n.
    pub exit_code: u8,
    /// What runs the guest's instructions.
    pub accelerator: Option<String>,
    /// What carried its streams.
    pub channel: Option<String>,
    /// What took how long.
    pub phases: Vec<Phase>,
    /// Milliseconds from the beginning to the command's start.
    pub ready_ms: f64,
}

/// What ends with this process's standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdinEnd {
    /// That of the process in the sandbox.
    Process,
    /// The sandbox: its caller is gone.
    Sandbox,
}

/// Runs `argv` in a sandbox of its own, with this process's standard streams.
pub async fn command(
    dir: SandboxDir,
    spec: CheckedSpec,
    argv: Vec<String>,
    stdin_end: StdinEnd,
    cache: &Path,
    interrupt: &Interrupt,
    watch: &dyn Watch,
) -> Result<CommandReport, Error> {
    let mut sandbox = Sandbox::start(dir, spec, Aim::Run, cache, &interrupt.first, watch).await?;
    let ran = attach(&mut sandbox, argv, stdin_end, interrupt, watch).await;
    let (exit, ready_ms) = match ran {
        Ok(ran) => ran,
        Err(error) => {
            sandbox.finish(End::Failed { message: error.to_string() }).await?;
            return Err(error);
        }
    };
    let State { id, accelerator, channel, .. } = sandbox.state().clone();
    let phases = sandbox.timings().phases().to_vec();
    let exit_code = exit.code();
    // No power-off in order: its disk is thrown away, and nothing else of it remains.
    sandbox.finish(End::CommandExited { code: exit_code }).await?;
    Ok(CommandReport { id, exit_code, accelerator, channel, phases, ready_ms })
}

async fn attach(
    sandbox: &mut Sandbox,
    argv: Vec<String>,
    stdin_end: StdinEnd,
    interrupt: &Interrupt,
    watch: &dyn Watch,
) -> Result<(Exit, f64), Error> {
    watch.step("starting the command");
    let mut argv = argv.into_iter();
    let cmd = argv.next().unwrap_or_default();
    let process = ProcessConfig { cmd, args: argv.collect(), envs: HashMap::new(), cwd: None };
    let request = StartRequest { process: Some(process), stdin: Some(true), ..StartRequest::default() };
    let client = sandbox.client();
    let started = tokio::select! {
        started = client.start(request) => started,
        end = sandbox.ended() => return Err(ended_early(end)),
        () = interrupt.first.cancelled() => return Err(Error::Interrupted),
    };
    let process = started?;
    sandbox.timings().end("exec");
    let ready_ms = sandbox.timings().total_ms();
    watch.step("");

    let _stdin =
        AbortOnDropHandle::new(tokio::spawn(forward_stdin(process.stdin(), stdin_end, interrupt.clone())));
    let pid = process.pid();
    let exit = tokio::select! {
        // Its output and end may have arrived together with the machine's end.
        biased;
        exit = forward_output(process) => match exit {
            Ok(exit) => exit,
            Err(Error::Client(error)) if error.code().is_none() => {
                // The stream broke: with the machine, most likely.
                return match tokio::time::timeout(Duration::from_secs(3), sandbox.ended()).await {
                    Ok(end) => Err(ended_early(end)),
                    Err(_) => Err(error.into()),
                };
            }
            Err(error) => return Err(error),
        },
        exit = stop_on(interrupt, client, pid) => exit,
        end = sandbox.ended() => return Err(ended_early(end)),
    };
    Ok((exit, ready_ms))
}

/// Writes what the process prints to this process's own streams, until its end.
async fn forward_output(mut process: Process) -> Result<Exit, Error> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        // Flushed each time: an interactive process waits for an answer to what it printed.
        let written = match process.next().await? {
            Output::Stdout(bytes) | Output::Pty(bytes) => {
                stdout.write_all(&bytes).await.and(stdout.flush().await).map_err(Error::io("write", "stdout"))
            }
            Output::Stderr(bytes) => {
                stderr.write_all(&bytes).await.and(stderr.flush().await).map_err(Error::io("write", "stderr"))
            }
            Output::Ended(exit) => return Ok(exit),
        };
        match written {
            // Nobody reads any more (`| head`): what SIGPIPE means for a program of this machine.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(Exit::Signal(13));
            }
            other => other?,
        }
    }
}

/// Gives this process's input to the sandbox's, until its end; a process that does not read holds it back.
async fn forward_stdin(mut process: Stdin, end: StdinEnd, interrupt: Interrupt) {
    let mut stdin = tokio::io::stdin();
    // Where its end is the sandbox's, it is read to that, also when the process takes no more.
    let mut taken = true;
    loop {
        let mut chunk = BytesMut::with_capacity(STDIN_CHUNK);
        match stdin.read_buf(&mut chunk).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
        if taken && let Err(error) = process.write(chunk.freeze()).await {
            // It has closed its input or has ended; the end is told elsewhere.
            tracing::debug!(%error, "the process takes no more input");
            if end == StdinEnd::Process {
                return;
            }
            taken = false;
        }
    }
    if end == StdinEnd::Sandbox {
        // Nobody waits for a process that takes its time.
        interrupt.first.cancel();
        interrupt.second.cancel();
    } else if let Err(error) = process.close().await {
        tracing::debug!(%error, "the process's input was not closed");
    }
}

/// The first signal asks the process to end, the second or the end of the grace ends the sandbox.
async fn stop_on(interrupt: &Interrupt, client: SandboxClient, pid: u32) -> Exit {
    const KILLED: Exit = Exit::Signal(9);
    interrupt.first.cancelled().await;
    let ask = async {
        if let Err(error) = client.send_signal(pid, Signal::Sigterm).await {
            tracing::warn!(%error, "the process did not get SIGTERM");
        }
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        () = ask => KILLED,
        () = interrupt.second.cancelled() => KILLED,
    }
}

fn ended_early(end: GuestEnd) -> Error {
    let reason = match end {
        GuestEnd::PoweredOff => "the guest powered off while the command ran".to_owned(),
        GuestEnd::Crashed(message) => format!("the sandbox ended while the command ran: {message}"),
    };
    Error::Ended { reason }
}

/// The exit code of `run TEMPLATE` for an error: 127 not found, 126 not executable, 125 everything of the shim's own.
pub fn exit_code(error: &Error) -> u8 {
    let Error::Client(ClientError::Call { code, message }) = error else { return 125 };
    // The contract answers a failed exec with one code for every cause (invalid_argument): the system's words differ.
    let says = |needle: &str| message.to_ascii_lowercase().contains(needle);
    match code {
        Code::NotFound => 127,
        Code::PermissionDenied => 126,
        _ if says("not found") || says("no such file") => 127,
        _ if says("permission denied") || says("exec format error") || says("is a directory") => 126,
        _ => 125,
    }
}

/// What a sandbox says on stdout once it is ready.
#[derive(Serialize)]
struct Ready<'a> {
    ready: bool,
    dir: &'a Path,
    total_ms: f64,
    #[serde(flatten)]
    state: &'a State,
}

/// How a sandbox ended that was run for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// By itself, or because it was asked to.
    Ended(GuestEnd),
    /// It is paused: its folder says how it goes on.
    Paused,
    /// Its end was asked for before it was ready.
    Withdrawn,
}

/// Runs a sandbox until it ends, or until its end is asked for.
pub async fn serve(
    dir: SandboxDir,
    spec: CheckedSpec,
    aim: Aim,
    cache: &Path,
    interrupt: &Interrupt,
    watch: &dyn Watch,
) -> Result<Served, Error> {
    let (path, snapshot) = (dir.path().to_owned(), dir.snapshot());
    let mut sandbox = match Sandbox::start(dir, spec, aim, cache, &interrupt.first, watch).await {
        Ok(sandbox) => sandbox,
        Err(Error::Interrupted) => {
            watch.step("");
            notify::stopping("stopped before it was ready");
            // One that was to be resumed is as it was.
            return Ok(if snapshot.exists() { Served::Paused } else { Served::Withdrawn });
        }
        Err(error) => return Err(error),
    };
    watch.step("");
    tell_ready(&path, &mut sandbox);
    let mut stop = sandbox.stop_requested();
    let Some(mut calls) = sandbox.take_calls() else { return Err(Error::Interrupted) };
    let mut end_of_life = end_of_life(&sandbox);
    let end = loop {
        tokio::select! {
            end = sandbox.ended() => break Ok(end),
            () = interrupt.first.cancelled() => break Err(GRACE),
            grace = asked(&mut stop, |_| true) => break Err(grace),
            () = at(end_of_life) => {
                tracing::info!("the sandbox's time is over");
                break Err(GRACE);
            }
            Some(call) = calls.recv() => {
                let give_up = async {
                    tokio::select! {
                        () = interrupt.first.cancelled() => {}
                        _ = asked(&mut stop, |_| true) => {}
                    }
                };
                let work = carry_out(&mut sandbox, call, give_up, &mut end_of_life, watch);
                if notify::patiently(work, &interrupt.first).await {
                    notify::stopping("paused");
                    // Who is still waiting gets to know that it is too late.
                    drop(calls);
                    sandbox.finish_paused().await?;
                    return Ok(Served::Paused);
                }
            }
        }
    };
    drop(calls);
    notify::stopping(if end.is_ok() { "the guest has ended" } else { "stopping" });
    match end {
        Err(Duration::ZERO) => {
            sandbox.finish(End::Stopped).await?;
            Ok(Served::Ended(GuestEnd::PoweredOff))
        }
        Err(grace) => {
            let second = interrupt.second.clone();
            let hurry = async move {
                tokio::select! {
                    () = second.cancelled() => {}
                    _ = asked(&mut stop, |grace| grace.is_zero()) => {}
                }
            };
            sandbox.stop(grace, hurry).await?;
            Ok(Served::Ended(GuestEnd::PoweredOff))
        }
        Ok(end) => {
            let message = match &end {
                GuestEnd::PoweredOff => "the guest powered off".to_owned(),
                GuestEnd::Crashed(message) => message.clone(),
            };
            sandbox.finish(End::GuestEnded { message }).await?;
            Ok(Served::Ended(end))
        }
    }
}

/// Carries out one of the owner's calls. Whether the sandbox is paused by it. A snapshot that was begun is finished, whoever
/// gives up; the start of a tenant's programs, which can take minutes, is not.
async fn carry_out(
    sandbox: &mut Sandbox,
    call: Call,
    give_up: impl Future<Output = ()>,
    end_of_life: &mut Option<Instant>,
    watch: &dyn Watch,
) -> bool {
    let mut paused = false;
    let done = match call.request {
        Request::Configure(request) => {
            let done = tokio::select! {
                done = sandbox.configure(*request, watch) => done,
                () = give_up => Err(Error::Interrupted),
            };
            watch.step("");
            *end_of_life = self::end_of_life(sandbox);
            notify::status(&status(sandbox));
            done.map(|()| serde_json::to_value(sandbox.state()))
        }
        Request::Pause => {
            let done = sandbox.pause().await;
            paused = done.is_ok();
            done.map(serde_json::to_value)
        }
        Request::Snapshot(path) => sandbox.snapshot(&path).await.map(serde_json::to_value),
        Request::Network(change) => sandbox.network(change).await.map(serde_json::to_value),
        Request::Fork(path) => sandbox.fork(&path).await.map(serde_json::to_value),
    };
    let answer = done.and_then(|value| value.map_err(|error| Error::io("write", "an answer")(error.into())));
    if let Err(error) = &answer {
        tracing::warn!(%error, "a call of the owner failed");
    }
    // A caller that went away gets to know it from the state.
    let _ = call.reply.send(answer);
    paused
}

/// When the time of a sandbox is over that is somebody's.
fn end_of_life(sandbox: &Sandbox) -> Option<Instant> {
    if sandbox.state().phase != Lifecycle::Running {
        return None;
    }
    Instant::now().checked_add(sandbox.timeout()?)
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn tell_ready(path: &Path, sandbox: &mut Sandbox) {
    let total_ms = sandbox.timings().total_ms();
    let line = serde_json::to_string(&Ready { ready: true, dir: path, total_ms, state: sandbox.state() });
    let told = line.map_err(io::Error::from).and_then(|line| {
        use std::io::Write;
        let mut out = io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush())
    });
    if let Err(error) = told {
        // A caller that closed our stdout did not want to know; state.json says the same.
        tracing::warn!(%error, "cannot tell readiness on stdout");
    }
    notify::ready(&status(sandbox));
}

/// What a sandbox that is there is, in a line.
fn status(sandbox: &Sandbox) -> String {
    let State { id, phase, accelerator, start, .. } = sandbox.state();
    let start = start.map_or("", Start::name);
    let accelerator = accelerator.as_deref().unwrap_or_default();
    format!("{id} is {}, {start} on {accelerator}", format!("{phase:?}").to_lowercase())
}

/// Waits until `api.sock` was asked for an end with a grace that `fits`.
async fn asked(stop: &mut watch::Receiver<Stop>, fits: impl Fn(Duration) -> bool) -> Duration {
    // The sandbox, which is borrowed or has ended by then, has the other end.
    match stop.wait_for(|asked| asked.is_some_and(&fits)).await.map(|asked| *asked) {
        Ok(Some(grace)) => grace,
        _ => std::future::pending().await,
    }
}

/// Shows steps as a spinner on a terminal and nowhere else: stderr belongs to the command.
#[derive(Debug)]
pub struct TerminalWatch {
    spinner: indicatif::ProgressBar,
    quiet: bool,
}

impl TerminalWatch {
    /// `quiet` hides notices too.
    pub fn new(quiet: bool) -> Self {
        let spinner = if io::stderr().is_terminal() && !quiet {
            let spinner = indicatif::ProgressBar::new_spinner();
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        } else {
            indicatif::ProgressBar::hidden()
        };
        Self { spinner, quiet }
    }
}

impl Watch for TerminalWatch {
    fn step(&self, what: &str) {
        if what.is_empty() {
            self.spinner.finish_and_clear();
        } else {
            self.spinner.set_message(what.to_owned());
        }
    }

    fn notice(&self, what: &str) {
        if !self.quiet {
            self.spinner.suspend(|| eprintln!("host-shim: note: {what}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_docker() {
        let call = |code, message: &str| Error::Client(ClientError::Call { code, message: message.into() });
        for (error, code) in [
            (call(Code::NotFound, ""), 127),
            (call(Code::InvalidArgument, "exec /x: No such file or directory"), 127),
            (call(Code::InvalidArgument, "exec: \"x\": executable file not found in $PATH"), 127),
            (call(Code::InvalidArgument, "exec /x: Permission denied"), 126),
            (call(Code::InvalidArgument, "exec /x: Exec format error"), 126),
            (call(Code::Internal, "out of memory"), 125),
            (Error::Interrupted, 125),
        ] {
            assert_eq!(exit_code(&error), code, "{error}");
        }
    }
}
