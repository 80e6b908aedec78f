//! The cache of unpacked layers, which the overlays of a build stack.
//!
//! ```text
//! cache/layers/
//!   <first half of the chain id>/   one layer's own files, in overlayfs' form
//!   .new-*/{fs,work,merged}         a layer being made
//! ```
//!
//! A layer's files depend on the layers below it (a whiteout, a hard link to a lower file), so the key is the chain id
//! (image-spec 1.1, `config.md`, "Layer ChainID"). A folder appears by a rename when it is complete and on disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci::layer::LayerPath;
use oci::{Digest, Hasher, Layer, Store};

use crate::console::Console;
use crate::error::{Error, at};
use crate::graph::Flights;
use crate::overlay::{Overlay, Upper};
use crate::rooted::{Rooted, metadata_of};
use crate::tree::{Entry, Tree};
use crate::unpack;

/// 128 bits of the chain id: short enough for the mount options, long enough that nobody finds a second layer for it.
const NAME_LENGTH: usize = 32;
/// The lower directory of a stage that begins with nothing.
const EMPTY: &str = "empty";
const NEW_PREFIX: &str = ".new-";

/// The folder of unpacked layers. Several builds share it.
#[derive(Debug)]
pub(crate) struct LayerCache {
    root: PathBuf,
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

    fn folders(&self) -> Vec<PathBuf> {
        match self.0.is_empty() {
            true => vec![PathBuf::from(EMPTY)],
            false => self.0.iter().rev().map(folder_name).collect(),
        }
    }
}

fn folder_name(chain_id: &Digest) -> PathBuf {
    PathBuf::from(&chain_id.digest()[..NAME_LENGTH])
}

impl LayerCache {
    /// Opens the cache and removes what killed builds left, unless another build is at work.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root.join(EMPTY)).map_err(at(root))?;
        let lock = File::open(root).map_err(at(root))?;
        if lock.try_lock().is_ok() {
            for entry in fs::read_dir(root).map_err(at(root))? {
                let path = entry.map_err(at(root))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name.starts_with(NEW_PREFIX) {
                    fs::remove_dir_all(&path).map_err(at(&path))?;
                }
            }
            lock.unlock().map_err(at(root))?;
        }
        lock.lock_shared().map_err(at(root))?;
        Ok(Self { root: root.to_owned(), unpacking: Flights::new(), _lock: lock })
    }

    /// Unpacks those of the layers, lowest first, that are not there yet.
    pub(crate) fn unpack(&self, layers: &[Layer], console: &Console) -> Result<Chain, Error> {
        let mut chain = Chain::default();
        for (layer, number) in layers.iter().zip(1..) {
            let below = chain.clone();
            chain.push(&layer.diff_id);
            let Some(name) = chain.0.last().map(folder_name) else { continue };
            self.unpacking.once(&name, || {
                if self.take_up(&name, layer.store())? {
                    return Ok::<_, Error>(());
                }
                let _work = console.work(&format!("unpacking layer {number} of {}", layers.len()), None);
                let scratch = self.scratch(&below)?;
                let overlay = self.mount(&below, &scratch)?;
                unpack::apply(layer.open()?, &Rooted::open(&scratch.merged())?)?;
                overlay.unmount()?;
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
        let scratch = Scratch { folder };
        for name in [scratch.upper(), scratch.work(), scratch.merged()] {
            fs::create_dir(&name).map_err(at(&name))?;
        }
        let top = &below.folders()[0];
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
        Overlay::mount(&self.root, &below.folders(), Some(upper), &scratch.merged())
    }

    /// Makes the scratch's upper directory the chain's top layer. It must not be mounted.
    pub(crate) fn keep(&self, scratch: Scratch, chain: &Chain) -> Result<(), Error> {
        let Some(id) = chain.0.last() else { return Ok(()) };
        let upper = scratch.upper();
        let folder = File::open(&upper).map_err(at(&upper))?;
        rustix::fs::syncfs(&folder).map_err(at(&upper))?;
        let target = self.root.join(folder_name(id));
        match fs::rename(&upper, &target) {
            Ok(()) => {}
            // Another build was faster; the same chain id is the same files.
            Err(_) if target.is_dir() => return Ok(()),
            Err(error) => return Err(at(&target)(error)),
        }
        File::open(&self.root).and_then(|root| root.sync_all()).map_err(at(&self.root))
    }

    /// Whether the upper directory's root has another owner or mode than the chain's.
    pub(crate) fn root_changed(&self, below: &Chain, scratch: &Scratch) -> Result<bool, Error> {
        let attributes = |path: &Path| {
            let metadata = fs::metadata(path).map_err(at(path))?;
            Ok::<_, Error>((metadata.mode(), metadata.uid(), metadata.gid()))
        };
        let before = match below.0.is_empty() {
            true => (0o40755, 0, 0),
            false => attributes(&self.root.join(&below.folders()[0]))?,
        };
        Ok(attributes(&scratch.upper())? != before)
    }
}

/// A stack of unpacked layers to look at. Dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct Stack {
    // Before the overlay, which is busy as long as its root is open.
    root: Rooted,
    _overlay: Option<Overlay>,
    _target: Option<tempfile::TempDir>,
}

impl Stack {
    /// Mounts the chain read-only; with one layer there is nothing to mount.
    pub(crate) fn mount(cache: &LayerCache, chain: &Chain) -> Result<Self, Error> {
        let folders = chain.folders();
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

    /// A name that no other scratch on this machine has at this time.
    pub(crate) fn unique_name(&self) -> String {
        let folder = self.folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("tiffin-build-{}-{}", std::process::id(), folder.trim_start_matches(NEW_PREFIX))
    }

    fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }
}
