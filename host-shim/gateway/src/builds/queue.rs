//! The queue, and what becomes of a build that has its turn.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::limits::BuildLimits;
use super::log::{BuildLog, LogEntry, LogLevel};
use super::name::{BuildId, folder};
use super::process::end_all;
use super::runner::{self, Outcome, Request, Runner};
use super::{CANCELLED, Shared, WAITING_LIFE};
use crate::ApiError;
use crate::identity::TeamId;
use crate::store::{BuildReason, BuildRecord, BuildStage, StoreError};

/// How often a build is begun that gateways did not live to see the end of. It may be what ended them.
const MAX_ATTEMPTS: u32 = 3;

/// What waits and what runs.
#[derive(Debug)]
pub(super) struct State {
    pub(super) queue: VecDeque<Queued>,
    pub(super) running: HashMap<BuildId, Running>,
}

/// A build that waits.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) record: BuildRecord,
    pub(super) limits: BuildLimits,
    /// Whether it has its place on the disk too.
    pub(super) kept: bool,
}

/// A build that runs.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) team: TeamId,
    pub(super) log: Arc<BuildLog>,
    /// Ends it.
    stop: CancellationToken,
    /// It has ended.
    gone: CancellationToken,
}

impl State {
    pub(super) fn knows(&self, build: &BuildId) -> bool {
        self.running.contains_key(build) || self.queue.iter().any(|queued| queued.record.id == *build)
    }

    pub(super) fn keep(&mut self, record: BuildRecord) {
        if let Some(queued) = self.queue.iter_mut().find(|queued| queued.record.id == record.id) {
            queued.record = record;
            queued.kept = true;
        }
    }

    pub(super) fn remove(&mut self, build: &BuildId) {
        self.queue.retain(|queued| queued.record.id != *build);
    }

    /// The first whose team does not build as much as it may.
    fn next(&mut self) -> Option<Queued> {
        let running = &self.running;
        let of_team = |team: &TeamId| running.values().filter(|one| one.team == *team).count();
        let may = |queued: &Queued| {
            queued.kept
                && of_team(&queued.record.team) < usize::try_from(queued.limits.at_once).unwrap_or(usize::MAX)
        };
        let index = self.queue.iter().position(may)?;
        self.queue.remove(index)
    }
}

impl Shared {
    /// Begins what has its turn.
    pub(super) fn schedule(self: &Arc<Self>) {
        let mut state = self.state();
        let at_once = usize::try_from(self.config.builds.at_once).unwrap_or(usize::MAX);
        while !self.closing.is_cancelled() && state.running.len() < at_once {
            let Some(Queued { record, limits, .. }) = state.next() else { return };
            let path = self.folders.builds.join(folder(&record.template, &record.id)).join(runner::LOG);
            let log = match BuildLog::open(&path) {
                Ok(log) => Arc::new(log),
                Err(error) => {
                    tracing::error!(build = %record.id, %error, "a build has no log");
                    let reason = BuildReason { message: "its log cannot be written".to_owned(), step: None };
                    let shared = Arc::clone(self);
                    self.tasks.spawn(async move {
                        let _ = shared.fail(record, reason).await;
                    });
                    continue;
                }
            };
            let stop = self.closing.child_token();
            let gone = CancellationToken::new();
            let running = Running {
                team: record.team.clone(),
                log: Arc::clone(&log),
                stop: stop.clone(),
                gone: gone.clone(),
            };
            state.running.insert(record.id.clone(), running);
            let shared = Arc::clone(self);
            self.tasks.spawn(async move {
                let id = record.id.clone();
                shared.build(record, limits.time(), &log, &stop).await;
                shared.state().running.remove(&id);
                // Before whoever waits for its end is told: a sweep of theirs finds it ended.
                gone.cancel();
                shared.sweep().await;
                shared.schedule();
            });
        }
    }

    /// Builds, and keeps what came of it.
    async fn build(&self, mut record: BuildRecord, time: Duration, log: &BuildLog, stop: &CancellationToken) {
        let again = record.attempts > 0;
        record.attempts += 1;
        record.stage = BuildStage::Building;
        match self.store.put_build(&record).await {
            Ok(true) => {}
            // Deleted meanwhile.
            Ok(false) => return,
            Err(error) => {
                tracing::error!(build = %record.id, %error, "a build cannot be begun; the next start tries again");
                return;
            }
        }
        if again {
            log.add(&LogEntry::new(LogLevel::Warn, "the gateway was restarted; the build begins again"));
        }
        tracing::info!(build = %record.id, template = %record.template, team = %record.team, "building");
        let dir = self.folders.builds.join(folder(&record.template, &record.id));
        let runner = Runner { config: &self.config, record: &record, dir: dir.clone(), log, stop };
        let mut late = false;
        let outcome = {
            let mut run = std::pin::pin!(runner.run());
            tokio::select! {
                outcome = &mut run => outcome,
                () = tokio::time::sleep(time) => {
                    late = true;
                    stop.cancel();
                    run.await
                }
            }
        };
        let reason = match outcome {
            Outcome::Ready(digest) => {
                record.digest = digest;
                self.publish(record, log, &dir).await;
                return;
            }
            Outcome::Failed(reason) => reason,
            // The next gateway begins it again.
            Outcome::Stopped if self.closing.is_cancelled() => return,
            Outcome::Stopped if late => {
                let message =
                    format!("the build took longer than {} minutes, and was ended", time.as_secs() / 60);
                BuildReason { message, step: None }
            }
            Outcome::Stopped => BuildReason { message: CANCELLED.to_owned(), step: None },
        };
        log.end(&of(&reason));
        if let Err(error) = self.put_failed(record, reason).await {
            tracing::error!(%error, "a build's end cannot be kept; the next start begins it again");
        }
    }

