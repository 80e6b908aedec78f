//! Sandboxes of pools, which are nobody's yet.

use rusqlite::params;
use sandbox_folder::SandboxId;
use serde::{Deserialize, Serialize};

use super::{SandboxRecord, Store, StoreError};

/// A parked sandbox as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedRecord {
    /// Its id, and its folder's name.
    pub id: SandboxId,
    /// The template of its pool.
    pub template: String,
    /// What the template was when it was parked.
    pub stamp: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
}

impl Store {
    /// Keeps a parked sandbox.
    pub async fn put_parked(&self, parked: &ParkedRecord) -> Result<(), StoreError> {
        let id = parked.id.to_string();
        let record = serde_json::to_string(parked).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        self.with(move |db| {
            db.execute("INSERT INTO parked (id, record) VALUES (?, ?)", params![id, record])?;
            Ok(())
        })
        .await
    }

    /// A parked sandbox is a team's from now on.
    pub async fn give_parked(&self, sandbox: &SandboxRecord) -> Result<(), StoreError> {
        let (id, team) = (sandbox.id.to_string(), sandbox.team.0.clone());
        let record =
            serde_json::to_string(sandbox).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        self.with(move |db| {
            let change = db.transaction()?;
            change.execute("DELETE FROM parked WHERE id = ?", [&id])?;
            change.execute(
                "INSERT INTO sandboxes (id, team, record) VALUES (?, ?, ?)",
                params![id, team, record],
            )?;
            Ok(change.commit()?)
        })
        .await
    }

    /// Forgets a parked sandbox.
    pub async fn remove_parked(&self, id: &SandboxId) -> Result<(), StoreError> {
        let id = id.to_string();
        self.with(move |db| {
            db.execute("DELETE FROM parked WHERE id = ?", [id])?;
            Ok(())
        })
        .await
    }

    /// Every parked sandbox.
    pub async fn parked(&self) -> Result<Vec<ParkedRecord>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT record FROM parked ORDER BY id")?;
            let rows = query.query_map([], |row| row.get::<_, String>(0))?;
            rows.map(|row| {
                let record = row?;
                serde_json::from_str(&record)
                    .map_err(|error| StoreError::Corrupt(format!("a parked sandbox: {error}")))
            })
            .collect()
        })
        .await
    }
}
