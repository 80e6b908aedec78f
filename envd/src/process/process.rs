//! One process: what it was started as, how it is reached, what became of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envd_proto::process::{ProcessConfig, ProcessInfo, Scope};
use envd_sys::{SignalNumber, signal_group, signal_process};

use super::cgroup::OwnCgroup;
use super::input::Input;
use super::log::{End, OutputLog};
use super::options::Options;
use super::tree;
use crate::pidfd;

/// What a client asked for, and what was made for it.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) config: ProcessConfig,
    pub(super) tag: Option<String>,
    pub(super) options: Options,
    pub(super) input: Input,
    pub(super) cgroup: Option<OwnCgroup>,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    config: ProcessConfig,
    tag: Option<String>,
    keep_ended: Duration,
    /// `None` once it has ended.
    handle: Mutex<Option<Handle>>,
    input: Input,
    log: Arc<OutputLog>,
    overdue: AtomicBool,
    out_of_memory: AtomicBool,
    /// `None` where it has none of its own, and once that is empty and removed.
    cgroup: Mutex<Option<Arc<OwnCgroup>>>,
}

/// What reaches a process that is alive.
#[derive(Debug)]
struct Handle {
    pidfd: Arc<OwnedFd>,
    /// Its pid as the agent sees it. The spawner's word is not taken for it: root in the container can be its master.
    host_pid: Option<i32>,
}

impl Process {
    pub(super) fn new(pid: u32, pidfd: Arc<OwnedFd>, order: Order, log: Arc<OutputLog>) -> Self {
        let Order { config, tag, options, input, cgroup } = order;
        let host_pid = pidfd::host_pid(pidfd.as_fd());
        Self {
            pid,
            config,
            tag,
            keep_ended: options.keep_ended,
            handle: Mutex::new(Some(Handle { pidfd, host_pid })),
            input,
            log,
            overdue: AtomicBool::new(false),
            out_of_memory: AtomicBool::new(false),
            cgroup: Mutex::new(cgroup.map(Arc::new)),
        }
    }

    /// Its pid as the container sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its tag, when the client gave one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// What List says of it.
    pub fn info(&self) -> ProcessInfo {
        ProcessInfo { config: Some(self.config.clone()), pid: self.pid, tag: self.tag.clone() }
    }

    /// Its output.
    pub fn log(&self) -> &Arc<OutputLog> {
        &self.log
    }

    /// Whether its end has not been told.
    pub fn is_alive(&self) -> bool {
        self.log.end().is_none()
    }

    pub(super) fn input(&self) -> &Input {
        &self.input
    }

    pub(super) fn keep_ended(&self) -> Duration {
        self.keep_ended
    }

    /// Whether it was killed because its time was over.
    pub(super) fn is_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed)
    }

    pub(super) fn set_overdue(&self) {
        self.overdue.store(true, Ordering::Relaxed);
    }

    /// Whether the kernel killed it, or something that it started, because memory ran out.
    pub(super) fn is_out_of_memory(&self) -> bool {
        self.out_of_memory.load(Ordering::Relaxed)
    }

    pub(super) fn mark_out_of_memory(&self) {
        self.out_of_memory.store(true, Ordering::Relaxed);
    }

    /// Its pid as the agent sees it, while it is alive.
    pub(super) fn host_pid(&self) -> Option<i32> {
        self.handle().as_ref()?.host_pid
    }

    /// To see its end, while it is alive.
    pub(super) fn pidfd(&self) -> Option<OwnedFd> {
        self.handle().as_ref()?.pidfd.try_clone().ok()
    }

    /// Whether a process, by its pid as the agent sees it, is in the cgroup of this one.
    pub(super) fn cgroup_holds(&self, pid: i32) -> bool {
        self.cgroup().is_some_and(|cgroup| cgroup.holds(pid))
    }

    /// Whether something that it started may still be reached, though it has ended itself.
    pub(super) fn has_cgroup(&self) -> bool {
        self.cgroup().is_some()
    }

    /// Sends it a signal. It may have ended in the meantime, which is no error.
    pub(super) fn signal(&self, signal: SignalNumber) -> io::Result<()> {
        match self.handle().as_ref() {
            Some(handle) => unless_gone(signal_process(handle.pidfd.as_fd(), signal)),
            None => Ok(()),
        }
    }

    /// Sends a signal to it and more. Blocks: a tree is searched in /proc.
    pub(super) fn signal_scope(&self, signal: SignalNumber, scope: Scope) -> io::Result<()> {
        let no_pid = || io::Error::other("the kernel does not tell the process's pid");
        match scope {
            Scope::Process => self.signal(signal),
            Scope::Group => {
                let handle = self.handle();
                let Some(handle) = handle.as_ref() else { return Ok(()) };
                // It leads the group with its own number since its start, unless it has left that.
                unless_gone(signal_group(handle.pidfd.as_fd(), handle.host_pid.unwrap_or(0), signal))
            }
            Scope::Tree => match self.cgroup() {
                Some(cgroup) => cgroup.signal(signal),
                None => {
                    // The pidfd in the handle keeps nobody from using the pid again, but its own process does, as long
                    // as the spawner has not reaped it: asked now, it is right or absent.
                    let pid = self
                        .handle()
                        .as_ref()
                        .map(|handle| pidfd::host_pid(handle.pidfd.as_fd()).ok_or_else(no_pid));
                    match pid {
                        Some(pid) => tree::signal_tree(pid?, signal),
                        None => Ok(()),
                    }
                }
            },
        }
    }

    /// It has ended: frees what only a live process needs, and tells its readers.
    pub(super) fn end(self: &Arc<Self>, end: End) {
        self.input.close();
        *self.handle() = None;
        self.log.finish(end);
        let Some(cgroup) = self.cgroup() else { return };
        let process = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = cgroup.remove_when_empty().await {
                crate::log::warn(format_args!("removing the cgroup of process {}: {error}", process.pid));
            }
            *process.cgroup.lock().unwrap_or_else(PoisonError::into_inner) = None;
        });
    }

    fn handle(&self) -> MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cgroup(&self) -> Option<Arc<OwnCgroup>> {
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn unless_gone(sent: io::Result<()>) -> io::Result<()> {
    match sent {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
        sent => sent,
    }
}
