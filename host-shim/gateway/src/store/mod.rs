//! What is kept: teams, their keys, sandboxes. SQLite in WAL mode, one connection on a thread of its own.
//!
//! A call has happened when it returns: the transaction is on disk. A kill -9 at any moment leaves the last whole one.

mod backup;
mod creates;
mod migrations;
mod parked;
mod snapshots;
mod templates;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};
use sandbox_folder::SandboxId;
use serde::{Deserialize, Serialize};

use crate::config::Capacity;
use crate::identity::{KeyHash, TeamId, hex, random};
use crate::rate::Rate;

pub use backup::{BackupError, backup};
pub use creates::KeptCreate;
pub use parked::ParkedRecord;
pub use snapshots::SnapshotRecord;
pub use templates::{
    BuildReason, BuildRecord, BuildStage, Requested, TagRecord, TemplateRecord, TemplateSummary,
};

/// A team, and what it may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Team {
    /// Its id.
    pub id: TeamId,
    /// Its name, for people.
    pub name: String,
    /// What its sandboxes may take together.
    pub quota: Capacity,
    /// How fast its requests may come, where that is not the default.
    pub rate: Option<Rate>,
    /// What its paused sandboxes and snapshots may take of the disk together, in MiB.
    pub disk_mib: u64,
}

/// Where a sandbox is in its life, as far as the gateway has promised anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Its shim is being started; nobody knows its id yet.
    Starting,
    /// It was given to its team.
    Running,
    /// Its shim is told to pause it.
    Pausing,
    /// Nothing of it runs; its folder says how it goes on.
    Paused,
    /// Its shim is being started again.
    Resuming,
    /// Its end was asked for.
    Ending,
}

impl Stage {
    /// Whether its team has it, awake or not.
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Running | Self::Pausing | Self::Paused | Self::Resuming)
    }
}

/// What happens to a sandbox when its time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is ended.
    #[default]
    Kill,
    /// It is paused.
    Pause,
}

/// How a sandbox comes and goes beside being created and killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LifePolicy {
    /// What happens when its time is up.
    pub on_timeout: OnTimeout,
    /// Whether a request to it resumes it.
    pub auto_resume: bool,
    /// Seconds that it was created for; what a request that resumes it gives.
    pub timeout_s: u64,
}

/// A sandbox as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub team: TeamId,
    /// Where it is in its life.
    pub stage: Stage,
    /// The template's id (its name in this gateway).
    pub template: String,
    /// What the client called the template.
    pub alias: Option<String>,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Scratch disk in MiB.
    pub disk_mib: u64,
    /// The agent's version.
    pub agent_version: String,
    /// What every envd call must carry as X-Access-Token; `None` for a sandbox of the old API that asked for none.
    pub access_token: Option<String>,
    /// What requests to its ports must carry; `None` where they are public.
    pub traffic_token: Option<String>,
    /// When it was started.
    pub started_at: Timestamp,
    /// When it is ended, or paused; of a paused one, since when it is.
    pub end_at: Timestamp,
    /// How it comes and goes.
    #[serde(default)]
    pub life: LifePolicy,
}

/// A key as its team may see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyRecord {
    /// Its number.
    pub id: i64,
    /// Whose it is.
    pub team: TeamId,
    /// What its maker called it.
    pub name: String,
    /// Its last characters, to tell keys apart.
    pub hint: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// The database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's own error.
    #[error("the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// Its file could not be made.
    #[error("the database {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// It was written by a later version.
    #[error(
        "the database has schema version {found}, this program knows {known}: use the tiffin-gateway of that version"
    )]
    Newer {
        /// The file's.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// What is in it cannot be read.
    #[error("the database: {0}")]
    Corrupt(String),
}

/// More than any machine has; the limit of a team that nobody has said anything about.
pub const UNLIMITED_DISK_MIB: u64 = u32::MAX as u64;

