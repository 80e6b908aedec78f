//! The spawner's side: one thread, one loop, no allocation that a request does not ask for.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use envd_sys::{Credentials, Failure, Rlimit, SeccompFilter, Spawn, Stage};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, WaitOptions, kill_process, wait};

use super::wire::{Event, EventKind, Exited, Failed, FailedStage, MAX_FDS, MAX_START, Start, Started};

const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

/// Serves starts from the socket until the agent closes it, then kills what it started.
///
/// Call it in a process with one thread that has no other children. The filter is for the programs, not for the caller.
pub fn serve(socket: &OwnedFd, filter: Option<&SeccompFilter>) -> io::Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut server = Server { socket, filter, starting: Vec::new(), running: HashSet::new() };
    let served = server.serve(&signals);
    for pid in server.running.iter().chain(server.starting.iter().map(|starting| &starting.pid)) {
        if let Some(pid) = Pid::from_raw(*pid) {
            // It may have ended already.
            let _ = kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    served
}

/// A child between its clone and its program.
struct Starting {
    id: u64,
    pid: i32,
    pidfd: OwnedFd,
    failure: File,
}

struct Server<'a> {
    socket: &'a OwnedFd,
    filter: Option<&'a SeccompFilter>,
    starting: Vec<Starting>,
    running: HashSet<i32>,
}

impl Server<'_> {
    fn serve(&mut self, signals: &SignalFd) -> io::Result<()> {
        loop {
            let (socket, signal, started) = self.wait(signals)?;
            // Exits come after the starts that they belong to.
            for index in started.into_iter().rev() {
                let starting = self.starting.swap_remove(index);
                self.finish_start(starting)?;
            }
            if signal {
                while signals.read_signal()?.is_some() {}
                self.reap()?;
            }
            if socket && !self.receive()? {
                return Ok(());
            }
        }
    }

    /// Waits for the socket, for SIGCHLD, or for children that reached their program or failed.
    fn wait(&self, signals: &SignalFd) -> io::Result<(bool, bool, Vec<usize>)> {
        let mut fds = vec![PollFd::new(self.socket, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        fds.extend(self.starting.iter().map(|starting| PollFd::new(&starting.failure, PollFlags::IN)));
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let started =
            fds[2..].iter().enumerate().filter(|(_, fd)| ready(fd)).map(|(index, _)| index).collect();
        Ok((ready(&fds[0]), ready(&fds[1]), started))
    }

    /// Takes one request; false when the agent is gone.
    fn receive(&mut self) -> io::Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut id = [0; size_of::<u64>()];
        let received =
            recvmsg(self.socket, &mut [IoSliceMut::new(&mut id)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if received.bytes == 0 {
            return Ok(false);
        }
        let mut fds = Vec::with_capacity(MAX_FDS);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        // Whatever is wrong with the request, its id is answered: somebody waits for it.
        let id = u64::from_ne_bytes(id);
        let started = match fds.split_first() {
            Some((request, fds)) => read_start(request)
                .map_err(|error| (FailedStage::Request, error.raw_os_error().unwrap_or(EINVAL)))
                .and_then(|start| self.start(id, &start, fds)),
            // The kernel drops descriptors that this process has no room for.
            None => Err((FailedStage::Request, rustix::io::Errno::MFILE.raw_os_error())),
        };
        if let Err((stage, errno)) = started {
            self.fail(id, stage, errno)?;
        }
        Ok(true)
    }

    fn start(&mut self, id: u64, start: &Start, fds: &[OwnedFd]) -> Result<(), (FailedStage, i32)> {
        let request = |_| (FailedStage::Request, EINVAL);
        let strings = |texts: &[Vec<u8>]| {
            texts
                .iter()
                .map(|text| CString::new(text.as_slice()))
                .collect::<Result<Vec<_>, _>>()
                .map_err(request)
        };
        let (stdio, cgroup) = fds.split_at_checked(3).ok_or((FailedStage::Request, EINVAL))?;
        let spawn = Spawn {
            programs: strings(&start.programs)?,
            argv: strings(&start.argv)?,
            env: strings(&start.env)?,
            cwd: CString::new(start.cwd.as_slice()).map_err(request)?,
            credentials: start.credentials.as_ref().map(|credentials| Credentials {
                uid: credentials.uid,
                gid: credentials.gid,
                groups: credentials.groups.clone(),
            }),
            stdio: [stdio[0].as_fd(), stdio[1].as_fd(), stdio[2].as_fd()],
            cgroup: cgroup.first().map(AsFd::as_fd),
            terminal: start.terminal,
            rlimits: start
                .rlimits
                .iter()
                .map(|limit| Rlimit { resource: limit.resource, soft: limit.soft, hard: limit.hard })
                .collect(),
            nice: start.nice,
            oom_score_adj: start.oom_score_adj.and_then(|score| CString::new(score.to_string()).ok()),
            filter: self.filter,
        };
        let spawned =
            spawn.start().map_err(|error| (FailedStage::Clone, error.raw_os_error().unwrap_or(EINVAL)))?;
        self.starting.push(Starting {
            id,
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            failure: File::from(spawned.failure),
        });
        Ok(())
    }

    /// The failure pipe of a child is readable: its program runs, or it has said why not.
    fn finish_start(&mut self, mut starting: Starting) -> io::Result<()> {
        let mut bytes = [0; Failure::SIZE];
        match starting.failure.read_exact(&mut bytes).map(|()| Failure::decode(bytes)) {
            Ok(Some(failure)) => {
                let stage = match failure.stage {
                    Stage::Prepare => FailedStage::Prepare,
                    Stage::Credentials => FailedStage::Credentials,
                    Stage::Cwd => FailedStage::Cwd,
                    Stage::Exec => FailedStage::Exec,
                    Stage::Filter => FailedStage::Filter,
                    Stage::Limits => FailedStage::Limits,
                };
                self.fail(starting.id, stage, failure.errno)
            }
            _ => {
                self.running.insert(starting.pid);
                let started = Started { id: starting.id, pid: starting.pid as u32 };
                self.send(EventKind::Started(started), Some(starting.pidfd.as_fd()))
            }
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        loop {
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid.as_raw_nonzero().get(), status),
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(()),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            // A program can end before the loop saw that it had begun; its failure pipe is closed by now.
            if let Some(index) = self.starting.iter().position(|starting| starting.pid == pid) {
                let starting = self.starting.swap_remove(index);
                self.finish_start(starting)?;
            }
            if self.running.remove(&pid) {
                let exited = Exited { pid: pid as u32, status: status.as_raw() };
                self.send(EventKind::Exited(exited), None)?;
            }
        }
    }

    fn fail(&self, id: u64, stage: FailedStage, errno: i32) -> io::Result<()> {
        self.send(EventKind::Failed(Failed { id, stage: stage.into(), errno }), None)
    }

    fn send(&self, kind: EventKind, pidfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let event = Event { kind: Some(kind) }.encode_to_vec();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = pidfd.into_iter().collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(self.socket, &[IoSlice::new(&event)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

fn read_start(request: &OwnedFd) -> io::Result<Start> {
    let file = File::from(request.try_clone()?);
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length > MAX_START {
        return Err(io::Error::from_raw_os_error(rustix::io::Errno::TOOBIG.raw_os_error()));
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Start::decode(&bytes[..]).map_err(io::Error::other)
}
