//! Snapshots of teams' sandboxes.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use sandbox_folder::SandboxId;
use serde::{Deserialize, Serialize};

use super::{Store, StoreError};
use crate::identity::TeamId;

/// A snapshot as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id, and its folder's name; of the shape of a sandbox's.
    pub id: SandboxId,
    /// Whose it is.
    pub team: TeamId,
    /// What its maker called it, with a tag.
    pub name: Option<String>,
    /// The sandbox that it is of.
    pub sandbox: SandboxId,
    /// When it was made.
    pub created_at: Timestamp,
    /// Bytes that it takes of the disk.
    pub disk_bytes: u64,
}

fn encode(snapshot: &SnapshotRecord) -> Result<String, StoreError> {
    serde_json::to_string(snapshot).map_err(|error| StoreError::Corrupt(error.to_string()))
}

fn decode(record: &str) -> Result<SnapshotRecord, StoreError> {
    serde_json::from_str(record).map_err(|error| StoreError::Corrupt(format!("a snapshot: {error}")))
}

fn put(db: &Connection, snapshot: &SnapshotRecord) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO snapshots (id, team, name, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET name = ?3, record = ?4",
        params![snapshot.id.as_str(), snapshot.team.0, snapshot.name, encode(snapshot)?],
    )?;
    Ok(())
}

impl Store {
    /// Keeps a snapshot; another one of its team that has its name has none from then on.
    pub async fn put_snapshot(&self, snapshot: &SnapshotRecord) -> Result<(), StoreError> {
        let snapshot = snapshot.clone();
        self.with(move |db| {
            let change = db.transaction()?;
            let mut query =
                change.prepare("SELECT record FROM snapshots WHERE team = ? AND name = ? AND id <> ?")?;
            let other: Option<String> = query
                .query_row(params![snapshot.team.0, snapshot.name, snapshot.id.as_str()], |row| row.get(0))
                .optional()?;
            drop(query);
            if let Some(other) = other {
                put(&change, &SnapshotRecord { name: None, ..decode(&other)? })?;
            }
            put(&change, &snapshot)?;
            Ok(change.commit()?)
        })
        .await
    }

    /// A team's snapshot, by its id or its name with a tag.
    pub async fn snapshot(
        &self,
        team: &TeamId,
        id: &str,
        name: &str,
    ) -> Result<Option<SnapshotRecord>, StoreError> {
        let (team, id, name) = (team.clone(), id.to_owned(), name.to_owned());
        self.with(move |db| {
            let mut query =
                db.prepare_cached("SELECT record FROM snapshots WHERE team = ?1 AND (id = ?2 OR name = ?3)")?;
            let found: Option<String> =
                query.query_row(params![team.0, id, name], |row| row.get(0)).optional()?;
            found.as_deref().map(decode).transpose()
        })
        .await
    }

    /// Every snapshot.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare_cached("SELECT record FROM snapshots ORDER BY id")?;
            let rows = query.query_map([], |row| row.get::<_, String>(0))?;
            rows.map(|row| decode(&row?)).collect()
        })
        .await
    }

    /// Forgets a snapshot; whether it was known.
    pub async fn remove_snapshot(&self, id: &SandboxId) -> Result<bool, StoreError> {
        let id = id.to_string();
        self.with(move |db| Ok(db.execute("DELETE FROM snapshots WHERE id = ?", [id])? == 1)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Capacity;

    #[tokio::test]
    async fn a_name_is_the_latest_snapshots_and_a_teams_own() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("gateway.db")).unwrap();
        let (a, b) = (
            store.create_team("a", Capacity::default()).await.unwrap().id,
            store.create_team("b", Capacity::default()).await.unwrap().id,
        );
        let record = |id: &str, team: &TeamId, name: Option<&str>| SnapshotRecord {
            id: id.parse().unwrap(),
            team: team.clone(),
            name: name.map(str::to_owned),
            sandbox: "abc1".parse().unwrap(),
            created_at: "2026-01-02T03:04:05Z".parse().unwrap(),
            disk_bytes: 7,
        };
        let named = Some("n:default");
        for (id, team, name) in [
            ("sna1", &a, named),
            ("sna2", &a, named),
            ("sna3", &b, named),
            ("sna4", &a, None),
            ("sna5", &a, None),
        ] {
            store.put_snapshot(&record(id, team, name)).await.unwrap();
        }
        assert_eq!(store.snapshot(&a, "n", "n:default").await.unwrap(), Some(record("sna2", &a, named)));
        assert_eq!(store.snapshot(&a, "sna1", "sna1:default").await.unwrap(), Some(record("sna1", &a, None)));
        assert_eq!(store.snapshot(&b, "n", "n:default").await.unwrap().unwrap().id.as_str(), "sna3");
        assert_eq!(store.snapshot(&b, "sna1", "sna1:default").await.unwrap(), None);
        assert_eq!(store.snapshots().await.unwrap().len(), 5);
        assert!(
            store.remove_snapshot(&"sna2".parse().unwrap()).await.unwrap()
                && !store.remove_snapshot(&"sna2".parse().unwrap()).await.unwrap()
        );
        assert_eq!(store.snapshot(&a, "n", "n:default").await.unwrap(), None);
    }
}
