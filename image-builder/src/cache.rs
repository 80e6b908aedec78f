//! The results of steps, by what went into them.
//!
//! ```text
//! cache/
//!   steps/<digest of the key>.json    what the key was made of, and what the step made
//!   steps/<digest of the key>.files   the files that a COPY read, for `explain` alone
//!   layers/                           unpacked layers (layers.rs)
//!   builds/                           the last builds, for `explain` (history.rs)
//!   contexts/                         digests of context files (digests.rs)
//! images/                             the blobs of the layers
//! ```
//!
//! A key is a list of named parts, so that two keys can be compared and not only told apart. Values that may be secret (an
//! environment) are in it as digests.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use oci::layer::WrittenLayer;
use oci::{Digest, Hasher, Layer, Store, canonical_json};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::durable::{self, Held};
use crate::error::{Error, at};
use crate::plan::{Action, CopyAction, RunAction, WorkdirAction};

/// Changes with the meaning of a key, so that older results are not taken for newer ones.
const VERSION: u32 = 5;
/// The longest record that is read: a Dockerfile's longest line, and a thousand variables.
pub(crate) const MAX_RECORD: u64 = 4 << 20;
/// The longest list of files that is kept: 100,000 files with paths of middling length. `explain` then says that files
/// changed, not which.
const MAX_FILES: u64 = 16 << 20;
const RECORD: &str = "json";
const FILES: &str = "files";

/// The folder of results.
#[derive(Debug)]
pub(crate) struct StepCache {
    folder: PathBuf,
    _held: Held,
}

/// What a step made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StepResult {
    /// The layer; `None` when nothing changed.
    pub(crate) layer: Option<WrittenLayer>,
    /// When it was made, as RFC 3339. An image that is built again from the cache has the same digest.
    pub(crate) created: String,
}

/// The named parts of a key.
pub(crate) type Parts = BTreeMap<String, String>;

/// What a step's result depends on: the layers below, the instruction, and the contents of what it copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepKey {
    digest: Digest,
    parts: Parts,
}

/// A result as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) key: Parts,
    /// The instruction as written.
    pub(crate) text: String,
    /// Stage and number of the step that made it.
    pub(crate) mark: String,
    /// When it was made, in milliseconds since 1970.
    pub(crate) made: u64,
    pub(crate) result: StepResult,
}

/// What a step's record says besides its result.
#[derive(Clone, Debug, Default)]
pub(crate) struct About<'a> {
    pub(crate) text: &'a str,
    pub(crate) mark: &'a str,
    /// What it read of the context: path, and what there was.
    pub(crate) files: Option<BTreeMap<String, String>>,
}

impl StepKey {
    /// The key of a step. `sources` is the digest of the copied files, or the chain of the stage that they are from.
    pub(crate) fn new(chain: &str, action: &Action, compression: &str, sources: &str) -> Result<Self, Error> {
        let mut parts = Parts::new();
        let mut part = |name: &str, value: String| parts.insert(name.to_owned(), value);
        let list = |values: &[String]| json!(values).to_string();
        part("below", chain.to_owned());
        part("compression", compression.to_owned());
        part("sources", sources.to_owned());
        match action {
            Action::Config => drop(part("kind", "config".to_owned())),
            Action::E2bUser => drop(part("kind", "e2b user 1".to_owned())),
            Action::Workdir(WorkdirAction { path, user }) => {
                part("kind", "WORKDIR".to_owned());
                part("path", path.clone());
                part("user", user.clone());
            }
            // Proxies and the host's certificates change how a step reaches the network, not what it is.
            Action::Run(RunAction { argv, script, env, user, workdir, mounts, network, proxy_env: _ }) => {
                part("kind", "RUN".to_owned());
                part("command", list(argv));
                if let Some(script) = script {
                    part("script", json!(script).to_string());
                }
                for (name, value) in env {
                    part(&format!("env {name}"), Hasher::digest_of(value.as_bytes()).to_string());
                }
                // The order of variables is seen by the command.
                let order: Vec<_> = env.iter().map(|(name, _)| name.clone()).collect();
                part("order of variables", list(&order));
                part("user", user.clone());
                part("workdir", workdir.clone());
                // Of a source its files count, not its name.
                for (number, mount) in mounts.iter().enumerate() {
                    let source = mount.source.as_ref().map(|source| &source.path);
                    part(&format!("mount {}", number + 1), format!("{:?} {source:?}", mount.mount));
                }
                part("network", format!("{network:?}"));
            }
            Action::Copy(action) => {
                let CopyAction { destination, chown, chmod, sources: paths, from, .. } = action;
                let CopyAction { exclude, parents, link, unpack, .. } = action;
                part("kind", "COPY".to_owned());
                part("link", link.to_string());
                part("unpack", format!("{unpack:?}"));
                part("paths", format!("{paths:?}"));
                part("from", format!("{from:?}"));
                part("to", destination.clone());
                part("chown", json!(chown).to_string());
                part("chmod", json!(chmod).to_string());
                part("exclude", list(exclude));
                part("parents", parents.to_string());
            }
        }
        Self::of_parts(parts)
    }

