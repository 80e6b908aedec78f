//! A keeper's way from awake to asleep and back.
//!
//! ```text
//! Running ─► record: Pausing ─► POST /pause ─► the shim is gone ─► record: Paused      room on the machine is free
//!   ▲             └ refused: record: Running
//!   └── record: Running ◄── ready ◄── shim: run --resume ◄── record: Resuming ◄── admitted ◄── Paused
//! ```
//!
//! `DIR/snapshot` is whole or absent, and is used up before a resumed sandbox is ready: with it nothing is lost, whoever is
//! killed at whichever moment; without it and without a shim nothing is left.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use sandbox_folder::SNAPSHOT;
use sandbox_folder::api::ApiError as ShimError;

use super::disk::{self, Held};
use super::keeper::{Keeper, Life, Next};
use super::orders::Order;
use super::shim::{Ready, Shim, StartError};
use super::{Came, Sandbox, Shared, did_not_start, folder, need};
use crate::ApiError;
use crate::store::{SandboxRecord, Stage, Team};

/// Until a shim has written a sandbox down: RAM of some GiB to a slow disk takes minutes.
const PAUSE_DEADLINE: Duration = Duration::from_secs(600);

/// Until a shim is gone that has said that its sandbox is paused: it only frees the memory.
const GONE_DEADLINE: Duration = Duration::from_secs(60);

/// Until a shim that was left half-way by an earlier gateway runs its sandbox, or has ended: as long as a start may take.
const SETTLE_DEADLINE: Duration = Duration::from_secs(480);

/// How often its state is asked for meanwhile: its line of readiness goes to a gateway that is no more.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What became of a sandbox that was to be paused or resumed.
enum Outcome {
    Runs,
    Paused,
    Dead,
}

impl Keeper {
    /// Pauses the sandbox; whether it is paused.
    pub(super) async fn pause(&mut self, order: Option<Order>) -> (Next, bool) {
        let Life::Awake { .. } = &self.life else {
            answer(order, Ok(false));
            return (Next::Keep, true);
        };
        let (next, done) = self.try_pause().await;
        let paused = done.is_ok();
        if let Err(error) = &done {
            tracing::warn!(sandbox = %self.sandbox.id(), %error, "a sandbox was not paused");
        }
        answer(order, done.map(|()| true));
        (next, paused)
    }

    async fn try_pause(&mut self) -> (Next, Result<(), ApiError>) {
        let (sandbox, shared) = (Arc::clone(&self.sandbox), Arc::clone(&self.shared));
        let Life::Awake { shim, .. } = &mut self.life else { return (Next::Keep, Ok(())) };
        let ready = async {
            let team = shared.team(&sandbox.record()).await?;
            let held = shared.disk.reserve(&team, sandbox.record().memory_mib, "this sandbox")?;
            sandbox.change(&shared, |record| record.stage = Stage::Pausing).await?;
            Ok::<_, ApiError>(held)
        };
        let held = match ready.await {
            Ok(held) => held,
            Err(error) => {
                // It may be called `Pausing` because its time is up.
                sandbox.set_stage(Stage::Running);
                return (Next::Keep, Err(error));
            }
        };
        let api = sandbox.api();
        let asked = tokio::select! {
            biased;
            () = sandbox.kill.notified() => return (Next::End, Err(ApiError::no_sandbox(sandbox.id().as_str()))),
            asked = tokio::time::timeout(PAUSE_DEADLINE, api.pause()) => asked,
        };
        let (outcome, refusal) = match asked {
            Ok(Ok(taken)) => {
                tracing::info!(sandbox = %sandbox.id(), ?taken, "a sandbox is paused");
                match tokio::time::timeout(GONE_DEADLINE, shim.ended()).await {
                    Ok(_) => (became(&sandbox), None),
                    // It has nothing more to lose.
                    Err(_) => match shim.end().await {
                        Ok(()) => (became(&sandbox), None),
                        Err(error) => return (Next::End, Err(ApiError::internal(error))),
                    },
                }
            }
            Ok(Err(error)) => (look(&sandbox, shim).await, Some(refused(&sandbox, &error))),
            Err(_) => {
                let reason = format!("not done within {} s", PAUSE_DEADLINE.as_secs());
                (look(&sandbox, shim).await, Some(ApiError::internal(reason)))
            }
        };
        match outcome {
            Outcome::Paused => {
                let kept = self.fall_asleep(held).await;
                (Next::Keep, kept)
            }
            Outcome::Runs => {
                if let Err(error) = sandbox.change(&shared, |record| record.stage = Stage::Running).await {
                    tracing::warn!(sandbox = %sandbox.id(), %error, "it is not noted that a sandbox goes on");
                    sandbox.set_stage(Stage::Running);
                }
                let error = refusal.unwrap_or_else(|| ApiError::internal("a paused sandbox goes on"));
                (Next::Keep, Err(error))
            }
            Outcome::Dead => {
                let error = refusal.unwrap_or_else(|| ApiError::internal("a paused sandbox has no snapshot"));
                (Next::End, Err(error))
            }
        }
    }

