//! A process in a sandbox with this process's streams, or its terminal.
//!
//! ```text
//! stdin ──► Detector (-t) ──► SendInput        CloseStdin at the end, without -t
//! stdout, stderr ◄── events of the process     their end is the end of all
//! signals ──► SendSignal (without -t), Update (SIGWINCH with -t)
//! ```

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use envd_proto::process::{Scope, Signal};
use rustix::process::{Signal as HostSignal, getpid, kill_process};
use sandbox_folder::client::{Exit, Output, Process, SandboxClient, Stdin};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::detach::{Detector, Keys};
use super::error::Error;
use super::terminal::{self, Raw};

/// Bytes of standard input that go to the sandbox at once: what a pipe holds.
const STDIN_CHUNK: usize = 64 << 10;

/// Signals that wait for their way into the sandbox.
const MAX_SIGNALS: usize = 64;

/// How often someone has to ask an `exec` to end whose sandbox does not answer.
const PATIENCE: u32 = 3;

/// Streams of one process that break one after the other, with nothing on them: a sandbox that plays a game.
const MAX_BROKEN: u32 = 3;

/// How long a process whose reader is gone may take to hear of it.
const TELL_DEADLINE: Duration = Duration::from_secs(3);

/// What of this process goes to the one in the sandbox.
#[derive(Debug)]
pub(crate) enum Input {
    Nothing,
    Stdin,
    Terminal(Keys),
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Exited(Exit),
    /// The user left it; the process goes on.
    Detached,
    /// A signal ended this side of it.
    Killed(u8),
}

