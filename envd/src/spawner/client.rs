//! The agent's side of the spawner.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use envd_sys::{Credentials, Rlimit};
use prost::Message;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};

use super::wire::{
    Event, EventKind, FailedStage, MAX_EVENT, MAX_FDS, MAX_START, Start, WireCredentials, WireRlimit,
};

/// A program for the spawner to start.
#[derive(Debug)]
pub struct Launch<'fd> {
    /// Paths to try in turn.
    pub programs: Vec<Vec<u8>>,
    /// The arguments, the program's name first.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` each.
    pub env: Vec<Vec<u8>>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// Whom to run as; `None` keeps the spawner's credentials.
    pub credentials: Option<Credentials>,
    /// The score, from -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Whether standard input is a terminal, which becomes the controlling one of the program's session.
    pub terminal: bool,
    /// Limits of its own.
    pub rlimits: Vec<Rlimit>,
    /// The nice value; `None` keeps the spawner's.
    pub nice: Option<i32>,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'fd>; 3],
    /// The cgroup2 directory to be born in.
    pub cgroup: Option<BorrowedFd<'fd>>,
}

/// A program that runs.
#[derive(Debug)]
pub struct Launched {
    /// Its pid as the container sees it.
    pub pid: u32,
    /// For signals: never another process.
    pub pidfd: OwnedFd,
    /// Its exit status; an error when the spawner died before it told.
    pub exit: oneshot::Receiver<ExitStatus>,
}

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The program could not be executed.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Exec(i32),
    /// The working directory could not be entered.
    #[error("working directory: {}", io::Error::from_raw_os_error(*.0))]
    Cwd(i32),
    /// A limit of processes or memory is reached.
    #[error("no new process: {}", io::Error::from_raw_os_error(*.0))]
    Clone(i32),
    /// A limit, the nice value or the score was refused.
    #[error("setting its limits: {}", io::Error::from_raw_os_error(*.0))]
    Limits(i32),
    /// Anything else that the child had to do first.
    #[error("preparing the process ({stage}): {}", io::Error::from_raw_os_error(*errno))]
    Prepare {
        /// The step.
        stage: &'static str,
        /// The system's error number.
        errno: i32,
    },
    /// Arguments and environment are longer than any Linux program can get.
    #[error("arguments and environment take {length} bytes, at most {MAX_START} are possible")]
    TooLong {
        /// Their length.
        length: usize,
    },
    /// The spawner is gone, and with it the container.
    #[error("the sandbox's spawner is gone")]
    Gone,
    /// Talking to it failed.
    #[error("talking to the sandbox's spawner: {0}")]
    Io(#[from] io::Error),
}

/// A handle on the spawner.
#[derive(Clone, Debug)]
pub struct Spawner {
    shared: Arc<Shared>,
    gone: watch::Receiver<bool>,
}

#[derive(Debug)]
struct Shared {
    /// Of type SEQPACKET: tokio's type is used for its readiness only, never for its reads and writes.
    socket: UnixStream,
    next_id: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    starts: HashMap<u64, oneshot::Sender<Result<Launched, LaunchError>>>,
    exits: HashMap<u32, oneshot::Sender<ExitStatus>>,
}