    /// From a shim that is gone and a whole snapshot to a sandbox that is asleep.
    async fn fall_asleep(&mut self, mut held: Held) -> Result<(), ApiError> {
        held.settle(size(&self.sandbox).await);
        // The room is free before anybody hears of it.
        self.life = Life::Asleep { _held: held };
        let now = Timestamp::now();
        let kept = self.sandbox.change(&self.shared, |record| {
            record.stage = Stage::Paused;
            record.end_at = now;
        });
        match kept.await {
            // A later start finds it so, from its folder.
            Err(_) => {
                self.sandbox.set_stage(Stage::Paused);
                Ok(())
            }
            done => done,
        }
    }

    /// Lets the sandbox go on.
    pub(super) async fn resume(&mut self, order: Order) -> Next {
        let Order::Resume { wish, .. } = &order else { return Next::Keep };
        let wish = *wish;
        if matches!(self.life, Life::Awake { .. }) {
            order.answer(Ok(false));
            return Next::Keep;
        }
        let (next, done) = self.try_resume(wish).await;
        if let Err(error) = &done {
            tracing::warn!(sandbox = %self.sandbox.id(), %error, "a sandbox was not resumed");
            // Whoever came meanwhile has shared this try.
            while let Ok(waiting) = self.orders.try_recv() {
                match waiting {
                    Order::Resume { .. } => waiting.answer(Err(error.clone())),
                    Order::Pause(_) => waiting.answer(Ok(false)),
                }
            }
        }
        order.answer(done.map(|()| true));
        next
    }

