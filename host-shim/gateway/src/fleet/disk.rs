//! What teams' paused sandboxes and snapshots take of the disk, and whether there may be more.
//!
//! While something is written it counts with all of its RAM, the most that it can take beside its disk's changes; after that
//! with what it took. What it shares with a template or another snapshot (hard links) counts for nobody.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;

use crate::ApiError;
use crate::identity::TeamId;
use crate::store::Team;

/// Bytes that teams take.
#[derive(Debug, Default)]
pub(super) struct Disk(Mutex<HashMap<TeamId, u64>>);

/// A part of a team's disk; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    disk: Arc<Disk>,
    team: TeamId,
    bytes: u64,
}

impl Disk {
    /// Counts what is there, whatever the limit says.
    pub(super) fn count(self: &Arc<Self>, team: &TeamId, bytes: u64) -> Held {
        *self.lock().entry(team.clone()).or_default() += bytes;
        Held { disk: Arc::clone(self), team: team.clone(), bytes }
    }

    /// Takes a part of a team's disk, if it has so much left.
    pub(super) fn reserve(self: &Arc<Self>, team: &Team, mib: u64, what: &str) -> Result<Held, ApiError> {
        let mut book = self.lock();
        let used = book.entry(team.id.clone()).or_default();
        let (limit, bytes) = (team.disk_mib.saturating_mul(1 << 20), mib.saturating_mul(1 << 20));
        if used.saturating_add(bytes) > limit {
            let message = format!(
                "team {:?} may have {} MiB of paused sandboxes and snapshots: {} used, and {what} may take {mib} more; kill \
                 paused sandboxes or delete snapshots first",
                team.name,
                team.disk_mib,
                used.div_ceil(1 << 20),
            );
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, message));
        }
        *used += bytes;
        Ok(Held { disk: Arc::clone(self), team: team.id.clone(), bytes })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TeamId, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Counts what it really takes.
    pub(super) fn settle(&mut self, bytes: u64) {
        let mut book = self.disk.lock();
        let used = book.entry(self.team.clone()).or_default();
        *used = used.saturating_sub(self.bytes).saturating_add(bytes);
        self.bytes = bytes;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut book = self.disk.lock();
        if let Some(used) = book.get_mut(&self.team) {
            *used = used.saturating_sub(self.bytes);
            if *used == 0 {
                book.remove(&self.team);
            }
        }
    }
}

/// Bytes of the disk that a folder has for itself: files with one name, in blocks.
pub(super) fn used(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            bytes += used(&entry.path())?;
        } else if metadata.nlink() == 1 {
            // In units of 512 bytes whatever the file system's are (stat(2)).
            bytes += metadata.blocks() * 512;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Capacity;

    #[test]
    fn a_limit_holds_for_what_is_being_written_and_what_was_counts_as_it_is() {
        let disk = Arc::new(Disk::default());
        let team = Team {
            id: TeamId("t".into()),
            name: "small".into(),
            quota: Capacity::UNLIMITED,
            rate: None,
            disk_mib: 10,
        };
        let mut first = disk.reserve(&team, 6, "it").unwrap();
        let error = disk.reserve(&team, 6, "a snapshot").unwrap_err();
        assert_eq!(error.status.as_u16(), 429);
        let expected = "team \"small\" may have 10 MiB of paused sandboxes and snapshots: 6 used, and a snapshot may take 6 more";
        assert!(error.message.starts_with(expected), "{error}");
        first.settle(1 << 20);
        let second = disk.reserve(&team, 6, "it").unwrap();
        let there = disk.count(&team.id, 100 << 20);
        assert!(disk.reserve(&team, 0, "it").is_err());
        drop((first, second, there));
        assert!(disk.lock().is_empty());
    }

    #[test]
    fn what_is_shared_counts_for_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("s/deep");
        fs::create_dir_all(&folder).unwrap();
        assert_eq!(used(dir.path()).unwrap(), 0);
        fs::write(folder.join("own"), vec![1; 10_000]).unwrap();
        let own = used(dir.path()).unwrap();
        assert!((10_000..100_000).contains(&own), "{own}");
        fs::write(folder.join("one"), vec![1; 10_000]).unwrap();
        fs::hard_link(folder.join("one"), folder.join("other")).unwrap();
        assert_eq!(used(dir.path()).unwrap(), own);
    }
}
