//! The life of a sandbox, as pure transitions.
//!
//! ```text
//!                                           ┌──parked──► Parked ──configured──┐
//! Created ──spawned──► Booting ──hello──► Ready ─────────configured────────► Running ◄─not paused─ Pausing
//!    │                    │                 │                                 │  └─────pause────────▲ │
//!    │                    ├─────────────────┴──────────────stop───────────────┤                       │paused
//!    │                    │                                                   ▼                       ▼
//!    │                    │                                                Stopping                 Paused
//!    └───────ended────────┴───────────────────────ended───────────────────────┴──► Ended
//! ```
//!
//! A restored sandbox takes the same way: its agent's Hello is the one after the Resume. A paused one begins anew, in
//! another process.

use serde::{Deserialize, Serialize};

use crate::SandboxId;

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lifecycle {
    /// The folder is there, no VMM yet.
    Created,
    /// The VMM runs, the agent has not spoken yet.
    Booting,
    /// The agent has said Hello; client calls are still refused.
    Ready,
    /// Restored and rehearsed, its processes held: it waits for a Configure.
    Parked,
    /// Configured: somebody's sandbox.
    Running,
    /// It is held still while its snapshot is written.
    Pausing,
    /// Its snapshot is whole, and nothing of it runs: it can be resumed.
    Paused,
    /// Its end was asked for.
    Stopping,
    /// Nothing of it runs any more.
    Ended,
}

/// What moves a sandbox through its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The VMM was started.
    Spawned,
    /// The agent's Hello arrived.
    Hello,
    /// The agent acknowledged the Configure.
    Configured,
    /// It waits for somebody.
    Parked,
    /// The caller wants it to be paused.
    Pause,
    /// Its snapshot could not be written: it goes on.
    NotPaused,
    /// Its snapshot is whole, and its VMM is gone.
    Paused,
    /// The caller wants it to end.
    Stop,
    /// The VMM is gone, or was never started.
    Ended,
}

/// The event does not fit the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} cannot happen to a sandbox that is {state:?}")]
pub struct InvalidTransition {
    /// Where the sandbox is.
    pub state: Lifecycle,
    /// What happened.
    pub event: Event,
}

impl Lifecycle {
    /// Whether nothing of it runs any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Paused | Self::Ended)
    }

    /// The state after `event`.
    pub fn after(self, event: Event) -> Result<Self, InvalidTransition> {
        match (self, event) {
            (Self::Created, Event::Spawned) => Ok(Self::Booting),
            (Self::Booting, Event::Hello) => Ok(Self::Ready),
            (Self::Ready, Event::Parked) => Ok(Self::Parked),
            (Self::Ready | Self::Parked, Event::Configured) => Ok(Self::Running),
            (Self::Running, Event::Pause) => Ok(Self::Pausing),
            (Self::Pausing, Event::NotPaused) => Ok(Self::Running),
            (Self::Pausing, Event::Paused) => Ok(Self::Paused),
            (
                Self::Booting | Self::Ready | Self::Parked | Self::Running | Self::Pausing | Self::Stopping,
                Event::Stop,
            ) => Ok(Self::Stopping),
            (state, Event::Ended) if !state.is_over() => Ok(Self::Ended),
            (state, event) => Err(InvalidTransition { state, event }),
        }
    }
}

/// Why a sandbox ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum End {
    /// Its end was asked for, and came.
    Stopped,
    /// Its command ended (`run TEMPLATE -- CMD`).
    CommandExited {
        /// The exit code, 128 + n for signal n.
        code: u8,
    },
    /// The guest powered itself off, or crashed.
    GuestEnded {
        /// What the VMM's exit and the console say.
        message: String,
    },
    /// It never became ready, or the shim failed.
    Failed {
        /// The error, as the user saw it.
        message: String,
    },
    /// The shim was killed; its VMM died with it.
    ShimKilled,
}

/// The contents of `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_VERSION`].
    pub schema_version: u32,
    /// The sandbox.
    pub id: SandboxId,
    /// Where it is in its life.
    pub phase: Lifecycle,
    /// The process that owns the folder.
    pub shim_pid: u32,
    /// The VMM, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// `kvm` or `tcg`, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// The kind of channel, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// The agent's version, once it spoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// How it came to life, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Why it was booted although it could have been restored, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted_because: Option<String>,
    /// The machine's life: 1 after a boot, each restore raises it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// What took how long.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// The caller's notes.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// How a sandbox came to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Its kernel was booted.
    Booted,
    /// It is a clone of a snapshot.
    Cloned,
    /// It goes on where it was paused.
    Resumed,
}

impl Start {
    /// Its name in `state.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Booted => "booted",
            Self::Cloned => "cloned",
            Self::Resumed => "resumed",
        }
    }
}

/// The version of `state.json`.
pub const STATE_VERSION: u32 = 1;

/// A phase of a sandbox's start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done. The agent's phases begin with `agent.`.
    pub name: String,
    /// Milliseconds that it took.
    pub ms: f64,
}

#[cfg(test)]
mod tests {
    use super::Event::{Configured, Ended as End, Hello, NotPaused, Pause, Spawned, Stop};
    use super::Lifecycle::{Booting, Created, Ended, Parked, Paused, Pausing, Ready, Running, Stopping};
    use super::*;

    #[test]
    fn every_edge_and_nothing_else() {
        let edges = [
            (Created, Spawned, Booting),
            (Created, End, Ended),
            (Booting, Hello, Ready),
            (Booting, Stop, Stopping),
            (Booting, End, Ended),
            (Ready, Event::Parked, Parked),
            (Ready, Configured, Running),
            (Ready, Stop, Stopping),
            (Ready, End, Ended),
            (Parked, Configured, Running),
            (Parked, Stop, Stopping),
            (Parked, End, Ended),
            (Running, Pause, Pausing),
            (Running, Stop, Stopping),
            (Running, End, Ended),
            (Pausing, NotPaused, Running),
            (Pausing, Event::Paused, Paused),
            (Pausing, Stop, Stopping),
            (Pausing, End, Ended),
            (Stopping, Stop, Stopping),
            (Stopping, End, Ended),
        ];
        for state in [Created, Booting, Ready, Parked, Running, Pausing, Paused, Stopping, Ended] {
            for event in
                [Spawned, Hello, Event::Parked, Configured, Pause, NotPaused, Event::Paused, Stop, End]
            {
                let expected = edges
                    .iter()
                    .find(|edge| (edge.0, edge.1) == (state, event))
                    .map(|edge| edge.2)
                    .ok_or(InvalidTransition { state, event });
                assert_eq!(state.after(event), expected);
            }
        }
    }
}
