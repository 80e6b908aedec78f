//! Ctrl-C: the running steps are ended and cleaned up after; between steps the program just ends. A step that fails ends
//! those that run beside it in the same way.

use std::collections::BTreeSet;
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::error::Error;

/// The exit code after a signal, as shells have it for SIGINT.
pub const EXIT_INTERRUPTED: i32 = 130;

/// The signals that ask for the end.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Knows whether the user wants to stop, and which process must end for that.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    asked: bool,
    /// A part of the work failed, and the rest is of no use.
    stopped: bool,
    /// Several steps may be at work at once.
    children: BTreeSet<Pid>,
}

impl Interrupt {
    /// Takes SIGINT and SIGTERM over. Call it before the program has other threads: they inherit the mask.
    pub fn install() -> Result<Self, Error> {
        let signals = SigSet::from_iter(SIGNALS);
        let io = |errno| crate::error::at::<nix::errno::Errno>(std::path::Path::new("signal mask"))(errno);
        signals.thread_block().map_err(io)?;
        let interrupt = Self::default();
        let watched = interrupt.clone();
        std::thread::spawn(move || {
            while signals.wait().is_ok() {
                let mut state = watched.lock();
                state.asked = true;
                if state.children.is_empty() {
                    // Mounts go with our namespace, and half-made files are swept by the next build.
                    std::process::exit(EXIT_INTERRUPTED);
                }
                // Their end wakes the build, which cleans up.
                for child in &state.children {
                    let _ = kill(*child, Signal::SIGTERM);
                }
            }
        });
        Ok(interrupt)
    }

    /// As if the user asked to stop.
    #[cfg(test)]
    pub(crate) fn ask(&self) {
        self.lock().asked = true;
    }

    /// Whether the user asked to stop.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let state = self.lock();
        if state.asked || state.stopped { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Ends everything that is at work, as the user's Ctrl-C does, but not this program.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        for child in &state.children {
            let _ = kill(*child, Signal::SIGTERM);
        }
    }

    /// Forgets [`Interrupt::stop`], once nothing is at work any more.
    pub(crate) fn restart(&self) {
        self.lock().stopped = false;
    }

    /// Starts somebody else's program, which a signal ends from now on.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        // It inherits this thread's mask, and would not hear any of them. One that comes right now ends this program
        // without a word, as it would have a moment before.
        let signals = SigSet::from_iter(SIGNALS);
        signals.thread_unblock()?;
        let child = command.spawn();
        signals.thread_block()?;
        if let Ok(child) = &child {
            self.watch(child.id());
        }
        child
    }

    /// From now on a signal ends that process.
    pub(crate) fn watch(&self, pid: u32) {
        let mut state = self.lock();
        let Some(child) = i32::try_from(pid).ok().map(Pid::from_raw) else { return };
        state.children.insert(child);
        if state.asked || state.stopped {
            let _ = kill(child, Signal::SIGTERM);
        }
    }

    /// The process has ended, and was waited for.
    pub(crate) fn unwatch(&self, pid: u32) {
        self.lock().children.retain(|child| u32::try_from(child.as_raw()) != Ok(pid));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
