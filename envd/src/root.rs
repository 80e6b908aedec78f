//! The root that client calls act in: file system calls run on threads that live in the container's mount namespace.
//!
//! A path then means what the container's processes mean by it, and no link, mount or race leads out of it, because
//! for these threads there is nothing else. Without a container they are plain threads.
//!
//! A call into a file system can hang for as long as its server likes (FUSE, a network mount). Its thread is lost until
//! then, but nothing else is: a thread that is stuck makes room for another one, up to a bound, and who waits for it is
//! told after a while.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

use crate::connect::Code;

/// Threads that work at one time; more would only wait for the same disk.
const MAX_WORKING: usize = 64;

/// A call that takes longer is counted as stuck: it no longer keeps another one from a thread. Also how long a call
/// waits in the queue before it looks for stuck ones.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// Stuck threads at the most, each with some 20 KiB of memory. With all of them stuck, calls are refused.
const MAX_STUCK: usize = 256;

/// How long a caller waits for one call when its client named no deadline: longer than any healthy disk needs to sync a
/// large file or to remove a large tree.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

/// The threads' stacks; the calls do not recurse.
const STACK: usize = 256 << 10;

/// A call; what it gives back tells the caller, and is run once its thread counts as idle again. Otherwise a caller that
/// goes on at once would find no idle thread and start another.
type Job = Box<dyn FnOnce() -> Deliver + Send>;
type Deliver = Box<dyn FnOnce()>;

/// Runs blocking calls inside the sandbox's root.
#[derive(Clone, Debug)]
pub struct Root {
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    container: Option<Namespaces>,
    state: Mutex<State>,
    work: Condvar,
}

/// The namespaces of a container that its threads live in.
#[derive(Debug)]
struct Namespaces {
    mount: OwnedFd,
    /// So that the hostname is the container's too.
    uts: OwnedFd,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// When each call that runs began; by number, so the oldest first.
    running: BTreeMap<u64, Instant>,
    next_call: u64,
}

impl State {
    fn stuck(&self) -> usize {
        self.running.values().take_while(|began| began.elapsed() >= STUCK_AFTER).count()
    }
}

/// Why a call got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// Too many calls hang.
    #[error(
        "{MAX_STUCK} file system calls hang in the sandbox, probably in a mount whose server does not answer: end \
         that server or unmount it"
    )]
    Refused,
    /// This call takes too long.
    #[error(
        "the file system did not answer within {} s: is it a mount whose server hangs?",
        PATIENCE.as_secs()
    )]
    TimedOut,
}

impl Unanswered {
    /// What `error` is, if it is this.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }

    /// The code for the client.
    pub fn code(self) -> Code {
        match self {
            Self::Refused => Code::Unavailable,
            Self::TimedOut => Code::DeadlineExceeded,
        }
    }
}

/// Something that belongs to the root's file systems, such as an open file: it is used and dropped on the root's threads
/// only, because even a close can hang, or mean another file elsewhere.
#[derive(Debug)]
pub struct Held<T: Send + 'static> {
    value: Option<T>,
    root: Root,
}

impl<T: Send + 'static> Held<T> {
    /// One that was made elsewhere without touching a file.
    pub fn new(root: &Root, value: T) -> Self {
        Self { value: Some(value), root: root.clone() }
    }

    /// For reading; on a thread of the root only.
    pub fn get(&self) -> io::Result<&T> {
        self.value.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes one on a thread of the root.
    pub async fn make(
        root: &Root,
        make: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<Self> {
        let keeper = root.clone();
        root.run(move || Ok(Self { value: Some(make()?), root: keeper })).await
    }

    /// Uses it there.
    pub async fn with<R: Send + 'static>(
        mut self,
        job: impl FnOnce(&mut T) -> io::Result<R> + Send + 'static,
    ) -> io::Result<(Self, R)> {
        let root = self.root.clone();
        root.run(move || {
            let value = self.value.as_mut().ok_or(io::ErrorKind::NotFound)?;
            let result = job(value)?;
            Ok((self, result))
        })
        .await
    }

    /// Uses it up.
    pub async fn finish<R: Send + 'static>(
        mut self,
        job: impl FnOnce(T) -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        let root = self.root.clone();
        root.run(move || job(self.value.take().ok_or(io::ErrorKind::NotFound)?)).await
    }
}

