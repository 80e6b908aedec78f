//! Owns one sandbox's shim: pauses it and lets it go on, and ends it, when its time is up, when somebody wants it so, or
//! when it has died by itself.
//!
//! ```text
//!            ┌──── paused (sleep) ────┐
//!            ▼                        │
//!   Asleep ──── resumed (sleep) ──► Awake ──► finish: nothing of it is left
//!      └──────────────────────────────────────┘
//! ```
//!
//! One task does all of it, one thing after the other: what comes while it is busy waits for its turn, but for a kill.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sandbox_folder::SandboxId;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::admission::Admitted;
use super::disk::Held;
use super::orders::Order;
use super::shim::Shim;
use super::{Sandbox, Shared, folder};
use crate::ApiError;
use crate::store::{OnTimeout, Stage, Store, StoreError};

/// How soon a host's clock that was set is noticed: the end is a time of that clock.
const CLOCK_CHECK: Duration = Duration::from_secs(60);

/// Until the next try when a sandbox could not be ended, or not be paused when its time was up: its processes hang in the
/// kernel, or the disk is full.
const RETRY: Duration = Duration::from_secs(10);

/// How often it is tried to pause a sandbox whose time is up; then it is ended. In these five minutes somebody can make
/// room, and nobody gets a sandbox for ever by filling the disk.
const AUTO_PAUSES: u32 = 30;

/// The one that owns a sandbox.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) orders: mpsc::Receiver<Order>,
    pub(super) life: Life,
    failed_pauses: u32,
    next_pause: Option<Instant>,
}

/// Whether a sandbox runs.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each sandbox, and a box would save nothing while it is awake"
)]
pub(super) enum Life {
    /// It has a shim, and room on the machine.
    Awake { shim: Shim, _admitted: Admitted },
    /// It is in its folder, and takes a part of its team's disk.
    Asleep { _held: Held },
}

/// What a keeper goes on with.
#[derive(Debug)]
pub(super) enum Next {
    /// The sandbox is to be ended.
    End,
    /// Somebody wants something, or, for a pause without an order, its time is up.
    Pause(Option<Order>),
    Resume(Order),
    /// Whoever had it before has left it half-way: its shim says what became of it.
    Settle,
    /// Nothing: it is kept.
    Keep,
}

