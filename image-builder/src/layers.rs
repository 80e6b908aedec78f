//! The cache of unpacked layers, which the overlays of a build stack.
//!
//! ```text
//! cache/layers/                            cache/layers-<map of ids>/ in a user namespace
//!   <first half of the chain id>.<boot>/   one layer's own files, in overlayfs' form
//!   <first half of the chain id>/          the same, known to be on disk
//!   .new-*/{fs,work,merged}                a layer being made
//! ```
//!
//! A layer's files depend on the layers below it (a whiteout, a hard link to a lower file), so the key is the chain id
//! (image-spec 1.1, `config.md`, "Layer ChainID"). A folder appears by a rename when it is complete. Syncing it right away
//! would make each step wait for everything that the machine has to write, so its name says in which boot it was made: as
//! long as that lasts the page cache is as good as the disk. A later build, when the kernel has written it anyway, syncs
//! and drops the mark; what a crash or power cut left with the mark of another boot is thrown away. It is unpacked again
//! from the store, where layers are synced before they are named.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use oci::layer::LayerPath;
use oci::{Digest, Hasher, Layer, Store};

use crate::console::Console;
use crate::error::{Error, at};
use crate::graph::Flights;
use crate::ids;
use crate::overlay::{Overlay, Upper};
use crate::rooted::{Rooted, metadata_of};
use crate::tree::{Entry, Tree};
use crate::unpack;

/// 128 bits of the chain id: short enough for the mount options, long enough that nobody finds a second layer for it.
const NAME_LENGTH: usize = 32;
/// The lower directory of a stage that begins with nothing.
const EMPTY: &str = "empty";
const NEW_PREFIX: &str = ".new-";
/// How much of the boot's id is in a name: enough to tell two boots apart.
const BOOT_LENGTH: usize = 8;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// When the kernel has written a layer by itself (it does after 30 seconds), so that syncing it takes no time.
const WRITTEN_BACK: Duration = Duration::from_secs(300);

/// The folder of unpacked layers. Several builds share it.
#[derive(Debug)]
pub(crate) struct LayerCache {
    root: PathBuf,
    /// The mark of layers made in this boot; none where the kernel does not tell.
    boot: Option<String>,
    /// Stages of one build that need the same layers unpack them once.
    unpacking: Flights<PathBuf, ()>,
    _lock: File,
}

/// A stack of layers, each with its chain id, lowest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain(Vec<Digest>);

/// A place for a new layer; dropped without [`LayerCache::keep`] it leaves nothing.
#[derive(Debug)]
pub(crate) struct Scratch {
    folder: tempfile::TempDir,
    /// Held by whoever may still write there: also a step's process that outlives its build for a moment.
    lock: File,
}

/// Whether unpacked layers or other caches belong to ids that only exist in a namespace of a user's subordinate ids.
pub(crate) fn are_of_others(cache: &Path) -> bool {
    let Ok(entries) = fs::read_dir(cache) else { return false };
    let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    // The map has a line for the user, and more for the others.
    names.any(|name| name.split('-').skip(1).filter(|line| line.split('.').count() == 3).count() > 1)
}

impl Chain {
    /// The chain with one more layer.
    pub(crate) fn push(&mut self, diff_id: &Digest) {
        let id = match self.0.last() {
            None => diff_id.clone(),
            Some(parent) => Hasher::digest_of(format!("{parent} {diff_id}").as_bytes()),
        };
        self.0.push(id);
    }

    /// The chain id; for no layers, a text that is no digest.
    pub(crate) fn id(&self) -> &str {
        self.0.last().map_or("scratch", |id| id.as_ref())
    }
}

