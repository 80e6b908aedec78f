//! What a sandbox stands on: its folder, its processes, its state.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use sandbox_folder::{End, Event, Lifecycle, STATE_VERSION, State};
use sandbox_network::Network;
use tokio::process::Child;
use tokio::sync::watch;

use super::GuestEnd;
use crate::agent::AgentError;
use crate::dir::{SCRATCH, SCRATCH_OVERLAY, SandboxDir};
use crate::reaper::Reaper;
use crate::snapshot::{GuestKey, HostKey, SnapshotFolder};
use crate::spec::CheckedSpec;
use crate::timings::Timings;
use crate::vmm::{self, ApiError, QmpError, Vmm};
use crate::{Error, channel, network, snapshot};

/// How long a failed agent may take to power its machine off, so that its last words arrive.
pub(super) const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(3);

/// There from the beginning to the end of a sandbox, whatever fails between.
pub(super) struct Ground {
    pub(super) dir: SandboxDir,
    pub(super) reaper: Reaper,
    pub(super) state: State,
    pub(super) changes: watch::Sender<State>,
    pub(super) timings: Timings,
    pub(super) vmm: Option<Vmm>,
    pub(super) helper: Option<Child>,
    pub(super) network: Option<Network>,
    /// Of a channel that a snapshot cuts.
    pub(super) reset: Option<channel::Reset>,
    pub(super) origin: Option<Origin>,
    /// Its processes went on with its Resume.
    pub(super) thawed: bool,
}

/// Where the machine comes from, as its own snapshots have to say it.
pub(super) struct Origin {
    pub(super) key: HostKey,
    pub(super) guest: GuestKey,
    pub(super) agent: snapshot::AgentVersion,
    pub(super) startup_done: bool,
    /// What it was restored from.
    pub(super) base: Option<Arc<SnapshotFolder>>,
}

impl Ground {
    pub(super) fn new(dir: SandboxDir, spec: &CheckedSpec) -> Result<Self, Error> {
        let reaper = Reaper::start(dir.path())?;
        let state = State {
            schema_version: STATE_VERSION,
            id: spec.id.clone(),
            phase: Lifecycle::Created,
            shim_pid: std::process::id(),
            vmm_pid: None,
            accelerator: None,
            channel: None,
            agent_version: None,
            start: None,
            booted_because: None,
            generation: None,
            phases: Vec::new(),
            labels: spec.labels.clone(),
            end: None,
        };
        dir.write_state(&state)?;
        let changes = watch::Sender::new(state.clone());
        Ok(Self {
            dir,
            reaper,
            state,
            changes,
            timings: Timings::default(),
            vmm: None,
            helper: None,
            network: None,
            reset: None,
            origin: None,
            thawed: false,
        })
    }

    /// The VM, which is there from its start to the sandbox's end.
    pub(super) fn vmm(&mut self) -> Result<&mut Vmm, Error> {
        self.vmm.as_mut().ok_or(Error::Vmm(QmpError::Ended))
    }

    /// The file of the scratch disk.
    pub(super) fn scratch(&self) -> PathBuf {
        let overlay = self.dir.file(SCRATCH_OVERLAY);
        if overlay.exists() { overlay } else { self.dir.file(SCRATCH) }
    }

    /// A failure of the agent or the VMM with what the console says about it.
    pub(super) async fn explain(&mut self, error: Error) -> Error {
        let Some(vmm) = &mut self.vmm else { return error };
        let reason = match &error {
            // A connection that ended with its machine: the machine's end is the cause.
            Error::Agent(AgentError::Ended | AgentError::Io(_))
            | Error::Vmm(QmpError::Ended | QmpError::Io(_) | QmpError::Load(_))
            | Error::Firecracker(ApiError::Ended { .. } | ApiError::Io(_)) => None,
            Error::Agent(error) => Some(error.to_string()),
            _ => return error,
        };
        let status = tokio::time::timeout(LAST_WORDS_DEADLINE, vmm.wait()).await;
        let console = vmm.last_words().await;
        let reason = match (reason, status) {
            (None, Ok(Ok(status))) => vmm::cause_of_end(status, &console),
            (reason, _) => reason.unwrap_or_else(|| error.to_string()),
        };
        Error::Boot { reason, console }
    }