/// A sandbox could not be ended, or not be forgotten.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndError {
    #[error("its processes cannot be ended: {0}")]
    Processes(io::Error),
    #[error("its folder cannot be removed: {0}")]
    Folder(io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Keeper {
    /// The keeper of a sandbox; `None` when it has one already.
    pub(super) fn new(shared: Arc<Shared>, sandbox: Arc<Sandbox>, life: Life) -> Option<Self> {
        let orders = sandbox.take_orders()?;
        Some(Self { shared, sandbox, orders, life, failed_pauses: 0, next_pause: None })
    }

    /// Keeps the sandbox until nothing of it is left, or until the gateway ends.
    pub(super) async fn run(mut self, first: Next) {
        let closing = self.shared.closing.clone();
        tokio::select! {
            () = self.live(first) => {}
            () = closing.cancelled() => return,
        }
        self.finish().await;
    }

    /// Ends the sandbox, however often it takes.
    pub(super) async fn finish(mut self) {
        self.sandbox.set_stage(Stage::Ending);
        self.orders.close();
        while let Ok(order) = self.orders.try_recv() {
            order.answer(Err(ApiError::no_sandbox(self.sandbox.id().as_str())));
        }
        while let Err(error) = self.end().await {
            tracing::error!(sandbox = %self.sandbox.id(), %error, "a sandbox cannot be ended, which is tried again");
            self.sandbox.failed.send_replace(Some(error.to_string()));
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = self.sandbox.kill.notified() => {}
                () = self.shared.closing.cancelled() => return,
            }
        }
        self.shared.forget(self.sandbox.id());
        // The room is free before anybody hears of the end.
        drop(self.life);
        self.sandbox.gone.send_replace(true);
    }

    /// Returns when it is to be ended; from then on nobody else changes its record.
    async fn live(&mut self, first: Next) {
        let mut next = first;
        loop {
            next = match next {
                Next::Keep => self.keep().await,
                Next::Pause(order) => {
                    let by_itself = order.is_none();
                    let (next, paused) = self.pause(order).await;
                    if by_itself && !paused {
                        self.failed_pauses += 1;
                        self.next_pause = Some(Instant::now() + RETRY);
                    }
                    next
                }
                Next::Resume(order) => {
                    (self.failed_pauses, self.next_pause) = (0, None);
                    self.resume(order).await
                }
                Next::Settle => self.settle().await,
                Next::End => {
                    let _changing = self.sandbox.changing.lock().await;
                    return self.sandbox.set_stage(Stage::Ending);
                }
            }
        }
    }

    /// Waits until there is something to do.
    async fn keep(&mut self) -> Next {
        let id = self.sandbox.id().clone();
        let Life::Awake { shim, .. } = &mut self.life else {
            return tokio::select! {
                () = self.sandbox.kill.notified() => Next::End,
                Some(order) = self.orders.recv() => order.next(),
            };
        };
        loop {
            let record = self.sandbox.record();
            let left = match until(record.end_at, Timestamp::now()) {
                Some(left) => {
                    (self.failed_pauses, self.next_pause) = (0, None);
                    left.min(CLOCK_CHECK)
                }
                None => {
                    let pauses = record.life.on_timeout == OnTimeout::Pause;
                    let wait = self.next_pause.map(|at| at.saturating_duration_since(Instant::now()));
                    match wait.filter(|wait| pauses && !wait.is_zero()) {
                        Some(wait) => wait,
                        None => {
                            // On disk or nowhere: whoever moves the end at this moment comes too late, or is seen here.
                            let _changing = self.sandbox.changing.lock().await;
                            if until(self.sandbox.record().end_at, Timestamp::now()).is_some() {
                                continue;
                            }
                            let tries = self.failed_pauses;
                            if pauses && tries < AUTO_PAUSES {
                                tracing::info!(sandbox = %id, "the sandbox's time is up: it is paused");
                                self.sandbox.set_stage(Stage::Pausing);
                                return Next::Pause(None);
                            }
                            tracing::info!(sandbox = %id, tries, "the sandbox's time is up");
                            self.sandbox.set_stage(Stage::Ending);
                            return Next::End;
                        }
                    }
                }
            };
            return tokio::select! {
                how = shim.ended() => {
                    if folder::is_paused(&self.sandbox.dir) {
                        tracing::info!(sandbox = %id, how, "the sandbox was paused by somebody else");
                        return Next::Settle;
                    }
                    tracing::warn!(sandbox = %id, how, "the sandbox ended by itself");
                    Next::End
                }
                () = tokio::time::sleep(left) => continue,
                () = self.sandbox.moved.notified() => continue,
                () = self.sandbox.kill.notified() => Next::End,
                Some(order) = self.orders.recv() => order.next(),
            };
        }
    }

    async fn end(&mut self) -> Result<(), EndError> {
        let record = self.sandbox.record();
        if let Err(error) = self.shared.store.put_sandbox(&record).await {
            // Its end matters more: a later start finds a dead sandbox, and forgets it.
            tracing::warn!(sandbox = %record.id, %error, "the end of a sandbox could not be announced");
        }
        if let Life::Awake { shim, .. } = &mut self.life {
            shim.end().await.map_err(EndError::Processes)?;
        }
        clear(&self.shared.store, &self.sandbox.dir, &record.id).await
    }
}

/// Forgets a sandbox of which no process is left.
pub(super) async fn clear(store: &Store, dir: &Path, id: &SandboxId) -> Result<(), EndError> {
    folder::remove(dir).await.map_err(EndError::Folder)?;
    store.remove_sandbox(id).await?;
    Ok(())
}

/// The time left; `None` when there is none.
fn until(end_at: Timestamp, now: Timestamp) -> Option<Duration> {
    Duration::try_from(end_at.duration_since(now)).ok().filter(|left| !left.is_zero())
}