impl LayerCache {
    /// Opens the cache and removes what killed builds left, unless another build is at work.
    pub(crate) fn open(cache: &Path) -> Result<Self, Error> {
        let root = cache.join(ids::folder("layers"));
        fs::create_dir_all(root.join(EMPTY)).map_err(at(&root))?;
        let lock = File::open(&root).map_err(at(&root))?;
        let boot = fs::read_to_string(BOOT_ID).ok().and_then(|id| Some(id.get(..BOOT_LENGTH)?.to_owned()));
        let cache = Self { root, boot, unpacking: Flights::new(), _lock: lock };
        if cache._lock.try_lock().is_ok() {
            cache.sweep(SystemTime::now())?;
            cache._lock.unlock().map_err(at(&cache.root))?;
        }
        cache._lock.lock_shared().map_err(at(&cache.root))?;
        Ok(cache)
    }

    /// Nobody else is at work: removes what killed builds and other boots left, and drops the marks of what is on disk.
    fn sweep(&self, now: SystemTime) -> Result<(), Error> {
        let mut written = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let path = entry.map_err(at(&self.root))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mark = name.split_once('.').map(|(_, mark)| mark);
            if name.starts_with(NEW_PREFIX) {
                // The step of a killed build is being killed too, and must not write what is being removed.
                if let Ok(folder) = File::open(&path) {
                    folder.lock().map_err(at(&path))?;
                }
                // What cannot go now is tried again by the next build, and is in nobody's way.
                let _ = fs::remove_dir_all(&path);
            } else if mark.is_some() && mark != self.boot.as_deref() {
                fs::remove_dir_all(&path).map_err(at(&path))?;
            } else if mark.is_some() && was_written_back(&path, now) {
                written.push(path);
            }
        }
        if !written.is_empty() {
            rustix::fs::syncfs(&self._lock).map_err(at(&self.root))?;
        }
        for path in written {
            match fs::rename(&path, path.with_extension("")) {
                Ok(()) => {}
                // It is there twice.
                Err(_) => fs::remove_dir_all(&path).map_err(at(&path))?,
            }
        }
        Ok(())
    }

    fn folders(&self, chain: &Chain) -> Vec<PathBuf> {
        match chain.0.is_empty() {
            true => vec![PathBuf::from(EMPTY)],
            false => chain.0.iter().rev().map(|id| self.folder(id)).collect(),
        }
    }

    /// The name of a layer's folder, relative to the root: as on disk, else as made in this boot.
    fn folder(&self, id: &Digest) -> PathBuf {
        let name = PathBuf::from(&id.digest()[..NAME_LENGTH]);
        match &self.boot {
            Some(boot) if !self.root.join(&name).is_dir() => name.with_extension(boot),
            _ => name,
        }
    }

    /// Unpacks those of the layers, lowest first, that are not there yet.
    pub(crate) fn unpack(&self, layers: &[Layer], console: &Console) -> Result<Chain, Error> {
        let mut chain = Chain::default();
        for (layer, number) in layers.iter().zip(1..) {
            let below = chain.clone();
            chain.push(&layer.diff_id);
            let Some(id) = chain.0.last() else { continue };
            self.unpacking.once(&PathBuf::from(id.digest()), || {
                if self.take_up(&self.folder(id), layer.store())? {
                    return Ok::<_, Error>(());
                }
                let _work = console.work(&format!("unpacking layer {number} of {}", layers.len()), None);
                let scratch = self.scratch(&below)?;
                if below.0.is_empty() {
                    // With nothing below it is the same, and takes half the time.
                    unpack::apply(layer.open()?, &Rooted::open(&scratch.upper())?)?;
                } else {
                    let overlay = self.mount(&below, &scratch)?;
                    unpack::apply(layer.open()?, &Rooted::open(&scratch.merged())?)?;
                    overlay.unmount()?;
                }
                self.keep(scratch, &chain)
            })?;
        }
        Ok(chain)
    }

    /// Whether the layer is there. It counts as used from now on, and stays: the time of its inode says so, which is in no
    /// image. The store's lock is the one that `prune` takes.
    fn take_up(&self, name: &Path, store: &Store) -> Result<bool, Error> {
        let _using = store.using()?;
        let folder = self.root.join(name);
        match fs::metadata(&folder) {
            Ok(metadata) if metadata.is_dir() => {
                let _ = fs::set_permissions(&folder, metadata.permissions());
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at(&folder)(error)),
        }
    }

    /// An empty upper directory whose root looks like that of the chain.
    pub(crate) fn scratch(&self, below: &Chain) -> Result<Scratch, Error> {
        let folder =
            tempfile::Builder::new().prefix(NEW_PREFIX).tempdir_in(&self.root).map_err(at(&self.root))?;
        let lock = File::open(folder.path()).map_err(at(folder.path()))?;
        // Nobody sweeps as long as this cache is open.
        lock.lock().map_err(at(folder.path()))?;
        let scratch = Scratch { folder, lock };
        for name in [scratch.upper(), scratch.work(), scratch.merged()] {
            fs::create_dir(&name).map_err(at(&name))?;
        }
        let top = &self.folders(below)[0];
        let lower = Rooted::open(&self.root.join(top))?;
        let root = LayerPath::default();
        if let Some(stat) = lower.stat(&root)? {
            let mut metadata = metadata_of(&stat);
            if below.0.is_empty() {
                metadata.mode = 0o755;
            }
            Rooted::open(&scratch.upper())?.set_metadata(&root, &metadata, false)?;
        }
        Ok(scratch)
    }

    /// Mounts the chain with the scratch as its upper layer, at [`Scratch::merged`].
    pub(crate) fn mount(&self, below: &Chain, scratch: &Scratch) -> Result<Overlay, Error> {
        let name = PathBuf::from(scratch.folder.path().file_name().unwrap_or_default());
        let (upper, work) = (name.join("fs"), name.join("work"));
        let upper = Upper { upper: &upper, work: &work };
        Overlay::mount(&self.root, &self.folders(below), Some(upper), &scratch.merged())
    }

    /// Makes the scratch's upper directory the chain's top layer. It must not be mounted.
    pub(crate) fn keep(&self, scratch: Scratch, chain: &Chain) -> Result<(), Error> {
        let Some(id) = chain.0.last() else { return Ok(()) };
        let upper = scratch.upper();
        if self.boot.is_none() {
            let folder = File::open(&upper).map_err(at(&upper))?;
            rustix::fs::syncfs(&folder).map_err(at(&upper))?;
        }
        let target = self.root.join(self.folder(id));
        match fs::rename(&upper, &target) {
            // Another build was faster; the same chain id is the same files.
            Err(_) if target.is_dir() => Ok(()),
            other => other.map_err(at(&target)),
        }
    }

    /// Whether the upper directory's root has another owner or mode than the chain's.
    pub(crate) fn root_changed(&self, below: &Chain, scratch: &Scratch) -> Result<bool, Error> {
        let attributes = |path: &Path| {
            let metadata = fs::metadata(path).map_err(at(path))?;
            Ok::<_, Error>((metadata.mode(), metadata.uid(), metadata.gid()))
        };
        let before = match below.0.is_empty() {
            true => (0o40755, 0, 0),
            false => attributes(&self.root.join(&self.folders(below)[0]))?,
        };
        Ok(attributes(&scratch.upper())? != before)
    }
}

