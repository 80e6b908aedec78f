//! The processes that were started through the agent.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use envd_proto::process::{ProcessConfig, process_selector};
use envd_sys::SignalNumber;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::carry::{Pipe, carry};
use super::log::{End, OutputLog, Reader, Stream};
use super::out_of_memory::KernelLog;
use super::process::{Order, Process};
use crate::connect::{Code, Error};
use crate::spawner::Launched;

/// Processes that run or are remembered at one time; each that runs holds up to four descriptors and a log.
pub(super) const MAX_PROCESSES: usize = 4096;

/// What the commands, arguments and environments of those together may take: List tells them all.
const MAX_CONFIGS: usize = 64 << 20;

/// Which process a call means.
pub type Selector = process_selector::Selector;

/// Where a process's output comes from.
#[derive(Debug)]
pub(super) enum Output {
    /// Two pipes.
    Pipes {
        /// What it prints.
        stdout: Pipe,
        /// Its errors.
        stderr: Pipe,
    },
    /// A terminal; the process's input has it too.
    Terminal(Arc<Pipe>),
}

/// Room for a process in the table, and for its configuration.
#[derive(Debug)]
pub(super) struct Room {
    _place: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// All processes, the ended ones for a while.
#[derive(Clone, Debug, Default)]
pub struct ProcessTable {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    places: Arc<Semaphore>,
    config_bytes: Arc<Semaphore>,
    budget: Arc<Budget>,
    kernel_log: OnceLock<Arc<KernelLog>>,
    /// For the task that forgets: there is something to forget sooner.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    processes: HashMap<u32, Entry>,
    /// The ended processes, by when they are forgotten.
    expiries: BTreeMap<(Instant, u64), u32>,
    /// Counts starts: of two processes with one tag the newer is meant.
    started: u64,
    is_forgetting: bool,
}

#[derive(Debug)]
struct Entry {
    process: Arc<Process>,
    order: u64,
    _room: Room,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            places: Arc::new(Semaphore::new(MAX_PROCESSES)),
            config_bytes: Arc::new(Semaphore::new(MAX_CONFIGS)),
            budget: Arc::default(),
            kernel_log: OnceLock::new(),
            ended: Notify::new(),
        }
    }
}

impl ProcessTable {
    /// Room for one more process. Ended ones make place, those first that would be forgotten next.
    pub(super) fn reserve(&self, config: &ProcessConfig, tag: Option<&String>) -> Result<Room, Error> {
        let exhausted = |what: String| Error::new(Code::ResourceExhausted, what);
        // A message is bounded far below u32.
        let length = (prost::Message::encoded_len(config) + tag.map_or(0, String::len)) as u32;
        loop {
            let place = Arc::clone(&self.inner.places).try_acquire_owned();
            let bytes = Arc::clone(&self.inner.config_bytes).try_acquire_many_owned(length);
            let missing = match (place, bytes) {
                (Ok(place), Ok(bytes)) => return Ok(Room { _place: place, _bytes: bytes }),
                (Err(_), _) => format!("{MAX_PROCESSES} processes run: no more at a time"),
                (_, Err(_)) => format!(
                    "the arguments and environments of all processes take more than {MAX_CONFIGS} bytes"
                ),
            };
            if !self.inner.lock().forget_first() {
                return Err(exhausted(missing));
            }
        }
    }

    /// Takes a process that was just launched and carries its output to its log until it ends, or kills it at its
    /// deadline. The reader gets everything from the beginning.
    pub(super) fn insert(
        &self,
        launched: Launched,
        order: Order,
        output: Output,
        deadline: Option<Instant>,
        room: Room,
    ) -> Result<(Arc<Process>, Reader), Error> {
        let Launched { pid, pidfd, exit } = launched;
        let log = OutputLog::new(order.options.log_size, order.options.policy, &self.inner.budget);
        let reader = log
            .attach(None)
            .map_err(|error| Error::new(Code::Internal, format!("a new log has no place: {error}")))?
            .reader;
        let process = Arc::new(Process::new(pid, pidfd, order, log));
        {
            let mut state = self.inner.lock();
            state.started += 1;
            let entry = Entry { process: Arc::clone(&process), order: state.started, _room: room };
            // An older process of the same pid has ended, or the kernel would not have given it out again.
            state.processes.insert(pid, entry);
        }
        let (table, watched) = (self.clone(), Arc::clone(&process));
        tokio::spawn(async move {
            let end = watch(&watched, output, exit, deadline).await;
            table.end(&watched, end);
        });
        Ok((process, reader))
    }

    /// The process that a selector means, also one that has ended a short while ago. Of several with one tag it is the
    /// one that was started last, and one that is alive before one that has ended.
    pub(super) fn find(&self, selector: Option<&Selector>) -> Result<Arc<Process>, Error> {
        let state = self.inner.lock();
        let (found, what) = match selector {
            Some(Selector::Pid(pid)) => (state.processes.get(pid), format!("pid {pid}")),
            Some(Selector::Tag(tag)) => {
                let tagged = state.processes.values().filter(|entry| entry.process.tag() == Some(tag));
                (tagged.max_by_key(|entry| (entry.process.is_alive(), entry.order)), format!("tag {tag}"))
            }
            None => return Err(Error::new(Code::InvalidArgument, "the request selects no process")),
        };
        found
            .map(|entry| Arc::clone(&entry.process))
            .ok_or_else(|| Error::new(Code::NotFound, format!("process with {what} not found")))
    }

