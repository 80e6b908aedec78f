//! The processes that were started through the agent.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use envd_proto::limits::MAX_OUTPUT_CHUNK;
use envd_proto::process::{ProcessConfig, ProcessInfo, process_selector};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::log::{End, OutputLog, Reader, Stream};
use crate::connect::{Code, Error};
use crate::spawner::Launched;

/// Processes that run or are remembered at one time; each holds up to four descriptors and a log.
const MAX_PROCESSES: usize = 4096;

/// What the commands, arguments and environments of those together may take: List tells them all.
const MAX_CONFIGS: usize = 64 << 20;

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
    /// Interrupts a write that waits for a process that reads no more.
    stdin_closed: CancellationToken,
    log: Arc<OutputLog>,
    overdue: AtomicBool,
}

/// Room for a process in the table, and for its configuration.
#[derive(Debug)]
pub struct Room {
    _place: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
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
        let written = tokio::select! {
            written = pipe.write_all(bytes) => written,
            () = self.stdin_closed.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match written {
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
        self.stdin_closed.cancel();
        *self.stdin.lock().await = None;
    }

    /// Whether it was killed because its time was over.
    pub fn is_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed)
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
#[derive(Clone, Debug)]
pub struct ProcessTable {
    processes: Arc<Mutex<HashMap<u32, Arc<Process>>>>,
    places: Arc<Semaphore>,
    config_bytes: Arc<Semaphore>,
}

impl Default for ProcessTable {
    fn default() -> Self {
        Self {
            processes: Arc::default(),
            places: Arc::new(Semaphore::new(MAX_PROCESSES)),
            config_bytes: Arc::new(Semaphore::new(MAX_CONFIGS)),
        }
    }
}

impl ProcessTable {
    /// Room for one more process.
    pub fn reserve(&self, config: &ProcessConfig) -> Result<Room, Error> {
        let exhausted = |what: String| Error::new(Code::ResourceExhausted, what);
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            exhausted(format!(
                "{MAX_PROCESSES} processes run or ended less than {KEEP_ENDED:?} ago: no more at a time"
            ))
        })?;
        // A message is bounded far below u32.
        let length = prost::Message::encoded_len(config) as u32;
        let bytes = Arc::clone(&self.config_bytes).try_acquire_many_owned(length).map_err(|_| {
            exhausted(format!(
                "the arguments and environments of all processes take more than {MAX_CONFIGS} bytes"
            ))
        })?;
        Ok(Room { _place: place, _bytes: bytes })
    }

    /// Takes a process that was just launched and carries its output to its log until it ends, or kills it at its
    /// deadline. The reader gets everything from the beginning.
    pub fn insert(
        &self,
        launched: Launched,
        config: ProcessConfig,
        tag: Option<String>,
        pipes: Pipes,
        deadline: Option<Instant>,
        room: Room,
    ) -> (Arc<Process>, Reader) {
        let Launched { pid, pidfd, exit } = launched;
        let Pipes { stdin, stdout, stderr } = pipes;
        let log = OutputLog::new();
        let reader = log.attach();
        let process = Arc::new(Process {
            pid,
            config,
            tag,
            pidfd,
            stdin: tokio::sync::Mutex::new(stdin),
            stdin_closed: CancellationToken::new(),
            log: Arc::clone(&log),
            overdue: AtomicBool::new(false),
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
                let mut exit = exit;
                let late = async {
                    match deadline {
                        Some(deadline) => tokio::time::sleep_until(deadline).await,
                        None => std::future::pending().await,
                    }
                };
                let end = tokio::select! {
                    end = &mut exit => end,
                    () = late => {
                        watched.overdue.store(true, Ordering::Relaxed);
                        // An error means that it ended by itself just now.
                        let _ = watched.signal(Signal::KILL);
                        exit.await
                    }
                };
                exited.cancel();
                end.map_or(End::Unknown, End::from)
            };
            let ((), (), end) = tokio::join!(out, err, wait);
            log.finish(end);
            watched.close_stdin().await;
            tokio::time::sleep(KEEP_ENDED).await;
            table.forget(&watched);
            drop(room);
        });
        (process, reader)
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

    /// Asks every process to end, and waits until all have, at most as long as `grace`.
    pub async fn end_all(&self, grace: Duration) {
        let alive = self.alive();
        for process in &alive {
            if let Err(error) = process.signal(Signal::TERM) {
                crate::log::warn(format_args!("asking process {} to end: {error}", process.pid));
            }
        }
        let all = async {
            for process in &alive {
                // One that cannot be waited for is killed with the rest.
                if let Ok(pidfd) = process.pidfd.try_clone() {
                    let _ = crate::pidfd::ended(pidfd).await;
                }
            }
        };
        let _ = tokio::time::timeout(grace, all).await;
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
            () = exited.cancelled() => break,
            read = pipe.read_buf(&mut buffer) => read,
        };
        // A pipe gives no error but the end.
        if read.unwrap_or(0) == 0 {
            return;
        }
        append(log, stream, &mut buffer).await;
    }
    // Everything that the process itself wrote is in the pipe by now: as much as is in it now is taken and no more, since a
    // grandchild may go on writing. The kernel is asked, not tokio: its readiness can lag behind the exit, and what was
    // written last would be lost.
    let mut left = rustix::io::ioctl_fionread(&pipe).unwrap_or(0);
    let mut bytes = vec![0; MAX_OUTPUT_CHUNK];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(MAX_OUTPUT_CHUNK).min(MAX_OUTPUT_CHUNK);
        match rustix::io::read(&pipe, &mut bytes[..most]) {
            Ok(0) => return,
            Ok(count) => {
                left = left.saturating_sub(count as u64);
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
