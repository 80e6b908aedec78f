//! The schema, as steps from one version to the next. A step that was released is never changed.

use rusqlite::Connection;

use super::StoreError;

/// Step n brings version n to n + 1.
const STEPS: [&str; 5] = [
    "
    CREATE TABLE teams (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        sandboxes INTEGER NOT NULL,
        cpus INTEGER NOT NULL,
        memory_mib INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE keys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        team TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
        hash TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        hint TEXT NOT NULL,
        created_at TEXT NOT NULL
    ) STRICT;
    -- The record is JSON: it is read whole, and searched by nothing but its id.
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        team TEXT NOT NULL REFERENCES teams (id),
        record TEXT NOT NULL
    ) STRICT;
",
    "
    -- What was created for an Idempotency-Key. The sandbox may be gone; then the row means nothing.
    CREATE TABLE creates (
        team TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
        key TEXT NOT NULL,
        digest TEXT NOT NULL,
        sandbox TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (team, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX creates_by_age ON creates (created_at);
",
    // How fast its requests may come; NULL is the gateway's default.
    "ALTER TABLE teams ADD COLUMN requests_per_second INTEGER;",
    "
    -- For paused sandboxes and snapshots; a team that nobody has said anything about has no limit.
    ALTER TABLE teams ADD COLUMN disk_mib INTEGER NOT NULL DEFAULT 4294967295;
    -- Of two snapshots with one name, the later one has it. The record is JSON, as a sandbox's.
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        team TEXT NOT NULL REFERENCES teams (id),
        name TEXT,
        record TEXT NOT NULL,
        UNIQUE (team, name)
    ) STRICT;
    -- Sandboxes of a pool, which are nobody's yet.
    CREATE TABLE parked (
        id TEXT PRIMARY KEY,
        record TEXT NOT NULL
    ) STRICT;
",
    BUILDS,
];

/// Templates of teams and their builds.
const BUILDS: &str = "
    CREATE TABLE templates (
        id TEXT PRIMARY KEY,
        team TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        created_at TEXT NOT NULL,
        UNIQUE (team, name)
    ) STRICT;
    -- The record is JSON; what queries need of it stands beside it.
    CREATE TABLE builds (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        template TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
        stage TEXT NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX builds_of_template ON builds (template, stage);
    CREATE TABLE template_tags (
        template TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
        tag TEXT NOT NULL,
        build TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
        created_at TEXT NOT NULL,
        PRIMARY KEY (template, tag)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX template_tags_of_build ON template_tags (build);
    -- A team without a row has the defaults.
    CREATE TABLE build_limits (
        team TEXT PRIMARY KEY REFERENCES teams (id) ON DELETE CASCADE,
        at_once INTEGER NOT NULL,
        queued INTEGER NOT NULL,
        templates INTEGER NOT NULL,
        uploads_mib INTEGER NOT NULL,
        minutes INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// Brings the schema up to date, each step in a transaction of its own.
pub(super) fn run(connection: &mut Connection) -> Result<(), StoreError> {
    let known = STEPS.len() as i64;
    loop {
        // Another process may be migrating too: the version is read under the lock that changes it.
        let change = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let found: i64 = change.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > known {
            return Err(StoreError::Newer { found, known });
        }
        let Some(step) = usize::try_from(found).ok().and_then(|version| STEPS.get(version)) else {
            return Ok(());
        };
        change.execute_batch(step)?;
        change.pragma_update(None, "user_version", found + 1)?;
        change.commit()?;
    }
}