/// How long another process (`tiffin-gateway keys create`) may hold the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Arc<Mutex<Connection>>);

impl Store {
    /// Opens the database, and makes it or brings it up to date where needed.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let io = |source| StoreError::Io { path: path.display().to_string(), source };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(io)?;
        }
        // It holds tokens: its owner's alone, before anything is in it.
        fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path).map_err(io)?;
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // On disk when a call returns, also after a power cut.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        migrations::run(&mut connection)?;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    /// Runs `work` where blocking is allowed.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0);
        let run = move || work(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
        match tokio::task::spawn_blocking(run).await {
            Ok(done) => done,
            Err(panic) => Err(StoreError::Corrupt(panic.to_string())),
        }
    }

    /// Makes a team.
    pub async fn create_team(&self, name: &str, quota: Capacity) -> Result<Team, StoreError> {
        let id = random::<8>().map_err(|source| StoreError::Io { path: "getrandom(2)".into(), source })?;
        let team = Team {
            id: TeamId(hex(&id)),
            name: name.to_owned(),
            quota,
            rate: None,
            disk_mib: UNLIMITED_DISK_MIB,
        };
        let made = team.clone();
        self.with(move |db| {
            db.execute(
                "INSERT INTO teams (id, name, sandboxes, cpus, memory_mib) VALUES (?, ?, ?, ?, ?)",
                params![
                    team.id.0,
                    team.name,
                    team.quota.sandboxes,
                    team.quota.cpus,
                    team.quota.memory_mib as i64
                ],
            )?;
            Ok(made)
        })
        .await
    }

    /// The team of that name.
    pub async fn team_by_name(&self, name: &str) -> Result<Option<Team>, StoreError> {
        let name = name.to_owned();
        self.with(move |db| {
            let found = db.query_row("SELECT * FROM teams WHERE name = ?", [name], team);
            Ok(found.optional()?)
        })
        .await
    }

    /// The team of that id.
    pub async fn team(&self, id: &TeamId) -> Result<Option<Team>, StoreError> {
        let id = id.clone();
        self.with(move |db| {
            let mut query = db.prepare_cached("SELECT * FROM teams WHERE id = ?")?;
            Ok(query.query_row([id.0], team).optional()?)
        })
        .await
    }

    /// Changes what a team's paused sandboxes and snapshots may take of the disk, in MiB.
    pub async fn set_disk_quota(&self, id: &TeamId, mib: u64) -> Result<bool, StoreError> {
        let id = id.clone();
        self.with(move |db| {
            let mib = i64::try_from(mib).unwrap_or(i64::MAX);
            Ok(db.execute("UPDATE teams SET disk_mib = ? WHERE id = ?", params![mib, id.0])? == 1)
        })
        .await
    }

    /// Every team, by name.
    pub async fn teams(&self) -> Result<Vec<Team>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT * FROM teams ORDER BY name")?;
            let teams = query.query_map([], team)?;
            Ok(teams.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Changes what a team may have.
    pub async fn set_quota(&self, id: &TeamId, quota: Capacity) -> Result<bool, StoreError> {
        let id = id.clone();
        self.with(move |db| {
            let changed = db.execute(
                "UPDATE teams SET sandboxes = ?, cpus = ?, memory_mib = ? WHERE id = ?",
                params![quota.sandboxes, quota.cpus, quota.memory_mib as i64, id.0],
            )?;
            Ok(changed == 1)
        })
        .await
    }

    /// Changes how fast a team's requests may come; `None` is the default.
    pub async fn set_rate(&self, id: &TeamId, rate: Option<Rate>) -> Result<bool, StoreError> {
        let id = id.clone();
        self.with(move |db| {
            let changed = db.execute(
                "UPDATE teams SET requests_per_second = ? WHERE id = ?",
                params![rate.map(Rate::requests), id.0],
            )?;
            Ok(changed == 1)
        })
        .await
    }

    /// The team whose key that is.
    pub async fn team_by_key(&self, key: &KeyHash) -> Result<Option<Team>, StoreError> {
        let key = key.clone();
        self.with(move |db| {
            let mut query = db.prepare_cached(
                "SELECT teams.* FROM teams JOIN keys ON keys.team = teams.id WHERE keys.hash = ?",
            )?;
            Ok(query.query_row([key.as_str()], team).optional()?)
        })
        .await
    }

    /// Keeps the hash of a fresh key. `hint` is its end, for people.
    pub async fn add_key(
        &self,
        team: &TeamId,
        key: &KeyHash,
        name: &str,
        hint: &str,
    ) -> Result<i64, StoreError> {
        let (team, key, name, hint) = (team.clone(), key.clone(), name.to_owned(), hint.to_owned());
        self.with(move |db| {
            db.execute(
                "INSERT INTO keys (team, hash, name, hint, created_at) VALUES (?, ?, ?, ?, ?)",
                params![team.0, key.as_str(), name, hint, Timestamp::now().to_string()],
            )?;
            Ok(db.last_insert_rowid())
        })
        .await
    }

    /// Every key of every team.
    pub async fn keys(&self) -> Result<Vec<KeyRecord>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT id, team, name, hint, created_at FROM keys ORDER BY id")?;
            let keys = query.query_map([], |row| {
                Ok(KeyRecord {
                    id: row.get(0)?,
                    team: TeamId(row.get(1)?),
                    name: row.get(2)?,
                    hint: row.get(3)?,
                    created_at: timestamp(row, 4)?,
                })
            })?;
            Ok(keys.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Forgets a key; whether there was one.
    pub async fn revoke_key(&self, id: i64) -> Result<bool, StoreError> {
        self.with(move |db| Ok(db.execute("DELETE FROM keys WHERE id = ?", [id])? == 1)).await
    }

    /// Keeps a sandbox, in the place of what was known about it.
    pub async fn put_sandbox(&self, sandbox: &SandboxRecord) -> Result<(), StoreError> {
        let (id, team) = (sandbox.id.to_string(), sandbox.team.0.clone());
        let record =
            serde_json::to_string(sandbox).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        self.with(move |db| {
            db.execute(
                "INSERT INTO sandboxes (id, team, record) VALUES (?1, ?2, ?3)
                 ON CONFLICT (id) DO UPDATE SET record = ?3",
                params![id, team, record],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets a sandbox; whether it was known.
    pub async fn remove_sandbox(&self, id: &SandboxId) -> Result<bool, StoreError> {
        let id = id.to_string();
        self.with(move |db| Ok(db.execute("DELETE FROM sandboxes WHERE id = ?", [id])? == 1)).await
    }

    /// Every sandbox.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxRecord>, StoreError> {
        self.with(|db| {
            let mut query = db.prepare("SELECT id, record FROM sandboxes ORDER BY id")?;
            let rows = query.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
            rows.map(|row| {
                let (id, record) = row?;
                serde_json::from_str(&record)
                    .map_err(|error| StoreError::Corrupt(format!("the sandbox {id}: {error}")))
            })
            .collect()
        })
        .await
    }
}

fn team(row: &Row<'_>) -> rusqlite::Result<Team> {
    let quota = Capacity {
        sandboxes: row.get("sandboxes")?,
        cpus: row.get("cpus")?,
        memory_mib: row.get::<_, i64>("memory_mib")?.unsigned_abs(),
    };
    let rate = row.get::<_, Option<u32>>("requests_per_second")?.map(Rate::per_second);
    let disk_mib = row.get::<_, i64>("disk_mib")?.unsigned_abs();
    Ok(Team { id: TeamId(row.get("id")?), name: row.get("name")?, quota, rate, disk_mib })
}

fn timestamp(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    let text: String = row.get(column)?;
    text.parse().map_err(|error: jiff::Error| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into())
    })
}

#[cfg(test)]
mod tests;