/// A stack of unpacked layers to look at. Dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct Stack {
    // Before the overlay, which is busy as long as its root is open.
    pub(crate) root: Rooted,
    _overlay: Option<Overlay>,
    _target: Option<tempfile::TempDir>,
}

impl Stack {
    /// Mounts the chain read-only; with one layer there is nothing to mount.
    pub(crate) fn mount(cache: &LayerCache, chain: &Chain) -> Result<Self, Error> {
        let folders = cache.folders(chain);
        if let [only] = folders.as_slice() {
            let root = Rooted::open(&cache.root.join(only))?;
            return Ok(Self { root, _overlay: None, _target: None });
        }
        let mut target = tempfile::Builder::new();
        let target = target.prefix(NEW_PREFIX).tempdir_in(&cache.root).map_err(at(&cache.root))?;
        let overlay = Overlay::mount(&cache.root, &folders, None, target.path())?;
        let root = Rooted::open(target.path())?;
        Ok(Self { root, _overlay: Some(overlay), _target: Some(target) })
    }
}

impl Tree for Stack {
    fn entry(&self, path: &LayerPath) -> Result<Option<Entry>, Error> {
        self.root.entry(path)
    }

    fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error> {
        self.root.read_link(path)
    }

    fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        self.root.names(path)
    }

    fn open(&self, path: &LayerPath) -> Result<Box<dyn Read + '_>, Error> {
        self.root.open(path)
    }

    fn xattrs(&self, path: &LayerPath) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        self.root.xattrs(path)
    }

    fn identity(&self, path: &LayerPath) -> Result<Option<(u64, u64)>, Error> {
        self.root.identity(path)
    }

    fn shown(&self, path: &LayerPath) -> PathBuf {
        self.root.shown(path)
    }
}

