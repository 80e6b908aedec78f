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
use tokio::sync::oneshot;

use super::Respawn;
use super::kept::Kept;
use super::wire::{
    Event, EventKind, FailedStage, MAX_EVENT, MAX_FDS, MAX_START, Start, WireCredentials, WireRlimit,
};
use crate::events::Events;
use crate::pidfd;

/// A program for the spawner to start.
#[derive(Clone, Debug)]
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
    pub pidfd: Arc<OwnedFd>,
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
    /// The spawner died and there is not yet another.
    #[error("the sandbox's spawner died and is being made again: nothing was started, try again")]
    Restarting,
    /// The spawner died in between.
    #[error("the sandbox's spawner died while it started the program: it may run or not")]
    Lost,
    /// Talking to it failed.
    #[error("talking to the sandbox's spawner: {0}")]
    Io(#[from] io::Error),
}

/// A handle on the spawner. Where the spawner is made again, it goes on with the next one.
#[derive(Clone, Debug)]
pub struct Spawner {
    kept: Arc<Kept>,
}

impl Spawner {
    /// A connected pair: the agent's end, and the end for [`super::serve()`].
    pub fn socketpair() -> io::Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
    }

    /// A handle on the one spawner behind the agent's end. Must be called within a tokio runtime.
    pub fn connect(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { kept: Kept::start(Connection::new(socket)?, None) })
    }

    /// As [`Spawner::connect`], but `respawn` makes another when it dies.
    pub fn keep(socket: OwnedFd, respawn: Respawn) -> io::Result<Self> {
        Ok(Self { kept: Kept::start(Connection::new(socket)?, Some(respawn)) })
    }

    /// Where it is told that a spawner was made again.
    pub fn tell(&self, events: Events) {
        self.kept.tell(events);
    }

    /// Starts a program; returns when it runs or could not be reached.
    pub async fn launch(&self, launch: Launch<'_>) -> Result<Launched, LaunchError> {
        let (stdio, cgroup) = (launch.stdio, launch.cgroup);
        let request = memfd_of(launch)?;
        let mut fds = vec![request.as_fd()];
        fds.extend(stdio);
        fds.extend(cgroup);
        let mut connection = self.kept.connection(None).await?;
        if let Some(started) = connection.launch(&fds).await? {
            return Ok(started);
        }
        // It was dead before it got the request, so nothing was started: once more with the next one.
        connection = self.kept.connection(Some(&connection)).await?;
        connection.launch(&fds).await?.ok_or(LaunchError::Restarting)
    }
}

fn memfd_of(launch: Launch<'_>) -> Result<File, LaunchError> {
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
    Ok(request)
}

/// The socket of one spawner, from its start to its death.
#[derive(Debug)]
pub(super) struct Connection {
    /// Of type SEQPACKET: tokio's type is used for its readiness only, never for its reads and writes.
    socket: UnixStream,
    next_id: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    closed: bool,
    starts: HashMap<u64, oneshot::Sender<Result<Launched, LaunchError>>>,
    exits: HashMap<u32, Running>,
}

