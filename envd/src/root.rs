//! The root that client calls act in: file system calls run on threads that live in the container's mount namespace.
//!
//! A path then means what the container's processes mean by it, and no link, mount or race leads out of it, because
//! for these threads there is nothing else. Without a container they are plain threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

/// Threads at the most. One that hangs in a dead mount is lost until the mount answers; the others go on.
const MAX_THREADS: usize = 64;

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
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("jobs", &self.jobs.len())
            .field("threads", &self.threads)
            .field("idle", &self.idle)
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

    /// Runs `job` on a thread that lives in the root.
    pub async fn run<T, F>(&self, job: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let (reply, result) = oneshot::channel();
        self.pool.push(Box::new(move || {
            let result = job();
            Box::new(move || {
                // Nobody waits any more when the caller was cancelled.
                let _ = reply.send(result);
            })
        }))?;
        result
            .await
            .map_err(|_| io::Error::other("a thread of the sandbox's root ended in the middle of a call"))?
    }
}

impl Pool {
    fn push(self: &Arc<Self>, job: Job) -> io::Result<()> {
        let mut state = self.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.work.notify_one();
        } else if state.threads < MAX_THREADS {
            let pool = Arc::clone(self);
            std::thread::Builder::new()
                .name("root".into())
                .stack_size(STACK)
                .spawn(move || pool.work())
                .inspect_err(|_| drop(state.jobs.pop_back()))?;
            state.threads += 1;
            state.idle += 1;
        }
        Ok(())
    }

    fn work(&self) {
        let entered = self.enter();
        let mut state = self.lock();
        if let Err(error) = entered {
            // The container is gone: whoever waits is told by the drop of its job.
            crate::log::warn(format_args!("cannot enter the sandbox's root: {error}"));
            state.jobs.clear();
            state.threads -= 1;
            state.idle -= 1;
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
            drop(state);
            let deliver = job();
            self.lock().idle += 1;
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
}
