//! The processes that were started through the agent.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use envd_proto::limits::MAX_OUTPUT_CHUNK;
use envd_proto::process::{ProcessConfig, ProcessInfo, process_selector};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

use super::log::{End, OutputLog, Stream};
use crate::connect::{Code, Error};
use crate::spawner::Launched;

/// Processes that run at one time; each holds three descriptors and a log.
pub(super) const MAX_PROCESSES: usize = 4096;

/// How long the end of a process can be asked for.
const KEEP_ENDED: Duration = Duration::from_secs(30);

/// Which process a call means.
pub type Selector = process_selector::Selector;

/// One process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    config: ProcessConfig,
    tag: Option<String>,
    pidfd: OwnedFd,
    stdin: tokio::sync::Mutex<Option<pipe::Sender>>,
    log: Arc<OutputLog>,
}

/// The agent's ends of a process's pipes.
#[derive(Debug)]
pub struct Pipes {
    /// Where input goes; `None` when the process reads /dev/null.
    pub stdin: Option<pipe::Sender>,
    /// What it prints.
    pub stdout: pipe::Receiver,
    /// Its errors.
    pub stderr: pipe::Receiver,
}

impl Process {
    /// Its pid as the container sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its output.
    pub fn log(&self) -> &Arc<OutputLog> {
        &self.log
    }

    /// What List says of it.
    pub fn info(&self) -> ProcessInfo {
        ProcessInfo { config: Some(self.config.clone()), pid: self.pid, tag: self.tag.clone() }
    }

    /// Writes to its standard input; returns when the process's pipe has it all.
    pub async fn write_stdin(&self, bytes: &[u8]) -> Result<(), Error> {
        let closed = || Error::new(Code::Internal, "stdin not enabled or closed");
        let mut stdin = self.stdin.lock().await;
        let pipe = stdin.as_mut().ok_or_else(closed)?;
        match pipe.write_all(bytes).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                *stdin = None;
                Err(closed())
            }
            Err(error) => Err(Error::new(Code::Internal, format!("writing to stdin failed: {error}"))),
        }
    }

    /// Closes its standard input; no error when it is closed.
    pub async fn close_stdin(&self) {
        *self.stdin.lock().await = None;
    }

    /// Sends it a signal. It may have ended in the meantime, which is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// All processes, the ended ones for a while.
#[derive(Clone, Debug, Default)]
pub struct ProcessTable {
    processes: Arc<Mutex<HashMap<u32, Arc<Process>>>>,
}

impl ProcessTable {
    /// Whether there is room for one more.
    pub fn check_room(&self) -> Result<(), Error> {
        let running = self.lock().values().filter(|process| process.log.end().is_none()).count();
        if running < MAX_PROCESSES {
            return Ok(());
        }
        Err(Error::new(
            Code::ResourceExhausted,
            format!("{running} processes run, at most {MAX_PROCESSES} may"),
        ))
    }

    /// Takes a process that was just launched and carries its output to its log until it ends.
    pub fn insert(
        &self,
        launched: Launched,
        config: ProcessConfig,
        tag: Option<String>,
        pipes: Pipes,
    ) -> Arc<Process> {
        let Launched { pid, pidfd, exit } = launched;
        let Pipes { stdin, stdout, stderr } = pipes;
        let log = OutputLog::new();
        let process = Arc::new(Process {
            pid,
            config,
            tag,
            pidfd,
            stdin: tokio::sync::Mutex::new(stdin),
            log: Arc::clone(&log),
        });
        // An older process of the same pid has ended, or the kernel would not have given it out again.
        self.lock().insert(pid, Arc::clone(&process));

        let table = self.clone();
        let watched = Arc::clone(&process);
        tokio::spawn(async move {
            let exited = CancellationToken::new();
            let out = pump(stdout, Stream::Stdout, &log, &exited);
            let err = pump(stderr, Stream::Stderr, &log, &exited);
            let wait = async {
                let end = exit.await.map_or(End::Unknown, End::from);
                exited.cancel();
                end
            };
            let ((), (), end) = tokio::join!(out, err, wait);
            watched.close_stdin().await;
            log.finish(end);
            tokio::time::sleep(KEEP_ENDED).await;
            table.forget(&watched);
        });
        process
    }

    /// The process that a selector means, also one that has ended a short while ago.
    pub fn find(&self, selector: Option<&Selector>) -> Result<Arc<Process>, Error> {
        let processes = self.lock();
        let (found, what) = match selector {
            Some(Selector::Pid(pid)) => (processes.get(pid), format!("pid {pid}")),
            Some(Selector::Tag(tag)) => {
                let tagged = || processes.values().filter(|process| process.tag.as_deref() == Some(tag));
                let alive = tagged().find(|process| process.log.end().is_none());
                (alive.or_else(|| tagged().next()), format!("tag {tag}"))
            }
            None => return Err(Error::new(Code::InvalidArgument, "the request selects no process")),
        };
        found.cloned().ok_or_else(|| Error::new(Code::NotFound, format!("process with {what} not found")))
    }

    /// As [`ProcessTable::find`], but only a process that is alive.
    pub fn find_alive(&self, selector: Option<&Selector>) -> Result<Arc<Process>, Error> {
        let process = self.find(selector)?;
        match process.log.end() {
            None => Ok(process),
            Some(_) => Err(Error::new(
                Code::NotFound,
                format!("process with pid {} not found: it has ended", process.pid),
            )),
        }
    }

    /// The processes that are alive, by pid.
    pub fn alive(&self) -> Vec<Arc<Process>> {
        let mut alive: Vec<_> =
            self.lock().values().filter(|process| process.log.end().is_none()).cloned().collect();
        alive.sort_by_key(|process| process.pid);
        alive
    }

    fn forget(&self, process: &Arc<Process>) {
        let mut processes = self.lock();
        // The pid may belong to a newer process by now.
        if processes.get(&process.pid).is_some_and(|current| Arc::ptr_eq(current, process)) {
            processes.remove(&process.pid);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Process>>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries one pipe to the log: to its end, or after the exit of the process as far as it is filled. A grandchild that
/// keeps the pipe open cannot delay the end of the process for ever.
async fn pump(mut pipe: pipe::Receiver, stream: Stream, log: &OutputLog, exited: &CancellationToken) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(MAX_OUTPUT_CHUNK);
        let read = tokio::select! {
            biased;
            read = pipe.read_buf(&mut buffer) => read,
            () = exited.cancelled() => break,
        };
        // A pipe gives no error but the end.
        if read.unwrap_or(0) == 0 {
            return;
        }
        append(log, stream, &mut buffer).await;
    }
    // Everything that the process itself wrote is in the pipe by now; an empty pipe is the end of it. The kernel is asked,
    // not tokio: its readiness can lag behind the exit, and what was written last would be lost.
    let mut bytes = vec![0; MAX_OUTPUT_CHUNK];
    loop {
        match rustix::io::read(&pipe, &mut bytes) {
            Ok(0) => return,
            Ok(count) => {
                buffer.extend_from_slice(&bytes[..count]);
                append(log, stream, &mut buffer).await;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

async fn append(log: &OutputLog, stream: Stream, buffer: &mut BytesMut) {
    while !buffer.is_empty() {
        let chunk = buffer.split_to(buffer.len().min(MAX_OUTPUT_CHUNK)).freeze();
        log.append(stream, chunk).await;
    }
}