    /// As [`ProcessTable::find`], but only a process that is alive.
    pub(super) fn find_alive(&self, selector: Option<&Selector>) -> Result<Arc<Process>, Error> {
        let process = self.find(selector)?;
        if process.is_alive() {
            return Ok(process);
        }
        let message = format!("process with pid {} not found: it has ended", process.pid());
        Err(Error::new(Code::NotFound, message))
    }

    /// The processes that are alive, by pid.
    pub(super) fn alive(&self) -> Vec<Arc<Process>> {
        let state = self.inner.lock();
        let alive = state.processes.values().filter(|entry| entry.process.is_alive());
        let mut alive: Vec<_> = alive.map(|entry| Arc::clone(&entry.process)).collect();
        alive.sort_by_key(|process| process.pid());
        alive
    }

    /// Asks every process to end, and waits until all have, at most as long as `grace`.
    pub async fn end_all(&self, grace: Duration) {
        let alive = self.alive();
        for process in &alive {
            if let Err(error) = process.signal(SignalNumber::TERM) {
                crate::log::warn(format_args!("asking process {} to end: {error}", process.pid()));
            }
        }
        let all = async {
            for process in &alive {
                // One that cannot be waited for is killed with the rest.
                if let Some(pidfd) = process.pidfd() {
                    let _ = crate::pidfd::ended(pidfd).await;
                }
            }
        };
        let _ = tokio::time::timeout(grace, all).await;
    }

    /// Where the ends of processes ask for what the kernel has killed.
    pub(super) fn set_kernel_log(&self, log: Arc<KernelLog>) {
        // A second watcher would tell everything twice.
        let _ = self.inner.kernel_log.set(log);
    }

    /// Marks the process that the kernel killed, or one that started what the kernel killed; whether it is it itself.
    pub(super) fn mark_out_of_memory(
        &self,
        host_pid: i32,
        session: Option<i32>,
    ) -> Option<(Arc<Process>, bool)> {
        let alive = self.alive();
        let itself = alive.iter().find(|process| process.host_pid() == Some(host_pid));
        let relative = || {
            let by_session = |process: &&Arc<Process>| session.is_some() && process.host_pid() == session;
            let by_cgroup = |process: &&Arc<Process>| process.cgroup_holds(host_pid);
            alive.iter().find(by_session).or_else(|| alive.iter().find(by_cgroup))
        };
        let found = itself.or_else(relative)?;
        found.mark_out_of_memory();
        Some((Arc::clone(found), itself.is_some()))
    }

    /// A process has ended: tells its readers, and forgets it after a while.
    fn end(&self, process: &Arc<Process>, end: End) {
        if let Some(kernel_log) = self.inner.kernel_log.get().filter(|_| end != End::Exited(0)) {
            kernel_log.catch_up(self);
        }
        process.end(end);
        let mut state = self.inner.lock();
        let Some(entry) = state.processes.get(&process.pid()) else { return };
        // The pid may belong to a newer process by now.
        if !Arc::ptr_eq(&entry.process, process) {
            return;
        }
        let expiry = (Instant::now() + process.keep_ended(), entry.order);
        state.expiries.insert(expiry, process.pid());
        if std::mem::replace(&mut state.is_forgetting, true) {
            self.inner.ended.notify_one();
        } else {
            tokio::spawn(forget(Arc::downgrade(&self.inner)));
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Forgets the ended process whose time is over first; false when there is none.
    fn forget_first(&mut self) -> bool {
        let Some(((_, order), pid)) = self.expiries.pop_first() else { return false };
        if self.processes.get(&pid).is_some_and(|entry| entry.order == order) {
            self.processes.remove(&pid);
        }
        true
    }
}

/// Forgets ended processes, each when its time is over, until there is none: then what they held goes back to the kernel.
async fn forget(table: Weak<Inner>) {
    loop {
        let Some(inner) = table.upgrade() else { return };
        let next = {
            let mut state = inner.lock();
            while state.expiries.first_key_value().is_some_and(|((when, _), _)| *when <= Instant::now()) {
                state.forget_first();
            }
            match state.expiries.first_key_value() {
                Some(((when, _), _)) => *when,
                None => {
                    state.is_forgetting = false;
                    break;
                }
            }
        };
        // At the end of a wait, or when another process has ended, which may be the next to be forgotten.
        let _ = tokio::time::timeout_at(next, inner.ended.notified()).await;
    }
    tokio::task::spawn_blocking(envd_sys::trim_heap);
}

/// Carries a process's output to its log until it has ended.
async fn watch(
    process: &Process,
    output: Output,
    mut exit: tokio::sync::oneshot::Receiver<std::process::ExitStatus>,
    deadline: Option<Instant>,
) -> End {
    let exited = CancellationToken::new();
    let log = process.log();
    let wait = async {
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let end = tokio::select! {
            end = &mut exit => end,
            () = late => {
                process.set_overdue();
                // An error means that it ended by itself just now.
                let _ = process.signal(SignalNumber::KILL);
                exit.await
            }
        };
        log.close();
        exited.cancel();
        end.map_or(End::Unknown, End::from)
    };
    match &output {
        Output::Pipes { stdout, stderr } => {
            let out = carry(stdout, Stream::Stdout, log, &exited);
            let err = carry(stderr, Stream::Stderr, log, &exited);
            tokio::join!(wait, out, err).0
        }
        Output::Terminal(terminal) => tokio::join!(wait, carry(terminal, Stream::Pty, log, &exited)).0,
    }
}
