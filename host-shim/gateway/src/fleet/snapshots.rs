//! Teams' snapshots: templates of their own, made of a sandbox that goes on.
//!
//! ```text
//! sandboxes/ID/fork-…   written by the shim: it goes with the sandbox, whoever is killed
//!      │ rename
//! snapshots/ID          without a record: swept by the next start
//!      │ record         from now on it is the team's
//! ```
//!
//! A delete goes the other way: record, then folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};

use jiff::Timestamp;
use sandbox_folder::SandboxId;
use template::TemplateName;

use super::disk::{self, Held};
use super::fork::Written;
use super::sleep::refused;
use super::{Fleet, Sandbox, Shared, must_run};
use crate::ApiError;
use crate::identity::TeamId;
use crate::store::SnapshotRecord;

/// The tag of a name that has no other.
const DEFAULT_TAG: &str = "default";

/// What snapshots' ids begin with, where sandboxes have their node.
const ID_PREFIX: &str = "sna";

/// A name as it is kept: with a tag.
pub(super) fn with_tag(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { format!("{name}:{DEFAULT_TAG}") }
}

/// Checks a snapshot's name, `NAME` or `NAME:TAG`; gives it with its tag.
pub(crate) fn parse_name(name: &str) -> Result<(TemplateName, String), ApiError> {
    let kept = with_tag(name);
    let parse = |text: &str| {
        text.parse::<TemplateName>().map_err(|error| {
            ApiError::bad_request(format!("invalid name of a snapshot, expected NAME or NAME:TAG: {error}"))
        })
    };
    let (plain, tag) = kept.split_once(':').unwrap_or((&kept, DEFAULT_TAG));
    let plain = parse(plain)?;
    parse(tag)?;
    Ok((plain, kept))
}

impl Fleet {
    /// Makes a snapshot of a running sandbox, which goes on. A name that another snapshot of the team has is this one's then.
    pub async fn snapshot(
        &self,
        sandbox: &Arc<Sandbox>,
        name: Option<&str>,
    ) -> Result<SnapshotRecord, ApiError> {
        must_run(sandbox)?;
        let name = name.map(parse_name).transpose()?;
        if let Some((plain, _)) = &name
            && self.shared.config.data.templates().join(plain.as_str()).exists()
        {
            let message =
                format!("{plain:?} is the name of a template: take another one", plain = plain.as_str());
            return Err(ApiError::bad_request(message));
        }
        let work = Arc::clone(&self.shared).take(Arc::clone(sandbox), name.map(|(_, kept)| kept));
        // On a task of its own: what was begun is finished, also when the client goes away.
        tokio::spawn(work).await.map_err(ApiError::internal)?
    }

    /// A team's snapshots, in the order in which they were made.
    pub async fn snapshots(&self, team: &TeamId) -> Result<Vec<SnapshotRecord>, ApiError> {
        let mut all = self.shared.store.snapshots().await?;
        all.retain(|snapshot| snapshot.team == *team);
        all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(all)
    }

    /// Deletes a team's snapshot, by its id or name. Sandboxes that were started from it go on. Whether there was one.
    pub async fn delete_snapshot(&self, team: &TeamId, wanted: &str) -> Result<bool, ApiError> {
        let found = self.shared.store.snapshot(team, wanted, &with_tag(wanted)).await?;
        let Some(snapshot) = found else { return Ok(false) };
        let shared = Arc::clone(&self.shared);
        let work = async move {
            if !shared.store.remove_snapshot(&snapshot.id).await? {
                return Ok(false);
            }
            let folder = shared.snapshot_folder(&snapshot.id);
            let removed = tokio::task::spawn_blocking(move || fs::remove_dir_all(folder)).await;
            if let Err(error) = removed.map_err(io::Error::other).flatten() {
                tracing::error!(snapshot = %snapshot.id, %error, "a snapshot's folder stays until the next start");
            }
            shared.held().remove(&snapshot.id);
            Ok(true)
        };
        tokio::spawn(work).await.map_err(ApiError::internal)?
    }
}

impl Shared {
    /// Where a snapshot is.
    pub(super) fn snapshot_folder(&self, id: &SandboxId) -> PathBuf {
        folder_of(self).join(id.as_str())
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Held>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(
        self: Arc<Self>,
        sandbox: Arc<Sandbox>,
        name: Option<String>,
    ) -> Result<SnapshotRecord, ApiError> {
        let record = sandbox.record();
        let team = self.team(&record).await?;
        let mut held = self.disk.reserve(&team, record.memory_mib, "a snapshot")?;
        let written = Written::new(&sandbox)?;
        sandbox.api().snapshot(&written.0).await.map_err(|error| refused(&sandbox, &error))?;
        let id = SandboxId::generate(ID_PREFIX).map_err(ApiError::internal)?;
        let (from, to) = (written.0.clone(), self.snapshot_folder(&id));
        let moved = tokio::task::spawn_blocking(move || {
            move_folder(&from, &to)?;
            disk::used(&to)
        });
        let disk_bytes = moved.await.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
        held.settle(disk_bytes);
        let snapshot = SnapshotRecord {
            id: id.clone(),
            team: team.id,
            name,
            sandbox: record.id,
            created_at: Timestamp::now(),
            disk_bytes,
        };
        if let Err(error) = self.store.put_snapshot(&snapshot).await {
            let folder = self.snapshot_folder(&id);
            drop(tokio::task::spawn_blocking(move || fs::remove_dir_all(folder)));
            return Err(error.into());
        }
        self.held().insert(id, held);
        Ok(snapshot)
    }

    /// Counts the snapshots of an earlier gateway, and removes what it has left half-way.
    pub(super) async fn recover_snapshots(&self) -> Result<(), super::OpenError> {
        let mut known = BTreeSet::new();
        for snapshot in self.store.snapshots().await? {
            if self.snapshot_folder(&snapshot.id).exists() {
                self.held().insert(snapshot.id.clone(), self.disk.count(&snapshot.team, snapshot.disk_bytes));
                known.insert(snapshot.id.to_string());
            } else {
                tracing::error!(snapshot = %snapshot.id, "forgetting a snapshot whose folder is gone");
                self.store.remove_snapshot(&snapshot.id).await?;
            }
        }
        let folder = folder_of(self);
        let path = folder.clone();
        let swept = tokio::task::spawn_blocking(move || sweep(&folder, &known)).await;
        let swept = swept.map_err(io::Error::other).flatten();
        swept.map_err(|source| super::OpenError::Io { path, source })
    }
}

fn folder_of(shared: &Shared) -> PathBuf {
    shared.config.data.path().join("snapshots")
}

/// Moves a whole folder, durably. Snapshots hold their tenants' data: nobody else may look in.
fn move_folder(from: &Path, to: &Path) -> io::Result<()> {
    let parent = to.parent().unwrap_or(to);
    DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    fs::rename(from, to)?;
    File::open(parent)?.sync_all()
}

fn sweep(folder: &Path, known: &BTreeSet<String>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !known.contains(&*entry.file_name().to_string_lossy()) {
            tracing::info!(path = %entry.path().display(), "swept a snapshot that nobody has");
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_tag() {
        for (name, plain, kept) in [("a", "a", "a:default"), ("a-1:v2", "a-1", "a-1:v2")] {
            let parsed = parse_name(name).unwrap();
            assert_eq!((parsed.0.as_str(), parsed.1.as_str()), (plain, kept));
        }
        for bad in ["", "A", "a:", ":a", "a:b:c", "../x", "a/b", &"x".repeat(200)] {
            assert_eq!(parse_name(bad).unwrap_err().status.as_u16(), 400, "{bad}");
        }
    }
}