    /// The key of any other work whose result is a layer.
    pub(crate) fn of_parts(parts: Parts) -> Result<Self, Error> {
        let text = canonical_json(&json!({"version": VERSION, "parts": parts}))
            .map_err(|error| at(Path::new("cache key"))(io::Error::from(error)))?;
        Ok(Self { digest: Hasher::digest_of(&text), parts })
    }

    pub(crate) fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl Record {
    pub(crate) fn new(key: &StepKey, result: StepResult, about: &About<'_>) -> Self {
        let made = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Self {
            version: VERSION,
            key: key.parts.clone(),
            text: about.text.to_owned(),
            mark: about.mark.to_owned(),
            made: u64::try_from(made).unwrap_or_default(),
            result,
        }
    }

    /// The key that it was made for, if this version of the program understands it.
    pub(crate) fn step_key(&self) -> Option<StepKey> {
        let ours = self.version == VERSION;
        ours.then(|| StepKey::of_parts(self.key.clone()).ok()).flatten()
    }

    /// Reads a record's text, which must be that of the key with this digest.
    pub(crate) fn parse(text: &[u8], digest: &str) -> Option<Self> {
        let record: Self = serde_json::from_slice(text).ok()?;
        (record.step_key()?.digest.digest() == digest).then_some(record)
    }
}

impl StepCache {
    /// Opens the folder, and removes what killed builds left there.
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        let held = durable::hold(folder)?;
        Ok(Self { folder: folder.to_owned(), _held: held })
    }

    /// The result of an earlier run, if its layer is still in the store. A damaged record is none. What is found counts
    /// as used, and stays as long as the store is open.
    pub(crate) fn find(&self, key: &StepKey, store: &Store) -> Option<StepResult> {
        let _using = store.using().ok()?;
        let path = self.path(key.digest.digest(), RECORD);
        let text = read_bounded(&path, MAX_RECORD).ok()?;
        let result = Record::parse(&text, key.digest.digest())?.result;
        if !result.layer.as_ref().is_none_or(|layer| store.has_blob(&layer.descriptor)) {
            return None;
        }
        // When it was used last: what goes first when room is needed.
        let now = SystemTime::now();
        let _ = File::options().write(true).open(&path).and_then(|file| file.set_modified(now));
        Some(result)
    }

    /// Remembers the result.
    pub(crate) fn put(&self, key: &StepKey, result: &StepResult, about: &About<'_>) -> Result<(), Error> {
        self.put_record(key, &Record::new(key, result.clone(), about))?;
        // Behind the record, without which it would belong to nothing.
        let Some(files) = &about.files else { return Ok(()) };
        let size: usize = files.iter().map(|(path, state)| path.len() + state.len() + 8).sum();
        if size as u64 > MAX_FILES {
            return Ok(());
        }
        durable::write_lazily(&self.path(key.digest.digest(), FILES), json!(files).to_string().as_bytes())
    }

    pub(crate) fn put_record(&self, key: &StepKey, record: &Record) -> Result<(), Error> {
        let path = self.path(key.digest.digest(), RECORD);
        let text = canonical_json(record).map_err(|error| at(&path)(io::Error::from(error)))?;
        durable::write(&path, &text)
    }

    pub(crate) fn record(&self, key: &Digest) -> Option<Record> {
        record(&self.folder, key)
    }

    fn path(&self, digest: &str, kind: &str) -> PathBuf {
        self.folder.join(format!("{digest}.{kind}"))
    }
}

/// The record of that key.
pub(crate) fn record(folder: &Path, key: &Digest) -> Option<Record> {
    let text = read_bounded(&folder.join(format!("{}.{RECORD}", key.digest())), MAX_RECORD).ok()?;
    Record::parse(&text, key.digest())
}

