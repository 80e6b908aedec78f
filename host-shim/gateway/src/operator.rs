//! The operator's own team and key, so that a fresh gateway can be used without further steps.
//!
//! Keys are kept as hashes and shown once. This one is also kept as it is, in `gateway.key` (0600) in the data folder: `serve`
//! and `env` print it each time. Whoever can read the file can read `gateway.db` too.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use template::DataDir;

use crate::config::Capacity;
use crate::identity::{ApiKey, KeyHash};
use crate::store::{Store, StoreError, Team};

/// The team that is there from the beginning.
pub const DEFAULT_TEAM: &str = "default";

/// The file of the operator's key.
pub const KEY_FILE: &str = "gateway.key";

/// What the file is called in the list of keys.
const KEY_NAME: &str = "gateway.key";

/// Longer than any key.
const MAX_KEY: u64 = 256;

/// The key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The file of a data folder's database.
pub fn database(data: &DataDir) -> PathBuf {
    data.path().join("gateway.db")
}

/// The database of a data folder.
pub fn open_store(data: &DataDir) -> Result<Store, StoreError> {
    Store::open(&database(data))
}

/// The team `default`, made where it is not there.
pub async fn default_team(store: &Store) -> Result<Team, StoreError> {
    if let Some(team) = store.team_by_name(DEFAULT_TEAM).await? {
        return Ok(team);
    }
    match store.create_team(DEFAULT_TEAM, Capacity::UNLIMITED).await {
        Ok(team) => Ok(team),
        // Another process was faster.
        Err(error) => store.team_by_name(DEFAULT_TEAM).await?.ok_or(error),
    }
}

/// Makes a key of a team, and keeps its hash.
pub async fn create_key(store: &Store, team: &Team, name: &str) -> Result<ApiKey, StoreError> {
    let random = |source| StoreError::Io { path: "getrandom(2)".into(), source };
    let key = ApiKey::generate().map_err(random)?;
    // Enough to tell keys apart, and 16 of its 160 bits.
    let hint = &key.as_str()[key.as_str().len() - 4..];
    store.add_key(&team.id, &KeyHash::of(key.as_str()), name, hint).await?;
    Ok(key)
}

/// The operator's key: the one in the file while it is valid, else a fresh one that replaces it.
pub async fn key(data: &DataDir, store: &Store) -> Result<String, OperatorError> {
    let path = data.path().join(KEY_FILE);
    let io = |source| OperatorError::Io { path: path.clone(), source };
    let file = path.clone();
    // Two programs at once make one key: the second one reads what the first has written.
    let locked = tokio::task::spawn_blocking(move || {
        let mut options = File::options();
        let mut file = options.create(true).truncate(false).read(true).write(true).mode(0o600).open(file)?;
        file.lock()?;
        let mut text = String::new();
        (&mut file).take(MAX_KEY).read_to_string(&mut text)?;
        Ok((file, text))
    });
    let (mut file, text) = locked.await.map_err(io::Error::other).flatten().map_err(io)?;
    let kept = text.trim();
    if !kept.is_empty() && store.team_by_key(&KeyHash::of(kept)).await?.is_some() {
        return Ok(kept.to_owned());
    }
    let team = default_team(store).await?;
    let key = create_key(store, &team, KEY_NAME).await?;
    let write = file.rewind().and_then(|()| file.set_len(0)).and_then(|()| {
        writeln!(file, "{}", key.as_str())?;
        file.sync_all()
    });
    write.map_err(io)?;
    Ok(key.as_str().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn the_key_stays_until_it_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::resolve(Some(dir.path())).unwrap();
        let store = open_store(&data).unwrap();
        let (one, two) = tokio::join!(key(&data, &store), key(&data, &store));
        let one = one.unwrap();
        assert_eq!(one, two.unwrap());
        let mode = std::fs::metadata(data.path().join(KEY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let team = store.team_by_key(&KeyHash::of(&one)).await.unwrap().unwrap();
        assert_eq!((team.name.as_str(), team.quota), (DEFAULT_TEAM, Capacity::UNLIMITED));

        let kept = store.keys().await.unwrap();
        assert_eq!((kept.len(), kept[0].hint.as_str()), (1, &one[40..]));
        store.revoke_key(kept[0].id).await.unwrap();
        let fresh = key(&data, &store).await.unwrap();
        assert_ne!(fresh, one);
        assert_eq!(key(&data, &store).await.unwrap(), fresh);
        std::fs::write(data.path().join(KEY_FILE), "broken").unwrap();
        assert_ne!(key(&data, &store).await.unwrap(), fresh);
    }
}
