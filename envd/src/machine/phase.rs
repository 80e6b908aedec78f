//! Which life of the machine this is, and whether the tenant's processes are held.
//!
//! ```text
//!            Freeze                Resume(newer)
//!  Running ──────────► Frozen ──────────────────► Resumed ─┐ Resume(newer): a snapshot of a machine that waits
//!     ▲                  │ Thaw: the source goes on  │  ▲──┘
//!     └──────────────────┴──────────── Thaw ◄────────┘
//! ```
//!
//! Pure: what is done on an edge is the control door's business. No timer has an edge here.

use envd_proto::FIRST_GENERATION;
use tokio::sync::watch;

/// Where the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The tenant's processes run.
    Running {
        /// This life's number.
        generation: u64,
    },
    /// They are held, and the machine may be cut into a snapshot.
    Frozen {
        /// This life's number.
        generation: u64,
    },
    /// A restored machine knows who it is; its processes are held still.
    Resumed {
        /// This life's number.
        generation: u64,
        /// Whether it is another sandbox than its source.
        clone: bool,
    },
}

/// Why a request does not fit the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misplaced {
    /// A Freeze of what is frozen.
    #[error("the sandbox is frozen already: Thaw comes next, or Resume after a restore")]
    AlreadyFrozen,
    /// A Resume, a Rehearse or a Thaw of what runs.
    #[error("the sandbox is not frozen: Freeze comes first")]
    NotFrozen,
    /// A Resume into a life that is over, or is this one.
    #[error("generation {given} is not above the machine's own, {current}")]
    OldGeneration {
        /// The machine's.
        current: u64,
        /// The Resume's.
        given: u64,
    },
}

impl Phase {
    /// This life's number.
    pub fn generation(self) -> u64 {
        match self {
            Self::Running { generation } | Self::Frozen { generation } | Self::Resumed { generation, .. } => {
                generation
            }
        }
    }

    /// Whether the tenant's processes are held.
    pub fn is_frozen(self) -> bool {
        !matches!(self, Self::Running { .. })
    }

    /// After a Freeze.
    pub fn freeze(self) -> Result<Self, Misplaced> {
        match self {
            Self::Running { generation } => Ok(Self::Frozen { generation }),
            Self::Frozen { .. } | Self::Resumed { .. } => Err(Misplaced::AlreadyFrozen),
        }
    }

    /// After a Resume.
    pub fn resume(self, generation: u64, clone: bool) -> Result<Self, Misplaced> {
        match self {
            Self::Running { .. } => Err(Misplaced::NotFrozen),
            _ if generation <= self.generation() => {
                Err(Misplaced::OldGeneration { current: self.generation(), given: generation })
            }
            // A clone that was resumed again before its Thaw has never run as itself.
            Self::Resumed { clone: was_clone, .. } => {
                Ok(Self::Resumed { generation, clone: clone || was_clone })
            }
            Self::Frozen { .. } => Ok(Self::Resumed { generation, clone }),
        }
    }

    /// Whether it can be rehearsed: never beside a client's processes.
    pub fn rehearse(self) -> Result<(), Misplaced> {
        if self.is_frozen() { Ok(()) } else { Err(Misplaced::NotFrozen) }
    }

    /// After a Thaw, and whether it is a clone's first.
    pub fn thaw(self) -> Result<(Self, bool), Misplaced> {
        match self {
            Self::Running { .. } => Err(Misplaced::NotFrozen),
            Self::Frozen { generation } => Ok((Self::Running { generation }, false)),
            Self::Resumed { generation, clone } => Ok((Self::Running { generation }, clone)),
        }
    }
}

/// The phase, for all who go by it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    /// The newest generation that the channel can begin a session of. Where there are no sessions, every one.
    channel: watch::Sender<u64>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        let phase = Phase::Running { generation: FIRST_GENERATION };
        Self { phase: watch::Sender::new(phase), channel: watch::Sender::new(u64::MAX) }
    }
}

impl Lifecycle {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes to another phase.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Waits for the phase that `wanted` is about.
    pub async fn wait_for(&self, mut wanted: impl FnMut(Phase) -> bool) -> Phase {
        let mut phases = self.phase.subscribe();
        let found = phases.wait_for(|phase| wanted(*phase)).await.map(|phase| *phase);
        // An error cannot be: `self` holds the sender.
        found.unwrap_or_else(|_| self.phase())
    }

    /// Waits until the machine is in another life than `generation`.
    pub async fn ended(&self, generation: u64) {
        self.wait_for(|phase| phase.generation() != generation).await;
    }

    /// The channel can begin a session of this generation, and of none above.
    pub(crate) fn channel_is_ready(&self, generation: u64) {
        self.channel.send_replace(generation);
    }

    /// Waits until the channel can begin a session of `generation`.
    pub(crate) async fn wait_channel(&self, generation: u64) {
        // An error cannot be: `self` holds the sender.
        let _ = self.channel.subscribe().wait_for(|ready| *ready >= generation).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: Phase = Phase::Running { generation: 5 };
    const FROZEN: Phase = Phase::Frozen { generation: 5 };
    const RESUMED: Phase = Phase::Resumed { generation: 5, clone: false };
    const CLONED: Phase = Phase::Resumed { generation: 5, clone: true };

    #[test]
    fn every_edge() {
        let old = |given| Err(Misplaced::OldGeneration { current: 5, given });
        assert_eq!(RUNNING.freeze(), Ok(FROZEN));
        assert_eq!(RUNNING.resume(6, true), Err(Misplaced::NotFrozen));
        assert_eq!(RUNNING.thaw(), Err(Misplaced::NotFrozen));
        assert_eq!(RUNNING.rehearse(), Err(Misplaced::NotFrozen));
        for frozen in [FROZEN, RESUMED, CLONED] {
            assert!(frozen.is_frozen());
            assert_eq!(frozen.freeze(), Err(Misplaced::AlreadyFrozen));
            assert_eq!(frozen.rehearse(), Ok(()));
            assert_eq!(frozen.resume(5, true), old(5));
            assert_eq!(frozen.resume(0, false), old(0));
            assert_eq!(frozen.resume(6, true), Ok(Phase::Resumed { generation: 6, clone: true }));
        }
        assert_eq!(FROZEN.resume(9, false), Ok(Phase::Resumed { generation: 9, clone: false }));
        assert_eq!(CLONED.resume(9, false), Ok(Phase::Resumed { generation: 9, clone: true }));
        assert_eq!(FROZEN.thaw(), Ok((RUNNING, false)));
        assert_eq!(RESUMED.thaw(), Ok((RUNNING, false)));
        assert_eq!(CLONED.thaw(), Ok((RUNNING, true)));
        assert!(!RUNNING.is_frozen());
    }
}
