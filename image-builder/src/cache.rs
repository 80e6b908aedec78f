//! The results of steps, by what went into them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use oci::layer::WrittenLayer;
use oci::{Digest, Hasher, Store, canonical_json};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, at};
use crate::plan::{Action, CopyAction, RunAction, WorkdirAction};

/// Changes with the meaning of a key, so that older results are not taken for newer ones.
const VERSION: u32 = 4;
/// The longest result that is read.
const MAX_RECORD: u64 = 1 << 20;

/// The folder of results.
#[derive(Debug)]
pub(crate) struct StepCache {
    folder: PathBuf,
}

/// What a step made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StepResult {
    /// The layer; `None` when nothing changed.
    pub(crate) layer: Option<WrittenLayer>,
    /// When it was made, as RFC 3339. An image that is built again from the cache has the same digest.
    pub(crate) created: String,
}

/// What a step's result depends on: the layers below, the instruction, and the contents of what it copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepKey(Digest);

impl StepKey {
    /// The key of a step. `sources` is the digest of the copied files, or the chain of the stage that they are from.
    pub(crate) fn new(chain: &str, action: &Action, compression: &str, sources: &str) -> Result<Self, Error> {
        let action = match action {
            Action::Config => json!("config"),
            Action::E2bUser => json!("e2b user 1"),
            Action::Workdir(WorkdirAction { path, user }) => json!({"workdir": path, "user": user}),
            // Proxies and the host's certificates change how a step reaches the network, not what it is.
            Action::Run(RunAction { argv, script, env, user, workdir, mounts, network, proxy_env: _ }) => {
                // Of a source its files count, not its name.
                let mounts: Vec<_> = mounts
                    .iter()
                    .map(|mount| {
                        (format!("{:?}", mount.mount), mount.source.as_ref().map(|source| &source.path))
                    })
                    .collect();
                json!({
                    "run": argv, "script": script, "env": env, "user": user, "workdir": workdir,
                    "mounts": mounts, "network": format!("{network:?}"),
                })
            }
            Action::Copy(action) => {
                let CopyAction { destination, chown, chmod, sources: paths, from, .. } = action;
                let CopyAction { exclude, parents, link, unpack, .. } = action;
                json!({
                    "copy": format!("{paths:?}"), "from": format!("{from:?}"), "to": destination,
                    "chown": chown, "chmod": chmod, "exclude": exclude, "parents": parents, "link": link,
                    "unpack": unpack,
                })
            }
        };
        let key = json!({
            "version": VERSION, "chain": chain, "action": action, "compression": compression, "sources": sources,
        });
        let text =
            canonical_json(&key).map_err(|error| at(Path::new("cache key"))(std::io::Error::from(error)))?;
        Ok(Self(Hasher::digest_of(&text)))
    }
}

impl StepCache {
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The result of an earlier run, if its layer is still in the store. A damaged record is none.
    pub(crate) fn find(&self, key: &StepKey, store: &Store) -> Option<StepResult> {
        let path = self.path(key);
        if fs::metadata(&path).ok()?.len() > MAX_RECORD {
            return None;
        }
        let result: StepResult = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        result.layer.as_ref().is_none_or(|layer| store.has_blob(&layer.descriptor)).then_some(result)
    }

    /// Remembers the result.
    pub(crate) fn put(&self, key: &StepKey, result: &StepResult) -> Result<(), Error> {
        let path = self.path(key);
        let text = canonical_json(result).map_err(|error| at(&path)(std::io::Error::from(error)))?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder).map_err(at(&self.folder))?;
        // Not synced: a record that a power cut damages is a step that runs again.
        file.write_all(&text).map_err(at(&path))?;
        file.persist(&path).map_err(|error| at(&path)(error.error))?;
        Ok(())
    }

    fn path(&self, key: &StepKey) -> PathBuf {
        self.folder.join(format!("{}.json", key.0.digest()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci::MediaType;

    fn run(argv: &str, proxy: &str) -> Action {
        Action::Run(RunAction {
            argv: vec![argv.to_owned()],
            script: None,
            env: Vec::new(),
            proxy_env: vec![("http_proxy".into(), proxy.into())],
            user: String::new(),
            workdir: "/".into(),
            mounts: Vec::new(),
            network: Default::default(),
        })
    }

    #[test]
    fn keys_follow_what_matters() {
        let key = |chain: &str, action: &Action, sources: &str| {
            StepKey::new(chain, action, "zstd", sources).unwrap()
        };
        let base = key("a", &run("x", "1"), "");
        assert_eq!(base, key("a", &run("x", "2"), ""), "proxies do not count");
        assert_ne!(base, key("b", &run("x", "1"), ""));
        assert_ne!(base, key("a", &run("y", "1"), ""));
        assert_ne!(base, key("a", &run("x", "1"), "s"));
        assert_ne!(
            base,
            key("a", &Action::Workdir(WorkdirAction { path: "x".into(), user: String::new() }), "")
        );
    }

    #[test]
    fn results_need_their_layer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let cache = StepCache::open(&dir.path().join("steps")).unwrap();
        let key = StepKey::new("a", &Action::Config, "zstd", "").unwrap();
        assert_eq!(cache.find(&key, &store), None);
        let descriptor = store.put_blob(MediaType::ImageLayer, &b"layer"[..]).unwrap();
        let layer = WrittenLayer { diff_id: descriptor.digest().clone(), descriptor, uncompressed_size: 5 };
        let result = StepResult { layer: Some(layer.clone()), created: "2026-01-01T00:00:00Z".into() };
        cache.put(&key, &result).unwrap();
        assert_eq!(cache.find(&key, &store), Some(result));
        fs::remove_file(store.blob_path(layer.descriptor.digest()).unwrap()).unwrap();
        assert_eq!(cache.find(&key, &store), None);
        fs::write(cache.path(&key), "{").unwrap();
        assert_eq!(cache.find(&key, &store), None);
    }
}