    pub(super) fn enter(&mut self, event: Event) -> Result<(), Error> {
        let before = self.state.phase;
        self.state.phase = before.after(event).map_err(|error| Error::Conflict(error.to_string()))?;
        if let Err(error) = self.tell() {
            // What could not be written has not happened.
            self.state.phase = before;
            return Err(error);
        }
        tracing::info!(phase = ?self.state.phase, vmm_pid = self.state.vmm_pid, "the sandbox's life goes on");
        Ok(())
    }

    /// It could not be paused, and runs: so it is, whether that can be written or not.
    pub(super) fn not_paused(&mut self) {
        if let Err(error) = self.enter(Event::NotPaused) {
            self.state.phase = Lifecycle::Running;
            self.changes.send_replace(self.state.clone());
            tracing::error!(%error, "state.json says that the sandbox is pausing, and it is running");
        }
    }

    /// Writes the state down.
    pub(super) fn tell(&mut self) -> Result<(), Error> {
        self.dir.write_state(&self.state)?;
        self.changes.send_replace(self.state.clone());
        Ok(())
    }

    /// Ends everything that runs; what is left is a folder for `last`.
    pub(super) async fn finish(mut self, last: Last) -> Result<(), Error> {
        // Every step is tried: a folder that cannot be removed must not leave a VM behind, nor the reverse.
        let mut first = Ok(());
        if let Some(vmm) = &mut self.vmm {
            first = first.and(vmm.kill().await);
            vmm.last_words().await;
        }
        if let Some(helper) = &mut self.helper {
            first = first.and(vmm::end(helper).await);
        }
        if let Some(network) = self.network.take() {
            first = first.and(network::end(network).await);
        }
        self.state.vmm_pid = None;
        if !self.dir.is_ephemeral() {
            // Before the state: what a full disk has no room for may have it then.
            first = first.and(self.dir.clear());
        }
        first = first.and(match last {
            Last::Paused => self.enter(Event::Paused),
            Last::StillPaused => {
                self.state.phase = Lifecycle::Paused;
                self.tell()
            }
            Last::Ended(end) => {
                self.state.end = Some(end);
                self.enter(Event::Ended)
            }
        });
        first = first.and(self.dir.finish());
        match first {
            Ok(()) => {
                self.reaper.release();
                Ok(())
            }
            // The reaper tries again once this process is gone.
            Err(error) => Err(error),
        }
    }

    /// Waits for `work`, as long as the VM lives and the deadline allows.
    pub(super) async fn while_alive<T>(
        &mut self,
        deadline: Duration,
        waiting_for: &std::cell::Cell<&'static str>,
        work: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, Error> {
        let disk = self.scratch();
        let Some(vmm) = &mut self.vmm else { return Err(AgentError::Ended.into()) };
        let mut stalled = vmm.stalled();
        tokio::select! {
            // Its last message may have arrived together with its end, and says more.
            biased;
            done = work => match done {
                Ok(done) => Ok(done),
                Err(error) => Err(self.explain(error.into()).await),
            },
            status = vmm.wait() => {
                let console = vmm.last_words().await;
                Err(Error::Boot { reason: vmm::cause_of_end(status?, &console), console })
            }
            () = stands_still(&mut stalled) => Err(no_space(disk)),
            () = tokio::time::sleep(deadline) => {
                let console = vmm.last_words().await;
                Err(Error::BootTimeout { deadline, waiting_for: waiting_for.get(), console })
            }
        }
    }
}

/// Returns when a machine stands still because there is no space for what its guest writes.
pub(super) async fn stands_still(stalled: &mut watch::Receiver<bool>) {
    // The other end ends with the VMM.
    if stalled.wait_for(|stalled| *stalled).await.is_err() {
        std::future::pending().await
    }
}

/// What is said of a machine that stands still.
pub(super) fn no_space(disk: PathBuf) -> Error {
    Error::Io { action: "write", path: disk, source: rustix::io::Errno::NOSPC.into() }
}

/// What a sandbox is when its shim ends.
pub(super) enum Last {
    Paused,
    /// It could not be resumed.
    StillPaused,
    Ended(End),
}

pub(super) async fn describe_end(status: Result<ExitStatus, Error>, vmm: &mut Vmm) -> GuestEnd {
    let words = vmm.last_words().await;
    match status {
        Ok(status) if status.success() && !words.contains("Kernel panic") => GuestEnd::PoweredOff,
        Ok(status) => GuestEnd::Crashed(vmm::cause_of_end(status, &words)),
        Err(error) => GuestEnd::Crashed(error.to_string()),
    }
}
