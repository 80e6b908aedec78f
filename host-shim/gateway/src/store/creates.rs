//! What was created for which `Idempotency-Key`.

use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{OptionalExtension, params};
use sandbox_folder::SandboxId;

use super::{Store, StoreError};
use crate::identity::TeamId;

/// A create that was done for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptCreate {
    /// Digest of the request.
    pub digest: String,
    /// What it gave.
    pub sandbox: SandboxId,
}

/// Seconds since 1970 before which creates are forgotten.
fn forgotten(age: Duration) -> i64 {
    Timestamp::now().as_second().saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX))
}

impl Store {
    /// What was created for a team's key, if that is not longer ago than `age`.
    pub async fn kept_create(
        &self,
        team: &TeamId,
        key: &str,
        age: Duration,
    ) -> Result<Option<KeptCreate>, StoreError> {
        let (team, key) = (team.clone(), key.to_owned());
        self.with(move |db| {
            let mut query = db.prepare_cached(
                "SELECT digest, sandbox FROM creates WHERE team = ? AND key = ? AND created_at >= ?",
            )?;
            let found = query.query_row(params![team.0, key, forgotten(age)], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
            });
            let Some((digest, sandbox)) = found.optional()? else { return Ok(None) };
            let sandbox =
                sandbox.parse().map_err(|error| StoreError::Corrupt(format!("creates: {error}")))?;
            Ok(Some(KeptCreate { digest, sandbox }))
        })
        .await
    }

    /// Keeps what was created for a team's key, and forgets what is older than `age`.
    pub async fn keep_create(
        &self,
        team: &TeamId,
        key: &str,
        create: &KeptCreate,
        age: Duration,
    ) -> Result<(), StoreError> {
        let (team, key, create) = (team.clone(), key.to_owned(), create.clone());
        self.with(move |db| {
            let change = db.transaction()?;
            change.execute("DELETE FROM creates WHERE created_at < ?", [forgotten(age)])?;
            change.execute(
                "INSERT OR REPLACE INTO creates (team, key, digest, sandbox, created_at) VALUES (?, ?, ?, ?, ?)",
                params![team.0, key, create.digest, create.sandbox.as_str(), Timestamp::now().as_second()],
            )?;
            Ok(change.commit()?)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Capacity;

    #[tokio::test]
    async fn a_create_is_kept_for_its_team_and_for_a_while() {
        const DAY: Duration = Duration::from_secs(86_400);
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("gateway.db")).unwrap();
        let (a, b) = (
            store.create_team("a", Capacity::default()).await.unwrap().id,
            store.create_team("b", Capacity::default()).await.unwrap().id,
        );
        let create = |id: &str| KeptCreate { digest: "d".into(), sandbox: id.parse().unwrap() };
        store.keep_create(&a, "k", &create("abc1"), DAY).await.unwrap();
        store.keep_create(&a, "k", &create("abc2"), DAY).await.unwrap();
        assert_eq!(store.kept_create(&a, "k", DAY).await.unwrap(), Some(create("abc2")));
        assert_eq!(store.kept_create(&b, "k", DAY).await.unwrap(), None);
        assert_eq!(store.kept_create(&a, "l", DAY).await.unwrap(), None);

        store
            .with(|db| Ok(db.execute("UPDATE creates SET created_at = created_at - 100", [])?))
            .await
            .unwrap();
        assert_eq!(store.kept_create(&a, "k", Duration::from_secs(50)).await.unwrap(), None);
        store.keep_create(&b, "k", &create("abc3"), Duration::from_secs(50)).await.unwrap();
        let left = store.with(|db| {
            let left: i64 = db.query_row("SELECT count(*) FROM creates", [], |row| row.get(0))?;
            Ok(left)
        });
        assert_eq!(left.await.unwrap(), 1);
    }
}