impl Spawner {
    /// A connected pair: the agent's end, and the end for [`super::serve()`].
    pub fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
    }

    /// A handle on the spawner behind the agent's end. Must be called within a tokio runtime.
    pub fn connect(socket: OwnedFd) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let socket = UnixStream::from_std(socket)?;
        let shared = Arc::new(Shared { socket, next_id: AtomicU64::new(1), waiting: Mutex::default() });
        let (ended, gone) = watch::channel(false);
        let receiver = Arc::clone(&shared);
        tokio::spawn(async move {
            let end = receiver.receive_all().await;
            if let Err(error) = end {
                crate::log::warn(format_args!("the spawner's socket failed: {error}"));
            }
            *receiver.lock() = Waiting::default();
            ended.send_replace(true);
        });
        Ok(Self { shared, gone })
    }

    /// Waits until the spawner is gone.
    pub async fn wait_gone(&self) {
        // The sender goes only after it sent true.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
    }

    /// Starts a program; returns when it runs or could not be reached.
    pub async fn launch(&self, launch: Launch<'_>) -> Result<Launched, LaunchError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, started) = oneshot::channel();
        self.shared.lock().starts.insert(id, reply);
        let sent = self.send(id, launch).await;
        if *self.gone.borrow() || sent.is_err() {
            self.shared.lock().starts.remove(&id);
        }
        sent?;
        started.await.map_err(|_| LaunchError::Gone)?
    }

    async fn send(&self, id: u64, launch: Launch<'_>) -> Result<(), LaunchError> {
        let start = Start {
            programs: launch.programs,
            argv: launch.argv,
            env: launch.env,
            cwd: launch.cwd,
            credentials: launch.credentials.map(|Credentials { uid, gid, groups }| WireCredentials {
                uid,
                gid,
                groups,
            }),
            oom_score_adj: launch.oom_score_adj,
            terminal: launch.terminal,
            rlimits: launch
                .rlimits
                .iter()
                .map(|limit| WireRlimit { resource: limit.resource, soft: limit.soft, hard: limit.hard })
                .collect(),
            nice: launch.nice,
        }
        .encode_to_vec();
        if start.len() > MAX_START {
            return Err(LaunchError::TooLong { length: start.len() });
        }
        let mut request = File::from(memfd_create(c"start", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        request.write_all(&start)?;
        let mut fds = vec![request.as_fd()];
        fds.extend(launch.stdio);
        fds.extend(launch.cgroup);
        self.shared
            .socket
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                sendmsg(
                    &self.shared.socket,
                    &[IoSlice::new(&id.to_ne_bytes())],
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?;
                Ok(())
            })
            .await
            .map_err(|error| match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LaunchError::Gone,
                _ => LaunchError::Io(error),
            })
    }
}

impl Shared {
    async fn receive_all(&self) -> io::Result<()> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, || receive(&self.socket)).await?;
            match received {
                Some((event, pidfd)) => self.dispatch(event, pidfd),
                None => return Ok(()),
            }
        }
    }

    /// A message that fits nothing that was asked is dropped: the spawner may be in a tenant's hands.
    fn dispatch(&self, event: Event, pidfd: Option<OwnedFd>) {
        let mut waiting = self.lock();
        match event.kind {
            Some(EventKind::Started(started)) => {
                let Some(reply) = waiting.starts.remove(&started.id) else { return };
                let Some(pidfd) = pidfd else {
                    let _ = reply.send(Err(LaunchError::Io(rustix::io::Errno::MFILE.into())));
                    return;
                };
                let (exited, exit) = oneshot::channel();
                waiting.exits.insert(started.pid, exited);
                // A caller that went away leaves the process to run.
                let _ = reply.send(Ok(Launched { pid: started.pid, pidfd, exit }));
            }
            Some(EventKind::Failed(failed)) => {
                let Some(reply) = waiting.starts.remove(&failed.id) else { return };
                let errno = failed.errno;
                let prepare = |stage| LaunchError::Prepare { stage, errno };
                let error = match FailedStage::try_from(failed.stage) {
                    Ok(FailedStage::Exec) => LaunchError::Exec(errno),
                    Ok(FailedStage::Cwd) => LaunchError::Cwd(errno),
                    Ok(FailedStage::Clone) => LaunchError::Clone(errno),
                    Ok(FailedStage::Limits) => LaunchError::Limits(errno),
                    Ok(FailedStage::Credentials) => prepare("credentials"),
                    Ok(FailedStage::Prepare) => prepare("signals and descriptors"),
                    Ok(FailedStage::Request) | Err(_) => prepare("request"),
                };
                let _ = reply.send(Err(error));
            }
            Some(EventKind::Exited(exited)) => {
                if let Some(reply) = waiting.exits.remove(&exited.pid) {
                    let _ = reply.send(ExitStatus::from_raw(exited.status));
                }
            }
            None => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One message; `None` at the end. One that is malformed has no kind.
fn receive(socket: &UnixStream) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; MAX_EVENT];
    let received =
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received,
            // What a socketpair says when its other end died with requests unread.
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    if received.bytes == 0 {
        return Ok(None);
    }
    let pidfd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok(Some((Event::decode(&bytes[..received.bytes]).unwrap_or_default(), pidfd)))
}