/// A process whose exit somebody waits for.
#[derive(Debug)]
pub(super) struct Running {
    /// To see its end when the spawner cannot tell it.
    pub(super) pidfd: Arc<OwnedFd>,
    /// Dropped without a status when that is lost.
    pub(super) exited: oneshot::Sender<ExitStatus>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Arc<Self>> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let socket = UnixStream::from_std(socket)?;
        Ok(Arc::new(Self { socket, next_id: AtomicU64::new(1), waiting: Mutex::default() }))
    }

    /// Starts a program; `None` when the spawner is dead and certainly did not get the request.
    async fn launch(&self, fds: &[BorrowedFd<'_>]) -> Result<Option<Launched>, LaunchError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, started) = oneshot::channel();
        {
            let mut waiting = self.lock();
            if waiting.closed {
                return Ok(None);
            }
            waiting.starts.insert(id, reply);
        }
        if let Err(error) = self.send(id, fds).await {
            self.lock().starts.remove(&id);
            return match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Ok(None),
                _ => Err(error.into()),
            };
        }
        started.await.map_err(|_| LaunchError::Lost)?.map(Some)
    }

    async fn send(&self, id: u64, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(fds));
                let id = id.to_ne_bytes();
                sendmsg(&self.socket, &[IoSlice::new(&id)], &mut control, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await
    }

    /// Takes what the spawner says, until it is dead.
    pub(super) async fn receive_all(&self) -> io::Result<()> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, || receive(&self.socket)).await?;
            let Some((event, descriptor)) = received else { return Ok(()) };
            if let Err(foreign) = self.dispatch(event, descriptor) {
                // Nor may its end hold up the agent: closing waits for a FUSE server, or for what a socket lingers on.
                drop(tokio::task::spawn_blocking(move || drop(foreign)));
                let message = "it sent a descriptor that is no pidfd of what it started";
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
    }

    /// Nothing more comes: whoever waits for a start is told, and what runs is given back.
    pub(super) fn close(&self) -> Vec<Running> {
        let mut waiting = self.lock();
        waiting.closed = true;
        waiting.starts.clear();
        waiting.exits.drain().map(|(_, running)| running).collect()
    }

    /// A message that fits nothing that was asked is dropped: the spawner may be in a tenant's hands. A descriptor that is
    /// not what it should be is given back, and ends the connection: one that is never ready would be waited for without
    /// an end.
    fn dispatch(&self, event: Event, descriptor: Option<OwnedFd>) -> Result<(), OwnedFd> {
        let checked = descriptor.map(|descriptor| match &event.kind {
            Some(EventKind::Started(started)) => match pidfd::is_of(descriptor.as_fd(), started.pid) {
                Ok(true) => Ok(Ok(descriptor)),
                Ok(false) => Err(descriptor),
                // Too many open files: nothing is known of this one.
                Err(error) => {
                    drop(tokio::task::spawn_blocking(move || drop(descriptor)));
                    Ok(Err(error))
                }
            },
            _ => Err(descriptor),
        });
        let pidfd = checked.transpose()?;
        let mut waiting = self.lock();
        match event.kind {
            Some(EventKind::Started(started)) => {
                let Some(reply) = waiting.starts.remove(&started.id) else { return Ok(()) };
                let pidfd = match pidfd.unwrap_or_else(|| Err(rustix::io::Errno::MFILE.into())) {
                    Ok(pidfd) => Arc::new(pidfd),
                    Err(error) => {
                        let _ = reply.send(Err(LaunchError::Io(error)));
                        return Ok(());
                    }
                };
                let (exited, exit) = oneshot::channel();
                waiting.exits.insert(started.pid, Running { pidfd: Arc::clone(&pidfd), exited });
                // A caller that went away leaves the process to run.
                let _ = reply.send(Ok(Launched { pid: started.pid, pidfd, exit }));
            }
            Some(EventKind::Failed(failed)) => {
                let Some(reply) = waiting.starts.remove(&failed.id) else { return Ok(()) };
                let errno = failed.errno;
                let prepare = |stage| LaunchError::Prepare { stage, errno };
                let error = match FailedStage::try_from(failed.stage) {
                    Ok(FailedStage::Exec) => LaunchError::Exec(errno),
                    Ok(FailedStage::Cwd) => LaunchError::Cwd(errno),
                    Ok(FailedStage::Clone) => LaunchError::Clone(errno),
                    Ok(FailedStage::Limits) => LaunchError::Limits(errno),
                    Ok(FailedStage::Credentials) => prepare("credentials"),
                    Ok(FailedStage::Filter) => prepare("seccomp filter"),
                    Ok(FailedStage::Prepare) => prepare("signals and descriptors"),
                    Ok(FailedStage::Request) | Err(_) => prepare("request"),
                };
                let _ = reply.send(Err(error));
            }
            Some(EventKind::Exited(exited)) => {
                if let Some(running) = waiting.exits.remove(&exited.pid) {
                    let _ = running.exited.send(ExitStatus::from_raw(exited.status));
                }
            }
            None => {}
        }
        Ok(())
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
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok(Some((Event::decode(&bytes[..received.bytes]).unwrap_or_default(), descriptor)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::super::wire::{Exited, Started};

    /// There only to catch a hang.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// Waits until the agent asks for a start.
    async fn asked(spawner: &OwnedFd) {
        let socket = std::os::unix::net::UnixStream::from(spawner.try_clone().unwrap());
        socket.set_nonblocking(true).unwrap();
        UnixStream::from_std(socket).unwrap().readable().await.unwrap();
    }

    fn say(spawner: &OwnedFd, kind: EventKind, descriptor: Option<BorrowedFd<'_>>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let event = Event { kind: Some(kind) }.encode_to_vec();
        sendmsg(spawner, &[IoSlice::new(&event)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    async fn launch(spawner: &Spawner) -> Result<Option<ExitStatus>, LaunchError> {
        let null = File::open("/dev/null").unwrap();
        let launch = Launch {
            programs: vec![b"/bin/true".to_vec()],
            argv: vec![b"true".to_vec()],
            env: vec![],
            cwd: b"/".to_vec(),
            credentials: None,
            oom_score_adj: None,
            terminal: false,
            rlimits: vec![],
            nice: None,
            stdio: [null.as_fd(); 3],
            cgroup: None,
        };
        let launched = tokio::time::timeout(DEADLINE, spawner.launch(launch)).await.expect("an answer")?;
        Ok(tokio::time::timeout(DEADLINE, launched.exit).await.expect("an end").ok())
    }

    #[tokio::test]
    async fn a_descriptor_that_is_no_pidfd_of_the_process_ends_the_spawner() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
        let another = std::process::id() + 1;
        for (descriptor, pid) in [(socket.as_fd(), 7), (own.as_fd(), another)] {
            let (near, far) = Spawner::socketpair().unwrap();
            let spawner = Spawner::connect(near).unwrap();
            let answer = async {
                asked(&far).await;
                say(&far, EventKind::Started(Started { id: 1, pid }), Some(descriptor));
            };
            let (launched, ()) = tokio::join!(launch(&spawner), answer);
            assert!(matches!(launched, Err(LaunchError::Lost)), "{launched:?}");
            assert!(matches!(launch(&spawner).await, Err(LaunchError::Gone)));
        }
    }

    #[tokio::test]
    async fn the_pidfd_of_the_process_is_taken() {
        let mut child = Command::new("true").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (near, far) = Spawner::socketpair().unwrap();
        let spawner = Spawner::connect(near).unwrap();
        let pid = child.id();
        let answer = async {
            asked(&far).await;
            say(&far, EventKind::Started(Started { id: 1, pid }), Some(pidfd.as_fd()));
            say(&far, EventKind::Exited(Exited { pid, status: 0 }), None);
        };
        let (launched, ()) = tokio::join!(launch(&spawner), answer);
        assert!(launched.unwrap().is_some_and(|status| status.success()));
        child.wait().unwrap();
    }
}
