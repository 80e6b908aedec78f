//! A sandbox's start: from what was asked for to a record that says `Running`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use sandbox_folder::spec::SandboxSpec;
use sandbox_folder::{SandboxId, Start};
use template::{Machine, TemplateFolder};
use tokio_util::sync::CancellationToken;

use super::admission::Admitted;
use super::keeper::{Keeper, Life, Next, clear};
use super::{
    Came, NewSandbox, Sandbox, Shared, check_env, did_not_start, end_after, lookup, need, nobody_waits, pool,
    snapshots,
};
use crate::ApiError;
use crate::config::{Capacity, Config};
use crate::identity::generate_token;
use crate::store::{LifePolicy, SandboxRecord, Stage, Team};

/// What a sandbox starts from.
#[derive(Debug)]
pub(super) struct Source {
    /// The template's name, or the snapshot's id.
    pub(super) id: String,
    /// What people call it.
    pub(super) alias: String,
    pub(super) path: PathBuf,
    pub(super) machine: Machine,
    /// What a template is now; empty for a snapshot, which has no pool.
    pub(super) stamp: String,
}

impl Source {
    /// A template of the machine.
    pub(super) fn of_template(
        config: &Config,
        id: String,
        alias: String,
        folder: &TemplateFolder,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            id,
            alias,
            path: folder.path().to_owned(),
            machine: folder.template().machine,
            stamp: pool::stamp(config, folder.path()).map_err(ApiError::internal)?,
        })
    }
}

/// A start that nothing is missing for.
pub(super) struct Launch {
    pub(super) record: SandboxRecord,
    pub(super) spec: SandboxSpec,
    pub(super) admitted: Admitted,
    pub(super) timeout: Duration,
    /// Nobody waits for it any more.
    pub(super) given_up: CancellationToken,
    /// How it came, where that is more than its shim knows.
    pub(super) came: Option<Came>,
}

impl Shared {
    /// What a team calls so: a snapshot of its own, or a template of the machine.
    pub(super) async fn source(&self, team: &Team, wanted: &str) -> Result<Source, ApiError> {
        let kept = self.store.snapshot(&team.id, wanted, &snapshots::with_tag(wanted)).await?;
        let Some(path) = kept.as_ref().map(|snapshot| self.snapshot_folder(&snapshot.id)) else {
            let lookup::Found { id, alias, folder } =
                lookup::find(&self.config, &self.store, team, wanted).await?;
            let config = self.config.clone();
            let look = move || Source::of_template(&config, id, alias, &folder);
            return tokio::task::spawn_blocking(look).await.map_err(ApiError::internal)?;
        };
        let wanted = wanted.to_owned();
        let find = move || match TemplateFolder::open(&path) {
            Ok(folder) => {
                let machine = folder.template().machine;
                Ok(Source { id: file_name(&path), alias: wanted, path, machine, stamp: String::new() })
            }
            Err(template::Error::Missing { .. }) => {
                let message = format!("the snapshot {wanted:?} was deleted just now");
                Err(ApiError::new(StatusCode::NOT_FOUND, message))
            }
            Err(error) => Err(ApiError::internal(error)),
        };
        tokio::task::spawn_blocking(find).await.map_err(ApiError::internal)?
    }

    pub(super) async fn create(
        self: Arc<Self>,
        team: Team,
        request: NewSandbox,
        given_up: CancellationToken,
    ) -> Result<Arc<Sandbox>, ApiError> {
        check_env(&request.env)?;
        let source = self.source(&team, &request.template).await?;
        if let Some(taken) = self.take_parked(&team, &source, &request, &given_up).await? {
            return Ok(taken);
        }
        let room =
            Capacity { sandboxes: 1, cpus: source.machine.cpus, memory_mib: source.machine.memory_mib };
        let admitted = tokio::select! {
            admitted = self.admit(&team, room) => admitted?,
            () = given_up.cancelled() => return Err(nobody_waits()),
        };
        let id = SandboxId::generate_here().map_err(ApiError::internal)?;
        let record = new_record(&team, id, &source, &request)?;
        let spec = self.spec(&record, &source.path, request.env);
        self.launch(Launch { record, spec, admitted, timeout: request.timeout, given_up, came: None }).await
    }