impl<T: Send + 'static, U: Send + 'static> Held<(T, U)> {
    /// Takes out what needs no care.
    pub fn split(mut self) -> Option<(Held<T>, U)> {
        let (value, other) = self.value.take()?;
        Some((Held::new(&self.root, value), other))
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.root.drop_there(value);
        }
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("jobs", &self.jobs.len())
            .field("threads", &self.threads)
            .field("idle", &self.idle)
            .field("running", &self.running.len())
            .finish()
    }
}

impl Root {
    /// The agent's own root.
    pub fn own() -> Self {
        Self::new(None)
    }

    /// The root of the container whose init has this pid.
    pub fn of_container(init: u32) -> io::Result<Self> {
        let namespace = |name| File::open(format!("/proc/{init}/ns/{name}")).map(OwnedFd::from);
        Ok(Self::new(Some(Namespaces { mount: namespace("mnt")?, uts: namespace("uts")? })))
    }

    fn new(container: Option<Namespaces>) -> Self {
        Self { pool: Arc::new(Pool { container, state: Mutex::default(), work: Condvar::new() }) }
    }

    /// Runs `job` on a thread that lives in the root. A caller that goes away before it began takes it back.
    pub async fn run<T, F>(&self, job: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        self.run_within(PATIENCE, job).await
    }

    async fn run_within<T, F>(&self, patience: Duration, job: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let (reply, mut result) = oneshot::channel();
        let began = Instant::now();
        self.pool.push(Box::new(move || {
            let result = (!reply.is_closed()).then(job);
            Box::new(move || {
                // Nobody waits any more when the caller was cancelled.
                let _ = result.map(|result| reply.send(result));
            })
        }))?;
        while began.elapsed() < patience {
            match tokio::time::timeout(STUCK_AFTER.min(patience), &mut result).await {
                Ok(Ok(result)) => return result,
                Ok(Err(_)) => {
                    return Err(io::Error::other(
                        "a thread of the sandbox's root ended in the middle of a call",
                    ));
                }
                // Perhaps it waits behind calls that are stuck by now.
                Err(_) => self.pool.grow(&mut self.pool.lock())?,
            }
        }
        Err(io::Error::other(Unanswered::TimedOut))
    }

    /// Drops `value` on a thread of the root; nobody waits for it.
    fn drop_there<T: Send + 'static>(&self, value: T) {
        let mut state = self.pool.lock();
        state.jobs.push_back(Box::new(move || {
            drop(value);
            Box::new(|| {})
        }));
        if let Err(error) = self.pool.grow(&mut state) {
            crate::log::warn(format_args!("closing a file has to wait for a thread: {error}"));
        }
    }
}

impl Pool {
    fn push(self: &Arc<Self>, job: Job) -> io::Result<()> {
        let mut state = self.lock();
        if state.idle == 0 && state.stuck() >= MAX_STUCK {
            return Err(io::Error::other(Unanswered::Refused));
        }
        state.jobs.push_back(job);
        self.grow(&mut state).inspect_err(|_| drop(state.jobs.pop_back()))
    }

