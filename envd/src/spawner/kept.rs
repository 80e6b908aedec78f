//! A spawner that is there: made again when it dies.
//!
//! ```text
//! Up(connection) ──► its socket ends ──► Restarting ── pause, respawn ──► Up(another)
//!                            └ no way to make another: Gone
//! ```
//!
//! A start that was certainly not received goes to the next spawner; one whose answer is lost is told as such. What runs
//! goes on running, and its end is seen by its pidfd: its status is lost, since only a parent can have it. A spawner that
//! dies at once is made again ever more slowly.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Respawn;
use super::client::{Connection, LaunchError, Running};
use crate::events::{Event, Events};
use crate::pidfd;

/// The pause before the first respawn; it doubles up to [`MAX_PAUSE`] as long as spawners die young.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

const MAX_PAUSE: Duration = Duration::from_secs(10);

/// A spawner that lived as long did not die of its start.
const STABLE: Duration = Duration::from_secs(10);

/// How long a start waits for a spawner that is being made again.
const MAX_WAIT: Duration = Duration::from_secs(15);

#[derive(Clone, Debug)]
enum State {
    Up(Arc<Connection>),
    Restarting,
    Gone,
}

/// The spawner of the moment.
#[derive(Debug)]
pub(super) struct Kept {
    state: watch::Sender<State>,
    events: OnceLock<Events>,
}

impl Kept {
    pub(super) fn start(first: Arc<Connection>, respawn: Option<Respawn>) -> Arc<Self> {
        let kept = Arc::new(Self {
            state: watch::Sender::new(State::Up(Arc::clone(&first))),
            events: OnceLock::new(),
        });
        tokio::spawn(Arc::clone(&kept).keep(first, respawn.map(Arc::new)));
        kept
    }

    pub(super) fn tell(&self, events: Events) {
        // The first sandbox of an agent is its only one.
        let _ = self.events.set(events);
    }

    /// The connection to a living spawner, as far as is known; another than `dead`.
    pub(super) async fn connection(
        &self,
        dead: Option<&Arc<Connection>>,
    ) -> Result<Arc<Connection>, LaunchError> {
        let mut state = self.state.subscribe();
        let usable = state.wait_for(|state| match state {
            State::Up(connection) => dead.is_none_or(|dead| !Arc::ptr_eq(dead, connection)),
            State::Restarting => false,
            State::Gone => true,
        });
        match tokio::time::timeout(MAX_WAIT, usable).await {
            Ok(Ok(state)) => match &*state {
                State::Up(connection) => Ok(Arc::clone(connection)),
                State::Restarting | State::Gone => Err(LaunchError::Gone),
            },
            Ok(Err(_)) => Err(LaunchError::Gone),
            Err(_) => Err(LaunchError::Restarting),
        }
    }

    async fn keep(self: Arc<Self>, mut connection: Arc<Connection>, respawn: Option<Arc<Respawn>>) {
        let mut pause = Duration::ZERO;
        loop {
            let began = Instant::now();
            if let Err(error) = connection.receive_all().await {
                crate::log::warn(format_args!("the spawner's socket failed: {error}"));
            }
            let running = connection.close();
            let Some(respawn) = &respawn else {
                self.state.send_replace(State::Gone);
                return;
            };
            self.state.send_replace(State::Restarting);
            let count = running.len();
            crate::log::warn(format_args!(
                "the spawner died; {count} processes go on, their statuses are lost"
            ));
            for process in running {
                tokio::spawn(follow(process));
            }
            if began.elapsed() >= STABLE {
                pause = Duration::ZERO;
            }
            connection = loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).clamp(FIRST_PAUSE, MAX_PAUSE);
                let respawn = Arc::clone(respawn);
                let made = tokio::task::spawn_blocking(move || respawn());
                match made.await.map_err(io::Error::other).and_then(|socket| Connection::new(socket?)) {
                    Ok(connection) => break connection,
                    Err(error) => crate::log::warn(format_args!("making the spawner again: {error}")),
                }
            };
            self.state.send_replace(State::Up(Arc::clone(&connection)));
            crate::log::warn(format_args!("the spawner was made again"));
            if let Some(events) = self.events.get() {
                events.emit(Event::SpawnerRestarted);
            }
        }
    }
}

/// Waits for the end of a process whose status nobody can tell; the drop of its sender says so.
async fn follow(Running { pidfd, exited }: Running) {
    // One of its own: the readiness of a descriptor is watched once.
    let ended = async { pidfd::ended(pidfd.try_clone()?).await };
    if let Err(error) = ended.await {
        crate::log::warn(format_args!("following a process of the spawner that died: {error}"));
    }
    drop(exited);
}