    /// Starts a shim and waits for its sandbox; whatever goes wrong, nothing of it is left.
    pub(super) async fn launch(self: Arc<Self>, launch: Launch) -> Result<Arc<Sandbox>, ApiError> {
        let Launch { mut record, spec, admitted, timeout, given_up, came } = launch;
        let id = record.id.clone();
        let dir = self.config.data.sandboxes().join(id.as_str());
        self.store.put_sandbox(&record).await.map_err(ApiError::internal)?;
        let (mut shim, stdout) = match self.start(&dir, spec, false).await {
            Ok(started) => started,
            Err(error) => {
                if let Err(error) = clear(&self.store, &dir, &id).await {
                    tracing::error!(sandbox = %id, %error, "a sandbox that did not start cannot be forgotten");
                }
                return Err(did_not_start(&id, error));
            }
        };
        let ready = tokio::select! {
            ready = shim.ready(stdout) => ready.map_err(|error| did_not_start(&id, error)),
            () = given_up.cancelled() => Err(nobody_waits()),
        };
        let mut how = Came::Booted;
        let kept = match ready {
            Ok(ready) => {
                let now = Timestamp::now();
                let (start, why) = (ready.start.map(Start::name), ready.booted_because);
                tracing::info!(sandbox = %id, template = %record.template, start, why, "a sandbox is ready");
                how = match ready.start {
                    Some(Start::Cloned) => came.unwrap_or(Came::Restored),
                    Some(Start::Booted | Start::Resumed) | None => Came::Booted,
                };
                record.stage = Stage::Running;
                record.agent_version = ready.agent_version.unwrap_or_default();
                record.started_at = now;
                record.end_at = end_after(now, timeout).unwrap_or(record.end_at);
                self.store.put_sandbox(&record).await.map_err(ApiError::internal)
            }
            Err(error) => Err(error),
        };
        let sandbox = Arc::new(Sandbox::new(dir, record));
        let life = Life::Awake { shim, _admitted: admitted };
        let keeper = Keeper::new(Arc::clone(&self), Arc::clone(&sandbox), life)
            .ok_or_else(|| ApiError::internal("a fresh sandbox has a keeper"))?;
        if let Err(error) = kept {
            tokio::spawn(keeper.finish());
            // The cause is told, whatever became of the cleaning up: that goes on.
            let _ = sandbox.ended_or_failed().await;
            return Err(error);
        }
        self.came(how);
        self.sandboxes().insert(id, Arc::clone(&sandbox));
        tokio::spawn(keeper.run(Next::Keep));
        if given_up.is_cancelled() {
            sandbox.kill.notify_one();
        }
        Ok(sandbox)
    }

    /// A record of a fork of `source`, with tokens of its own.
    pub(super) fn fork_record(
        &self,
        source: &SandboxRecord,
        timeout: Duration,
    ) -> Result<SandboxRecord, ApiError> {
        let now = Timestamp::now();
        Ok(SandboxRecord {
            id: SandboxId::generate_here().map_err(ApiError::internal)?,
            stage: Stage::Starting,
            agent_version: String::new(),
            access_token: token(source.access_token.is_some())?,
            traffic_token: token(source.traffic_token.is_some())?,
            started_at: now,
            end_at: end_after(now, timeout)?,
            life: LifePolicy { timeout_s: timeout.as_secs(), ..source.life },
            ..source.clone()
        })
    }

    /// Waits for room for a sandbox with a record.
    pub(super) async fn admit_record(
        &self,
        team: &Team,
        record: &SandboxRecord,
    ) -> Result<Admitted, ApiError> {
        self.admit(team, need(record)).await
    }
}

/// The record of a sandbox that is about to start.
pub(super) fn new_record(
    team: &Team,
    id: SandboxId,
    source: &Source,
    request: &NewSandbox,
) -> Result<SandboxRecord, ApiError> {
    let now = Timestamp::now();
    Ok(SandboxRecord {
        id,
        team: team.id.clone(),
        stage: Stage::Starting,
        template: source.id.clone(),
        alias: Some(source.alias.clone()),
        metadata: request.metadata.clone(),
        cpus: source.machine.cpus,
        memory_mib: source.machine.memory_mib,
        disk_mib: source.machine.disk_mib,
        agent_version: String::new(),
        access_token: token(request.secure)?,
        traffic_token: token(!request.public_traffic)?,
        started_at: now,
        end_at: end_after(now, request.timeout)?,
        life: LifePolicy { timeout_s: request.timeout.as_secs(), ..request.life },
    })
}

fn token(wanted: bool) -> Result<Option<String>, ApiError> {
    wanted.then(generate_token).transpose().map_err(ApiError::internal)
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