    /// Sees to it that somebody takes the jobs.
    fn grow(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        if state.idle >= state.jobs.len() {
            self.work.notify_one();
            return Ok(());
        }
        let working = state.threads.saturating_sub(state.stuck());
        if working >= MAX_WORKING || state.threads >= MAX_WORKING + MAX_STUCK {
            return Ok(());
        }
        let pool = Arc::clone(self);
        let spawned =
            std::thread::Builder::new().name("root".into()).stack_size(STACK).spawn(move || pool.work());
        match spawned {
            Ok(_) => {
                state.threads += 1;
                state.idle += 1;
                Ok(())
            }
            // One of the others will come to it.
            Err(_) if working > 0 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn work(&self) {
        let entered = self.enter();
        let mut state = self.lock();
        if let Err(error) = entered {
            // The container is gone: whoever waits is told by the drop of its job.
            crate::log::warn(format_args!("cannot enter the sandbox's root: {error}"));
            let lost = std::mem::take(&mut state.jobs);
            state.threads -= 1;
            state.idle -= 1;
            drop(state);
            drop(lost);
            return;
        }
        loop {
            while state.jobs.is_empty() {
                let (next, waited) =
                    self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = next;
                if waited.timed_out() && state.jobs.is_empty() {
                    state.threads -= 1;
                    state.idle -= 1;
                    return;
                }
            }
            let Some(job) = state.jobs.pop_front() else { continue };
            state.idle -= 1;
            let call = state.next_call;
            state.next_call += 1;
            state.running.insert(call, Instant::now());
            drop(state);
            let deliver = job();
            let mut done = self.lock();
            done.running.remove(&call);
            done.idle += 1;
            drop(done);
            deliver();
            state = self.lock();
        }
    }

    fn enter(&self) -> io::Result<()> {
        let Some(container) = &self.container else { return Ok(()) };
        // setns refuses a thread that shares its cwd and root with others.
        unshare(CloneFlags::CLONE_FS)?;
        setns(&container.mount, CloneFlags::CLONE_NEWNS)?;
        setns(&container.uts, CloneFlags::CLONE_NEWUTS)?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_that_hangs_does_not_stall_the_others() {
        let root = Root::own();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let hanging = tokio::spawn({
            let root = root.clone();
            async move { root.run(move || Ok(hang.recv().is_err())).await }
        });
        for n in 0..200 {
            assert_eq!(root.run(move || Ok(n)).await.unwrap(), n);
        }
        drop(release);
        assert!(hanging.await.unwrap().unwrap());
        assert!(root.pool.lock().threads <= 2);
    }

    #[tokio::test]
    async fn hung_calls_make_room_up_to_a_bound() {
        let root = Root::own();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        let hung: Vec<_> = (0..MAX_STUCK)
            .map(|_| {
                let (root, hang) = (root.clone(), Arc::clone(&hang));
                let job = move || Ok(hang.lock().is_ok_and(|hang| hang.recv().is_err()));
                tokio::spawn(async move { root.run(job).await })
            })
            .collect();
        // Those that wait in the queue get their threads as the ones before them turn out to be stuck.
        let all_hang = async {
            while root.pool.lock().stuck() < MAX_STUCK {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all_hang).await.expect("all calls hang");
        let refused = root.run(|| Ok(())).await.unwrap_err();
        assert_eq!(Unanswered::of(&refused), Some(Unanswered::Refused));
        drop(release);
        for call in hung {
            assert!(call.await.unwrap().unwrap());
        }
        assert_eq!(root.run(|| Ok(1)).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn who_waits_too_long_is_told_and_the_thread_comes_back() {
        let root = Root::own();
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let waited = root.run_within(Duration::from_millis(20), move || Ok(hang.recv().is_err())).await;
        assert_eq!(Unanswered::of(&waited.unwrap_err()), Some(Unanswered::TimedOut));
        drop(release);
        assert_eq!(root.run(|| Ok(1)).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn what_is_held_is_dropped_on_a_thread_of_the_root() {
        struct Tell(std::sync::mpsc::Sender<Option<String>>);
        impl Drop for Tell {
            fn drop(&mut self) {
                let _ = self.0.send(std::thread::current().name().map(str::to_owned));
            }
        }
        let (told, dropped) = std::sync::mpsc::channel();
        drop(Held::make(&Root::own(), move || Ok(Tell(told))).await.unwrap());
        let thread = dropped.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(thread.as_deref(), Some("root"));
    }
}