    async fn try_resume(&mut self, wish: super::Resume) -> (Next, Result<(), ApiError>) {
        let (sandbox, shared) = (Arc::clone(&self.sandbox), Arc::clone(&self.shared));
        let killed = || (Next::End, Err(ApiError::no_sandbox(sandbox.id().as_str())));
        let admit = async {
            let team = shared.team(&sandbox.record()).await?;
            shared.admit(&team, need(&sandbox.record())).await
        };
        let admitted = tokio::select! {
            biased;
            () = sandbox.kill.notified() => return killed(),
            admitted = admit => match admitted {
                Ok(admitted) => admitted,
                Err(error) => return (Next::Keep, Err(error)),
            },
        };
        let paused_at = sandbox.record().end_at;
        let noted = match wish.end_at() {
            Ok(end_at) => {
                let change = |record: &mut SandboxRecord| {
                    record.stage = Stage::Resuming;
                    record.end_at = end_at;
                    record.life.on_timeout = wish.on_timeout.unwrap_or(record.life.on_timeout);
                };
                sandbox.change(&shared, change).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = noted {
            return (Next::Keep, Err(error));
        }
        let (mut shim, ready) = match self.start_again().await {
            Ok(started) => started,
            Err(error) => {
                let error = did_not_start(sandbox.id(), error);
                return (self.sleep_on(paused_at).await, Err(error));
            }
        };
        let ready = tokio::select! {
            biased;
            () = sandbox.kill.notified() => {
                self.life = Life::Awake { shim, _admitted: admitted };
                return killed();
            }
            ready = shim.ready(ready) => ready,
        };
        match ready {
            Ok(Ready { start, agent_version, .. }) => {
                tracing::info!(sandbox = %sandbox.id(), ?start, "a sandbox goes on");
                self.life = Life::Awake { shim, _admitted: admitted };
                let end_at = wish.end_at().unwrap_or(sandbox.record().end_at);
                let change = |record: &mut SandboxRecord| {
                    record.stage = Stage::Running;
                    record.end_at = end_at;
                    record.agent_version = agent_version.unwrap_or_default();
                };
                shared.came(Came::Resumed);
                if let Err(error) = sandbox.change(&shared, change).await {
                    // A later start finds it so, from its shim.
                    tracing::warn!(sandbox = %sandbox.id(), %error, "it is not noted that a sandbox goes on");
                    sandbox.set_stage(Stage::Running);
                }
                (Next::Keep, Ok(()))
            }
            Err(error) => {
                let error = did_not_start(sandbox.id(), error);
                if let Err(stuck) = shim.end().await {
                    tracing::error!(sandbox = %sandbox.id(), error = %stuck, "what did not resume cannot be ended");
                    self.life = Life::Awake { shim, _admitted: admitted };
                    return (Next::End, Err(error));
                }
                match became(&sandbox) {
                    Outcome::Paused => (self.sleep_on(paused_at).await, Err(error)),
                    _ => (Next::End, Err(error)),
                }
            }
        }
    }

    async fn start_again(&self) -> Result<(Shim, tokio::process::ChildStdout), StartError> {
        let dir = self.sandbox.dir.clone();
        let folder = dir.clone();
        let stderr = tokio::task::spawn_blocking(move || folder::fresh_stderr(&folder)).await;
        let stderr = stderr
            .map_err(std::io::Error::other)
            .flatten()
            .map_err(|source| StartError::Folder { path: dir.clone(), source })?;
        let config = &self.shared.config;
        Shim::resume(config, &dir, stderr)
            .map_err(|source| StartError::Spawn { program: config.host_shim.clone(), source })
    }

    /// A resume that failed leaves it as it was.
    async fn sleep_on(&mut self, paused_at: Timestamp) -> Next {
        let change = |record: &mut SandboxRecord| {
            record.stage = Stage::Paused;
            record.end_at = paused_at;
        };
        if self.sandbox.change(&self.shared, change).await.is_err() {
            self.sandbox.set_stage(Stage::Paused);
        }
        Next::Keep
    }

    /// Waits until it is plain what an earlier gateway, or somebody else, has made of it.
    pub(super) async fn settle(&mut self) -> Next {
        let (sandbox, shared) = (Arc::clone(&self.sandbox), Arc::clone(&self.shared));
        let Life::Awake { shim, .. } = &mut self.life else { return Next::Keep };
        let outcome = tokio::select! {
            biased;
            () = sandbox.kill.notified() => return Next::End,
            outcome = look(&sandbox, shim) => outcome,
        };
        match outcome {
            Outcome::Runs => {
                if sandbox.change(&shared, |record| record.stage = Stage::Running).await.is_err() {
                    sandbox.set_stage(Stage::Running);
                }
                Next::Keep
            }
            Outcome::Paused => {
                let held = shared.disk.count(&sandbox.record().team, 0);
                // Always noted, in the folder at least.
                let _ = self.fall_asleep(held).await;
                Next::Keep
            }
            Outcome::Dead => Next::End,
        }
    }
}

impl Shared {
    /// The team of a sandbox.
    pub(super) async fn team(&self, record: &SandboxRecord) -> Result<Team, ApiError> {
        let found = self.store.team(&record.team).await?;
        found.ok_or_else(|| ApiError::internal(format!("the team {} is gone", record.team)))
    }
}

impl Sandbox {
    /// Changes its record, on disk and here.
    pub(super) async fn change(
        &self,
        shared: &Shared,
        change: impl FnOnce(&mut SandboxRecord),
    ) -> Result<(), ApiError> {
        let _changing = self.changing.lock().await;
        let mut record = self.record();
        change(&mut record);
        shared.store.put_sandbox(&record).await?;
        self.set(record);
        Ok(())
    }
}

/// Bytes that a paused sandbox takes.
pub(super) async fn size(sandbox: &Sandbox) -> u64 {
    let snapshot = sandbox.dir.join(SNAPSHOT);
    let size = tokio::task::spawn_blocking(move || disk::used(&snapshot)).await;
    match size.map_err(std::io::Error::other).flatten() {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::warn!(sandbox = %sandbox.id(), %error, "the size of a paused sandbox is not known");
            0
        }
    }
}

fn answer(order: Option<Order>, done: Result<bool, ApiError>) {
    if let Some(order) = order {
        order.answer(done);
    }
}

/// What a sandbox is whose shim is gone.
fn became(sandbox: &Sandbox) -> Outcome {
    if folder::is_paused(&sandbox.dir) { Outcome::Paused } else { Outcome::Dead }
}

/// Waits until a shim says that its sandbox runs, or has ended.
async fn look(sandbox: &Sandbox, shim: &mut Shim) -> Outcome {
    let api = sandbox.api();
    let runs = async {
        loop {
            let info = api.info().await;
            if info.is_ok_and(|info| info["phase"] == "running") {
                return;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        _ = shim.ended() => became(sandbox),
        () = runs => Outcome::Runs,
        () = tokio::time::sleep(SETTLE_DEADLINE) => Outcome::Dead,
    }
}

/// Why a shim did not do what it was asked for.
pub(super) fn refused(sandbox: &Sandbox, error: &ShimError) -> ApiError {
    let id = sandbox.id();
    match error {
        ShimError::Refused { status, message } => {
            let status = match *status {
                // 409 means to clients that it is paused already.
                StatusCode::CONFLICT => StatusCode::BAD_REQUEST,
                StatusCode::INSUFFICIENT_STORAGE => StatusCode::INSUFFICIENT_STORAGE,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            ApiError::new(status, format!("Sandbox \"{id}\": {message}"))
        }
        other => {
            tracing::error!(sandbox = %id, error = %other, "a shim did not answer");
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("Sandbox \"{id}\" did not answer"))
        }
    }
}