    async fn publish(&self, mut record: BuildRecord, log: &BuildLog, dir: &std::path::Path) {
        record.stage = BuildStage::Ready;
        record.finished_at = Some(Timestamp::now());
        // Before it is ready: clients read no more once they have an empty page.
        log.end(&LogEntry::new(LogLevel::Info, "the template is ready"));
        match self.store.publish_build(&record).await {
            Ok(true) => {
                tracing::info!(build = %record.id, template = %record.template, "a template is ready")
            }
            Ok(false) => tracing::info!(build = %record.id, "a template is ready that nobody wants any more"),
            Err(error) => {
                tracing::error!(build = %record.id, %error, "a build's end cannot be kept; the next start begins it again");
                return;
            }
        }
        Request::forget(dir);
    }

    /// Keeps that a build which does not run has failed, and tells its log.
    pub(super) async fn fail(&self, record: BuildRecord, reason: BuildReason) -> Result<(), ApiError> {
        let path = self.folders.builds.join(folder(&record.template, &record.id)).join(runner::LOG);
        if let Ok(log) = BuildLog::open(&path) {
            log.end(&of(&reason));
        }
        self.state().remove(&record.id);
        Ok(self.put_failed(record, reason).await?)
    }

    async fn put_failed(&self, mut record: BuildRecord, reason: BuildReason) -> Result<(), StoreError> {
        tracing::info!(build = %record.id, template = %record.template, reason = reason.message, "a build has failed");
        record.stage = BuildStage::Error;
        record.finished_at = Some(Timestamp::now());
        record.reason = Some(reason);
        let dir = self.folders.builds.join(folder(&record.template, &record.id));
        self.store.put_build(&record).await?;
        Request::forget(&dir);
        Ok(())
    }

    /// Ends a build that waits in the queue or runs; what tells that it has ended, where it runs.
    pub(super) fn stop(&self, build: &BuildId) -> Option<CancellationToken> {
        let mut state = self.state();
        state.remove(build);
        let running = state.running.get(build)?;
        running.stop.cancel();
        Some(running.gone.clone())
    }

    /// Goes on with a build of an earlier gateway.
    pub(super) async fn recover(&self, mut record: BuildRecord) -> Result<(), StoreError> {
        match record.stage {
            BuildStage::Ready | BuildStage::Error => return Ok(()),
            BuildStage::Waiting => return Ok(()),
            BuildStage::Queued => {}
            BuildStage::Building => {
                // It may still run: two builders would write the same template.
                end_all(&record.id, self.config.builds.grace).await;
                if record.attempts >= MAX_ATTEMPTS {
                    let message = format!(
                        "the gateway ended {} times while it was building this: build again",
                        record.attempts
                    );
                    let reason = BuildReason { message, step: None };
                    if let Err(error) = self.fail(record, reason).await {
                        tracing::error!(%error, "a build's end cannot be kept");
                    }
                    return Ok(());
                }
                record.stage = BuildStage::Queued;
                self.store.put_build(&record).await?;
            }
        }
        let limits = self.store.build_limits(&record.team).await?;
        self.state().queue.push_back(Queued { record, limits, kept: true });
        Ok(())
    }

    /// Gives up builds whose clients never started them.
    pub(super) async fn expire(&self) -> Result<(), ApiError> {
        let now = Timestamp::now();
        for record in self.store.builds().await? {
            let age = now.as_second().saturating_sub(record.requested_at.as_second());
            if record.stage == BuildStage::Waiting && age > WAITING_LIFE.as_secs().cast_signed() {
                let reason = BuildReason { message: "the build was never started".to_owned(), step: None };
                self.put_failed(record, reason).await?;
            }
        }
        Ok(())
    }
}

fn of(reason: &BuildReason) -> LogEntry {
    LogEntry { step: reason.step.clone(), ..LogEntry::new(LogLevel::Error, &reason.message) }
}