impl End {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Exited(exit) => exit.code(),
            Self::Detached => 0,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// Carries everything until the process ends, or the user leaves.
pub(crate) async fn run(
    client: &SandboxClient,
    process: Process,
    tty: bool,
    input: Input,
) -> Result<End, Error> {
    let pid = process.pid();
    let (left, mut leaving) = mpsc::channel(1);
    let mut raw = None;
    let _typing = match input {
        Input::Nothing => None,
        Input::Stdin => Some(AbortOnDropHandle::new(tokio::spawn(forward(process.stdin(), None, left)))),
        Input::Terminal(keys) => {
            raw = Some(Raw::enter().map_err(Error::io("set the mode of", "the terminal"))?);
            let typed = forward(process.terminal(), Some(Detector::new(keys)), left);
            Some(AbortOnDropHandle::new(tokio::spawn(typed)))
        }
    };
    let end = tokio::select! {
        // Its output and end may have arrived together with the rest.
        biased;
        end = print(client, process) => end,
        Some(()) = leaving.recv() => Ok(End::Detached),
        killed = signals(client, pid, tty, &mut raw) => killed.map(End::Killed),
    };
    drop(raw);
    end
}

/// Writes what the process prints to this process's own streams, until its end.
async fn print(client: &SandboxClient, mut process: Process) -> Result<End, Error> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut broken = 0;
    loop {
        let next = match process.next().await {
            Ok(next) => next,
            // A snapshot of the sandbox may have cut it, and the process goes on.
            Err(error) if error.code().is_none() && broken < MAX_BROKEN => {
                broken += 1;
                match process.reattach().await {
                    Ok(()) => continue,
                    Err(_) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        };
        broken = 0;
        let dropped = process.take_dropped();
        if dropped > 0 {
            eprintln!(
                "host-shim: note: {dropped} bytes of output are missing here: this reader was too slow"
            );
        }
        // Flushed each time: an interactive process waits for an answer to what it printed.
        let written = match next {
            Output::Stdout(bytes) | Output::Pty(bytes) => {
                stdout.write_all(&bytes).await.and(stdout.flush().await).map_err(Error::io("write", "stdout"))
            }
            Output::Stderr(bytes) => {
                stderr.write_all(&bytes).await.and(stderr.flush().await).map_err(Error::io("write", "stderr"))
            }
            Output::Ended(exit) => return Ok(End::Exited(exit)),
        };
        match written {
            // Nobody reads any more (`| head`): what that means for a program of this machine, there too.
            Err(error) if error.is_broken_pipe() => {
                let telling = client.send_signal(process.pid(), Signal::Sigpipe);
                let _ = tokio::time::timeout(TELL_DEADLINE, telling).await;
                return Ok(End::Exited(Exit::Signal(13)));
            }
            other => other?,
        }
    }
}

/// Gives this process's input to the sandbox's, until its end; a process that does not read holds it back.
async fn forward(mut process: Stdin, mut detector: Option<Detector>, left: mpsc::Sender<()>) {
    let mut stdin = tokio::io::stdin();
    loop {
        let mut chunk = BytesMut::with_capacity(STDIN_CHUNK);
        match stdin.read_buf(&mut chunk).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
        let (bytes, leave) = match &mut detector {
            Some(detector) => {
                let (typed, leave) = detector.feed(&chunk);
                (Bytes::from(typed), leave)
            }
            None => (chunk.freeze(), false),
        };
        // It may have closed its input, or ended; the end is told elsewhere. A terminal can still be left.
        let taken = bytes.is_empty() || process.write(bytes).await.is_ok();
        if leave {
            let _ = left.send(()).await;
            return;
        }
        if !taken && detector.is_none() {
            return;
        }
    }
    // A terminal has no end of input: its process sees one in the keys (Ctrl-D).
    if detector.is_none() {
        let _ = process.close().await;
    }
}

/// A signal of this process, and what it means for the one in the sandbox.
#[derive(Clone, Copy, Debug)]
struct Forwarded {
    /// Here.
    number: u8,
    /// There. A process that has no terminal does not stop for SIGTSTP.
    signal: Signal,
    /// What a terminal sends goes to all that a terminal would reach.
    scope: Scope,
    /// Whether somebody wants an end.
    ends: bool,
}

const FORWARDED: [Forwarded; 8] = [
    Forwarded { number: 1, signal: Signal::Sighup, scope: Scope::Group, ends: true },
    Forwarded { number: 2, signal: Signal::Sigint, scope: Scope::Group, ends: true },
    Forwarded { number: 3, signal: Signal::Sigquit, scope: Scope::Group, ends: true },
    Forwarded { number: 10, signal: Signal::Sigusr1, scope: Scope::Process, ends: false },
    Forwarded { number: 12, signal: Signal::Sigusr2, scope: Scope::Process, ends: false },
    Forwarded { number: 15, signal: Signal::Sigterm, scope: Scope::Process, ends: true },
    Forwarded { number: 18, signal: Signal::Sigcont, scope: Scope::Group, ends: false },
    Forwarded { number: 20, signal: Signal::Sigstop, scope: Scope::Group, ends: false },
];

const SIGWINCH: u8 = 28;
const SIGTSTP: u8 = 20;
const SIGCONT: u8 = 18;

/// Forwards signals; returns only with the number of one that ends this side.
async fn signals(client: &SandboxClient, pid: u32, tty: bool, raw: &mut Option<Raw>) -> Result<u8, Error> {
    let (sender, mut coming) = mpsc::channel(MAX_SIGNALS);
    let mut listeners = tokio::task::JoinSet::new();
    for number in FORWARDED.iter().map(|forwarded| forwarded.number).chain([SIGWINCH]) {
        let listening = signal(SignalKind::from_raw(number.into()));
        let mut listening = listening.map_err(Error::io("listen for", "signals"))?;
        let sender = sender.clone();
        listeners.spawn(async move {
            while listening.recv().await.is_some() && sender.send(number).await.is_ok() {}
        });
    }
    let was_raw = raw.is_some();
    let mut sending = tokio::task::JoinSet::new();
    let mut asked = 0;
    loop {
        let number = tokio::select! {
            Some(number) = coming.recv() => number,
            // Whoever was asked in vain so far was asked.
            Some(_) = sending.join_next() => {
                asked = 0;
                continue;
            }
        };
        match number {
            SIGWINCH if tty => resize(client, pid).await,
            SIGWINCH => {}
            SIGTSTP if tty => {
                // The terminal is the shell's for a while.
                *raw = None;
                stop_here()?;
            }
            SIGCONT if tty => {
                if was_raw && raw.is_none() {
                    *raw = Some(Raw::enter().map_err(Error::io("set the mode of", "the terminal"))?);
                }
                resize(client, pid).await;
            }
            ending if tty => return Ok(ending),
            number => {
                let Some(forwarded) = FORWARDED.iter().find(|forwarded| forwarded.number == number).copied()
                else {
                    continue;
                };
                if number == SIGTSTP {
                    // Told first: once this process stops nothing is told.
                    let _ = client.send_signal_to(pid, forwarded.signal, forwarded.scope).await;
                    stop_here()?;
                    continue;
                }
                if forwarded.ends {
                    asked += 1;
                    if asked >= PATIENCE {
                        return Ok(number);
                    }
                }
                let client = client.clone();
                sending.spawn(async move {
                    // A process that has ended meanwhile needs none; its end is told elsewhere.
                    let _ = client.send_signal_to(pid, forwarded.signal, forwarded.scope).await;
                });
            }
        }
    }
}

/// Stops this process as SIGTSTP would have; returns when somebody continued it.
fn stop_here() -> Result<(), Error> {
    let stopped = kill_process(getpid(), HostSignal::STOP);
    stopped.map_err(|error| Error::io("stop", "host-shim")(io::Error::from(error)))
}

async fn resize(client: &SandboxClient, pid: u32) {
    if let Some(size) = terminal::size() {
        // The process may have ended.
        let _ = client.resize(pid, size).await;
    }
}
