//! Who is at work in a store, so that what they rely on is not taken away beside them.
//!
//! ```text
//! .sessions/XXXX     locked by a process as long as it has the store open for writing; made when it began
//! blobs/             the folder's lock: shared while somebody takes something up, exclusive while something is removed
//! ```
//!
//! A blob that nothing names yet may be the layer of a build that goes on: it was written, or taken up ([`Store::has_blob`]
//! sets its time), after that build began. So only what was last used before the oldest session began may be removed, and
//! the lock keeps anybody from taking up what is being removed at that moment.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci_spec::image::{Descriptor, Digest, ImageIndex, MediaType};

use crate::error::at;
use crate::image::MAX_MANIFEST;
use crate::{Error, Store, blobs_of, oci_media_type};

const SESSIONS: &str = ".sessions";
const BLOBS: &str = "blobs";
/// Indexes of indexes: more is nobody's image.
const MAX_DEPTH: usize = 4;

/// A process that has the store open for writing. Its file is locked as long as this lives, and gone afterwards.
#[derive(Debug)]
pub(crate) struct Session {
    _lock: File,
    path: PathBuf,
}

/// As long as this lives, nothing is removed from the store.
#[derive(Debug)]
pub struct Using {
    _lock: File,
}

/// As long as this lives, nobody else takes anything up.
#[derive(Debug)]
pub struct Removal {
    _lock: File,
    horizon: Option<SystemTime>,
}

/// A blob as it is on disk.
#[derive(Clone, Debug)]
pub struct StoredBlob {
    /// Its name.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// When it was written or last taken up.
    pub used: SystemTime,
}