fn was_written_back(folder: &Path, now: SystemTime) -> bool {
    let made = fs::metadata(folder).ok().and_then(|metadata| u64::try_from(metadata.ctime()).ok());
    let made = made.map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    made.and_then(|made| now.duration_since(made).ok()).is_some_and(|age| age > WRITTEN_BACK)
}

impl Scratch {
    /// The upper directory.
    pub(crate) fn upper(&self) -> PathBuf {
        self.folder.path().join("fs")
    }

    /// Where the whole tree is mounted.
    pub(crate) fn merged(&self) -> PathBuf {
        self.folder.path().join("merged")
    }

    /// Another folder in the scratch, for what must not be in the layer.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A handle that holds the scratch's lock as long as any process has it.
    pub(crate) fn lock(&self) -> Result<File, Error> {
        self.lock.try_clone().map_err(at(self.folder.path()))
    }

    /// A name that no other scratch on this machine has at this time.
    pub(crate) fn unique_name(&self) -> String {
        let folder = self.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("tiffin-build-{}-{}", std::process::id(), folder.trim_start_matches(NEW_PREFIX))
    }

    fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(cache: &LayerCache) -> Vec<String> {
        let entries = fs::read_dir(&cache.root).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn layers_of_this_boot_are_used_and_others_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LayerCache::open(dir.path()).unwrap();
        let Some(boot) = cache.boot.clone() else {
            eprintln!("SKIPPED: this kernel does not tell its boot's id");
            return;
        };
        let mut chain = Chain::default();
        chain.push(&Hasher::digest_of(b"layer"));
        let name = chain.0[0].digest()[..NAME_LENGTH].to_owned();
        let scratch = cache.scratch(&Chain::default()).unwrap();
        cache.keep(scratch, &chain).unwrap();
        let marked = format!("{name}.{boot}");
        assert_eq!(names(&cache), [marked.as_str(), EMPTY]);
        assert_eq!(cache.folders(&chain), [Path::new(&marked)]);

        // As a power cut leaves them, and a killed build.
        fs::create_dir(cache.root.join("0123.otherone")).unwrap();
        fs::create_dir_all(cache.root.join(".new-killed/fs")).unwrap();
        let other = LayerCache::open(dir.path()).unwrap();
        assert_eq!(names(&other).len(), 4, "somebody is at work");
        drop((cache, other));
        let cache = LayerCache::open(dir.path()).unwrap();
        assert_eq!(names(&cache), [marked.as_str(), EMPTY]);

        // Later it is on disk.
        cache.sweep(SystemTime::now() + 2 * WRITTEN_BACK).unwrap();
        assert_eq!(names(&cache), [name.as_str(), EMPTY]);
        assert_eq!(cache.folders(&chain), [Path::new(&name)]);
    }

    #[test]
    fn folders_of_others_are_told_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["layers", "layers-0.1000.1", "steps"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert!(!are_of_others(dir.path()));
        fs::create_dir(dir.path().join("mounts-0.1000.1-1.100000.65536")).unwrap();
        assert!(are_of_others(dir.path()));
    }
}
