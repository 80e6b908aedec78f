//! Forks: other sandboxes that go on from where one is, which goes on too.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sandbox_folder::SandboxId;
use sandbox_folder::spec::SandboxSpec;
use tokio_util::sync::CancellationToken;

use super::sleep::refused;
use super::start::Launch;
use super::{Came, Fleet, Sandbox, Shared, must_run};
use crate::ApiError;
use crate::store::{SandboxRecord, Team};

/// How folders begin that a sandbox wrote for the gateway. A shim that ends, or takes the folder anew, removes them: nothing
/// is left of what a killed gateway asked for.
pub(super) const WRITTEN_PREFIX: &str = "fork-";

/// Forks that start at a time; each is a process that maps the same RAM.
const AT_ONCE: usize = 8;

impl Fleet {
    /// Starts `count` sandboxes that go on from where one is. Each of them starts or fails by itself. Dropped before they have
    /// started, it ends those that begin.
    pub async fn fork(
        &self,
        sandbox: &Arc<Sandbox>,
        count: u32,
        timeout: Duration,
    ) -> Result<Vec<Result<Arc<Sandbox>, ApiError>>, ApiError> {
        must_run(sandbox)?;
        let given_up = CancellationToken::new();
        let guard = given_up.clone().drop_guard();
        let work = Arc::clone(&self.shared).fork(Arc::clone(sandbox), count, timeout, given_up);
        let made = tokio::spawn(work).await.map_err(ApiError::internal)?;
        guard.disarm();
        made
    }
}

impl Shared {
    async fn fork(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        count: u32,
        timeout: Duration,
        given_up: CancellationToken,
    ) -> Result<Vec<Result<Arc<Sandbox>, ApiError>>, ApiError> {
        let source = sandbox.record();
        let team = self.team(&source).await?;
        let _held = self.disk.reserve(&team, source.memory_mib, "a fork")?;
        let written = Written::new(&sandbox)?;
        let taken = sandbox.api().fork(&written.0).await.map_err(|error| refused(&sandbox, &error))?;
        let spec = taken.spec.ok_or_else(|| ApiError::internal("a fork without a spec"))?;
        let starts = (0..count).map(|_| {
            let (shared, given_up) = (Arc::clone(&self), given_up.clone());
            shared.fork_one(&team, &source, spec.clone(), timeout, given_up)
        });
        Ok(futures::stream::iter(starts).buffered(AT_ONCE).collect().await)
    }

    async fn fork_one(
        self: Arc<Self>,
        team: &Team,
        source: &SandboxRecord,
        spec: SandboxSpec,
        timeout: Duration,
        given_up: CancellationToken,
    ) -> Result<Arc<Sandbox>, ApiError> {
        let record = self.fork_record(source, timeout)?;
        let admitted = tokio::select! {
            admitted = self.admit_record(team, &record) => admitted?,
            () = given_up.cancelled() => return Err(super::nobody_waits()),
        };
        let mut spec = SandboxSpec {
            id: Some(record.id.clone()),
            access_token: record.access_token.clone(),
            timeout_s: None,
            ..spec
        };
        spec.env.extend(super::own_env(&record));
        self.launch(Launch { record, spec, admitted, timeout, given_up, came: Some(Came::Forked) }).await
    }
}

/// A folder that a sandbox writes for the gateway; it goes with this.
pub(super) struct Written(pub(super) PathBuf);

impl Written {
    pub(super) fn new(sandbox: &Sandbox) -> Result<Self, ApiError> {
        let random = SandboxId::generate("").map_err(ApiError::internal)?;
        Ok(Self(sandbox.dir.join(format!("{WRITTEN_PREFIX}{random}"))))
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.0);
        // Some hundred MiB of files may be in it.
        drop(tokio::task::spawn_blocking(move || match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %path.display(), "what forks were started from stays until its sandbox ends");
            }
            _ => {}
        }));
    }
}