impl Session {
    pub(crate) fn begin(root: &Path) -> Result<Self, Error> {
        let folder = root.join(SESSIONS);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        // Between making the file and locking it, it would look like that of a dead process.
        let _using = using(root)?;
        let file = tempfile::Builder::new().prefix("").tempfile_in(&folder).map_err(at(&folder))?;
        let (file, path) = file.keep().map_err(|error| at(&folder)(error.error))?;
        file.lock().map_err(at(&path))?;
        Ok(Self { _lock: file, path })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn using(root: &Path) -> Result<Using, Error> {
    let folder = root.join(BLOBS);
    let lock = File::open(&folder).map_err(at(&folder))?;
    lock.lock_shared().map_err(at(&folder))?;
    Ok(Using { _lock: lock })
}

impl Removal {
    /// Whether something that was last used then may be removed: nobody who is at work now can rely on it.
    pub fn allows(&self, used: SystemTime) -> bool {
        self.horizon.is_none_or(|horizon| used < horizon)
    }

    /// Whether nobody is at work.
    pub fn is_alone(&self) -> bool {
        self.horizon.is_none()
    }
}

impl Store {
    /// Keeps everything where it is, for as long as it takes to look something up and mark it as used.
    pub fn using(&self) -> Result<Using, Error> {
        using(self.path())
    }

    /// Waits until nobody is taking anything up, and keeps others from it. What dead processes left of their sessions is
    /// removed.
    pub fn removal(&self) -> Result<Removal, Error> {
        let folder = self.path().join(BLOBS);
        let lock = File::open(&folder).map_err(at(&folder))?;
        lock.lock().map_err(at(&folder))?;
        Ok(Removal { _lock: lock, horizon: self.oldest_session()? })
    }

    /// When the oldest process that is at work began.
    fn oldest_session(&self) -> Result<Option<SystemTime>, Error> {
        let folder = self.path().join(SESSIONS);
        let mut oldest = None;
        for path in files(&folder)? {
            let file = match File::open(&path) {
                Ok(file) => file,
                // It ended just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(&path)(error)),
            };
            if file.try_lock().is_ok() {
                let _ = fs::remove_file(&path);
                continue;
            }
            let began = file.metadata().and_then(|metadata| metadata.modified()).map_err(at(&path))?;
            oldest = Some(oldest.map_or(began, |oldest: SystemTime| oldest.min(began)));
        }
        Ok(oldest)
    }

    /// Every blob, in no order. Files whose names are no digests come as the second list.
    pub fn blobs(&self) -> Result<(Vec<StoredBlob>, Vec<PathBuf>), Error> {
        let (mut blobs, mut others) = (Vec::new(), Vec::new());
        for path in files(&self.path().join(BLOBS).join("sha256"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let is_digest = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            let digest = Digest::try_from(format!("sha256:{name}")).ok().filter(|_| is_digest);
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(&path)(error)),
            };
            match digest {
                Some(digest) if metadata.is_file() => blobs.push(StoredBlob {
                    digest,
                    size: metadata.len(),
                    used: metadata.modified().map_err(at(&path))?,
                }),
                _ => others.push(path),
            }
        }
        Ok((blobs, others))
    }

    /// Removes a blob, whoever names it, unless somebody at work may rely on it. Says whether it did.
    pub fn remove_blob(&self, removal: &Removal, digest: &Digest) -> Result<bool, Error> {
        let path = self.blob_path(digest)?;
        let used = match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
            Ok(used) => used,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(at(&path)(error)),
        };
        if !removal.allows(used) {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(at(&path))?;
        Ok(true)
    }

    /// The blob and every blob that it names, as far as they are there and can be read.
    pub fn reachable(&self, descriptor: &Descriptor) -> Vec<Digest> {
        let mut found = Vec::new();
        self.reach(descriptor, MAX_DEPTH, &mut found);
        found
    }

    fn reach(&self, descriptor: &Descriptor, depth: usize, found: &mut Vec<Digest>) {
        found.push(descriptor.digest().clone());
        if !self.blob_path(descriptor.digest()).is_ok_and(|path| path.exists()) {
            return;
        }
        match oci_media_type(descriptor.media_type()) {
            MediaType::ImageManifest => {
                let named = blobs_of(self, descriptor).unwrap_or_default();
                found.extend(named.iter().map(|blob| blob.digest().clone()));
            }
            MediaType::ImageIndex if depth > 0 => {
                let text = self.read_blob(descriptor, MAX_MANIFEST).unwrap_or_default();
                let Ok(index) = serde_json::from_slice::<ImageIndex>(&text) else { return };
                index.manifests().iter().for_each(|manifest| self.reach(manifest, depth - 1, found));
            }
            _ => {}
        }
    }
}

/// The paths in a folder; none where there is no folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(folder)(error)),
    };
    entries.map(|entry| Ok(entry.map_err(at(folder))?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_at_work_may_rely_on_stays() {
        let dir = tempfile::tempdir().unwrap();
        let first = Store::open_or_create(dir.path()).unwrap();
        let old = first.put_blob(MediaType::ImageLayer, &b"old"[..]).unwrap();
        let reused = first.put_blob(MediaType::ImageLayer, &b"reused"[..]).unwrap();
        drop(first);
        // As long ago as the clock of files can tell.
        let past = SystemTime::now() - std::time::Duration::from_secs(3600);
        for blob in [&old, &reused] {
            let file = File::options()
                .write(true)
                .open(dir.path().join("blobs/sha256").join(blob.digest().digest()));
            file.unwrap().set_modified(past).unwrap();
        }
        let build = Store::open_or_create(dir.path()).unwrap();
        assert!(build.has_blob(&reused));
        let new = build.put_blob(MediaType::ImageLayer, &b"new"[..]).unwrap();
        let prune = Store::open(dir.path()).unwrap();
        {
            let removal = prune.removal().unwrap();
            assert!(prune.remove_blob(&removal, old.digest()).unwrap());
            assert!(!prune.remove_blob(&removal, reused.digest()).unwrap());
            assert!(!prune.remove_blob(&removal, new.digest()).unwrap());
        }
        drop(build);
        let removal = prune.removal().unwrap();
        assert!(prune.remove_blob(&removal, reused.digest()).unwrap());
        assert!(prune.remove_blob(&removal, new.digest()).unwrap());
        assert_eq!(files(&dir.path().join(SESSIONS)).unwrap().len(), 0);
    }

    #[test]
    fn the_session_of_a_dead_process_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path()).unwrap();
        fs::write(dir.path().join(SESSIONS).join("dead"), b"").unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert!(store.removal().unwrap().allows(SystemTime::now()));
        assert_eq!(files(&dir.path().join(SESSIONS)).unwrap().len(), 0);
    }

    #[test]
    fn an_index_reaches_what_its_manifests_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path()).unwrap();
        let layer = store.put_blob(MediaType::ImageLayer, &b"layer"[..]).unwrap();
        let config = store.put_blob(MediaType::ImageConfig, &b"{}"[..]).unwrap();
        let json = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]}).to_string();
        let manifest = store.put_blob(MediaType::ImageManifest, json.as_bytes()).unwrap();
        let json = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}).to_string();
        let index = store.put_blob(MediaType::ImageIndex, json.as_bytes()).unwrap();
        let reached = store.reachable(&index);
        for blob in [&index, &manifest, &config, &layer] {
            assert!(reached.contains(blob.digest()), "{}", blob.media_type());
        }
        fs::write(store.blob_path(manifest.digest()).unwrap(), b"damaged").unwrap();
        assert_eq!(store.reachable(&index).len(), 2, "what cannot be read names nothing");
    }
}