/// The files that the step with that key read.
pub(crate) fn files_of(folder: &Path, key: &Digest) -> Option<BTreeMap<String, String>> {
    let text = read_bounded(&folder.join(format!("{}.{FILES}", key.digest())), 2 * MAX_FILES).ok()?;
    serde_json::from_slice(&text).ok()
}

/// A file of the folder of results.
#[derive(Debug)]
pub(crate) struct StoredRecord {
    pub(crate) path: PathBuf,
    /// Its list of files, whether there is one or not.
    pub(crate) files: PathBuf,
    pub(crate) digest: Digest,
    /// `None` when it cannot be read, or says something else than its name.
    pub(crate) record: Option<Record>,
    pub(crate) size: u64,
    pub(crate) used: SystemTime,
}

/// Every record, in no order. What else is in the folder comes as the second list.
pub(crate) fn records(folder: &Path) -> Result<(Vec<StoredRecord>, Vec<PathBuf>), Error> {
    let (mut records, mut others) = (Vec::new(), Vec::new());
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((records, others)),
        Err(error) => return Err(at(folder)(error)),
    };
    for entry in entries {
        let path = entry.map_err(at(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (stem, kind) = name.rsplit_once('.').unwrap_or((&name, ""));
        let digest = Digest::try_from(format!("sha256:{stem}")).ok();
        match (digest, kind) {
            (Some(digest), RECORD) => {
                let Ok(metadata) = fs::metadata(&path) else { continue };
                let files = path.with_extension(FILES);
                let more = fs::metadata(&files).map_or(0, |metadata| metadata.len());
                let text = read_bounded(&path, MAX_RECORD).ok();
                records.push(StoredRecord {
                    record: text.and_then(|text| Record::parse(&text, digest.digest())),
                    files,
                    digest,
                    size: metadata.len() + more,
                    used: metadata.modified().map_err(at(&path))?,
                    path,
                });
            }
            // It belongs to its record.
            (Some(_), FILES) if path.with_extension(RECORD).exists() => {}
            // Being written.
            _ if name.starts_with(durable::NEW_PREFIX) => {}
            _ => others.push(path),
        }
    }
    Ok((records, others))
}

/// The file, if it has no more than `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut text)?;
    if text.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {limit} bytes")));
    }
    Ok(text)
}

/// The layer of a result.
pub(crate) fn layer_of(result: &StepResult, store: &Store) -> Result<Option<Layer>, Error> {
    let layer = result.layer.clone();
    Ok(layer.map(|layer| Layer::new(store, layer.descriptor, layer.diff_id)).transpose()?)
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
    fn values_of_variables_are_not_in_the_record() {
        let mut action = run("x", "");
        if let Action::Run(run) = &mut action {
            run.env = vec![("TOKEN".into(), "hunter2".into())];
        }
        let key = StepKey::new("a", &action, "zstd", "").unwrap();
        let result = StepResult { layer: None, created: String::new() };
        let text = json!(Record::new(&key, result, &About::default())).to_string();
        assert!(text.contains("env TOKEN") && !text.contains("hunter2"), "{text}");
        assert_eq!(Record::parse(text.as_bytes(), key.digest.digest()).unwrap().key, key.parts);
        let forged = text.replace("env TOKEN", "env TAKEN");
        assert_eq!(
            Record::parse(forged.as_bytes(), key.digest.digest()),
            None,
            "a record is what its name says"
        );
    }

    #[test]
    fn results_need_their_layer() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let cache = StepCache::open(&dir.path().join("steps")).unwrap();
        let key = StepKey::new("a", &Action::Config, "zstd", "").unwrap();
        let about = About { text: "RUN x", mark: "[1/2]", files: Some([("a".into(), "b".into())].into()) };
        assert_eq!(cache.find(&key, &store), None);
        let descriptor = store.put_blob(MediaType::ImageLayer, &b"layer"[..]).unwrap();
        let layer = WrittenLayer { diff_id: descriptor.digest().clone(), descriptor, uncompressed_size: 5 };
        let result = StepResult { layer: Some(layer.clone()), created: "2026-01-01T00:00:00Z".into() };
        cache.put(&key, &result, &about).unwrap();
        assert_eq!(files_of(&cache.folder, &key.digest), about.files);
        assert_eq!(cache.find(&key, &store), Some(result));
        fs::remove_file(store.blob_path(layer.descriptor.digest()).unwrap()).unwrap();
        assert_eq!(cache.find(&key, &store), None);
        fs::write(cache.path(key.digest.digest(), RECORD), "{").unwrap();
        assert_eq!(cache.find(&key, &store), None);
    }
}
