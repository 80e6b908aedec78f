//! Watches one sandbox, and ends it: when its time is up, when somebody wants it gone, when it has died by itself.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sandbox_folder::SandboxId;

use super::admission::Admitted;
use super::shim::Shim;
use super::{Sandbox, Shared, folder};
use crate::store::{Stage, Store, StoreError};

/// How soon a host's clock that was set is noticed: the end is a time of that clock.
const CLOCK_CHECK: Duration = Duration::from_secs(60);

/// Until the next try when a sandbox could not be ended: its processes hang in the kernel, or the disk is full.
const RETRY: Duration = Duration::from_secs(10);

/// The one that owns a sandbox's shim.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) shim: Shim,
    pub(super) admitted: Admitted,
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
    /// Keeps the sandbox until nothing of it is left, or until the gateway ends.
    pub(super) async fn run(mut self) {
        let closing = self.shared.closing.clone();
        tokio::select! {
            () = self.keep() => {}
            () = closing.cancelled() => return,
        }
        self.finish().await;
    }

    /// Ends the sandbox, however often it takes.
    pub(super) async fn finish(mut self) {
        self.sandbox.set_stage(Stage::Ending);
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
        drop(self.admitted);
        self.sandbox.gone.send_replace(true);
    }

    /// Returns when it is to be ended; from then on nobody else changes its record.
    async fn keep(&mut self) {
        let id = self.sandbox.id().clone();
        loop {
            let Some(left) = until(self.sandbox.record().end_at, Timestamp::now()) else {
                let _changing = self.sandbox.changing.lock().await;
                if until(self.sandbox.record().end_at, Timestamp::now()).is_some() {
                    continue;
                }
                tracing::info!(sandbox = %id, "the sandbox's time is up");
                return self.sandbox.set_stage(Stage::Ending);
            };
            tokio::select! {
                how = self.shim.ended() => {
                    tracing::warn!(sandbox = %id, how, "the sandbox ended by itself");
                    break;
                }
                () = tokio::time::sleep(left.min(CLOCK_CHECK)) => {}
                () = self.sandbox.moved.notified() => {}
                () = self.sandbox.kill.notified() => break,
            }
        }
        let _changing = self.sandbox.changing.lock().await;
        self.sandbox.set_stage(Stage::Ending);
    }

    async fn end(&mut self) -> Result<(), EndError> {
        let record = self.sandbox.record();
        if let Err(error) = self.shared.store.put_sandbox(&record).await {
            // Its end matters more: a later start finds a dead sandbox, and forgets it.
            tracing::warn!(sandbox = %record.id, %error, "the end of a sandbox could not be announced");
        }
        self.shim.end().await.map_err(EndError::Processes)?;
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
