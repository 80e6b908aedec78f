//! The digests of a context's files, so that a file that did not change is not read again.
//!
//! A file is the same as long as device, inode, size and both of its times are: the time of the last change of the inode
//! cannot be set by anybody, only the clock of the machine. As with git's index, a file that changed less than two seconds
//! before it was read is not remembered: it could change again within the same tick of the clock.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci::layer::LayerPath;
use oci::{Digest, Hasher};
use rustix::fs::Stat;

use crate::cache::read_bounded;
use crate::durable;
use crate::error::{Error, at};
use crate::rooted::Rooted;
use crate::tree::{Entry, Tree};

/// Changes with the form of the file.
const MAGIC: &[u8; 8] = b"tiffinD1";
/// Device, inode, size, two times in nanoseconds, digest.
const RECORD: usize = 5 * 8 + 32;
/// As many files as one COPY may have.
const MAX_FILES: usize = 1_000_000;
/// How many contexts are remembered; the one that was used least recently goes first.
const MAX_CONTEXTS: usize = 64;
/// Kernels tick at least a hundred times a second, FAT every two seconds.
const RACY: Duration = Duration::from_secs(2);
/// More threads than this wait for the same disk.
const MAX_THREADS: usize = 8;
const READ_BUFFER: usize = 128 << 10;

/// What is known of a context's files.
#[derive(Debug)]
pub(crate) struct FileDigests {
    path: PathBuf,
    state: Mutex<State>,
    now: fn() -> SystemTime,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<Inode, Known>,
    changed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Inode {
    device: u64,
    number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    version: Version,
    digest: [u8; 32],
}

/// What differs when a file was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    size: u64,
    modified: i64,
    changed: i64,
}

impl Version {
    fn of(stat: &Stat) -> Self {
        let time = |seconds: i64, nanoseconds: u64| {
            seconds.saturating_mul(1_000_000_000).saturating_add_unsigned(nanoseconds)
        };
        Self {
            size: stat.st_size as u64,
            modified: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    fn is_racy(&self, now: SystemTime) -> bool {
        let before = now.checked_sub(RACY).and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let before = before.and_then(|time| i64::try_from(time.as_nanos()).ok()).unwrap_or_default();
        self.modified.max(self.changed) >= before
    }
}

impl FileDigests {
    /// What earlier builds found out about the context in that folder. A damaged file is as good as none.
    pub(crate) fn open(folder: &Path, context: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        let name = Hasher::digest_of(context.as_os_str().as_encoded_bytes());
        let path = folder.join(&name.digest()[..32]);
        let limit = (MAX_FILES * RECORD + MAGIC.len() + 32) as u64;
        let known = read_bounded(&path, limit).ok().and_then(|text| parse(&text)).unwrap_or_default();
        Ok(Self { path, state: Mutex::new(State { known, changed: false }), now: SystemTime::now })
    }

    /// Keeps what was found out for the next build.
    fn save(&self) -> Result<(), Error> {
        let state = self.lock();
        if !state.changed {
            return Ok(());
        }
        let mut text = MAGIC.to_vec();
        for (inode, known) in state.known.iter().take(MAX_FILES) {
            for number in [inode.device, inode.number, known.version.size] {
                text.extend_from_slice(&number.to_le_bytes());
            }
            for number in [known.version.modified, known.version.changed] {
                text.extend_from_slice(&number.to_le_bytes());
            }
            text.extend_from_slice(&known.digest);
        }
        let check = digest_bytes(&Hasher::digest_of(&text));
        text.extend_from_slice(&check);
        durable::write_lazily(&self.path, &text)?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(at(folder))? {
            let entry = entry.map_err(at(folder))?;
            let used = entry.metadata().and_then(|metadata| metadata.modified());
            // Another build may have taken it away.
            files.extend(used.ok().map(|used| (used, entry.path())));
        }
        files.sort();
        for (_, path) in files.iter().take(files.len().saturating_sub(MAX_CONTEXTS)) {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    fn digest(&self, root: &Rooted, path: &LayerPath) -> Result<Digest, Error> {
        let shown = || root.shown(path);
        if let Some(stat) = root.stat(path)?
            && let Some(known) = self.lock().known.get(&inode_of(&stat))
            && known.version == Version::of(&stat)
        {
            return Ok(digest_of_bytes(&known.digest));
        }
        let mut file = root.file(path)?;
        let now = (self.now)();
        let before = rustix::fs::fstat(&file).map_err(at(&shown()))?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; READ_BUFFER.min(before.st_size as usize + 1)];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(at(&shown())(error)),
            }
        }
        let digest = hasher.finish().0;
        let after = rustix::fs::fstat(&file).map_err(at(&shown()))?;
        let version = Version::of(&before);
        if version == Version::of(&after) && !version.is_racy(now) {
            let mut state = self.lock();
            let known = Known { version, digest: digest_bytes(&digest) };
            if state.known.len() < MAX_FILES || state.known.contains_key(&inode_of(&before)) {
                state.known.insert(inode_of(&before), known);
                state.changed = true;
            }
        }
        Ok(digest)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn inode_of(stat: &Stat) -> Inode {
    Inode { device: stat.st_dev, number: stat.st_ino }
}

fn parse(text: &[u8]) -> Option<HashMap<Inode, Known>> {
    let (text, check) = text.split_last_chunk::<32>()?;
    if digest_bytes(&Hasher::digest_of(text)) != *check {
        return None;
    }
    let records = text.strip_prefix(MAGIC)?.chunks_exact(RECORD);
    let mut known = HashMap::with_capacity(records.len());
    for record in records {
        let (numbers, digest) = record.split_at_checked(5 * 8)?;
        let number = |index: usize| {
            numbers
                .get(8 * index..8 * index + 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map(u64::from_le_bytes)
        };
        let version = Version {
            size: number(2)?,
            modified: number(3)?.cast_signed(),
            changed: number(4)?.cast_signed(),
        };
        let inode = Inode { device: number(0)?, number: number(1)? };
        known.insert(inode, Known { version, digest: digest.try_into().ok()? });
    }
    Some(known)
}

fn digest_bytes(digest: &Digest) -> [u8; 32] {
    let mut bytes = [0; 32];
    let text = digest.digest().as_bytes();
    let nibble = |digit: u8| (digit as char).to_digit(16).unwrap_or_default() as u8;
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = nibble(pair[0]) << 4 | nibble(pair[1]);
    }
    bytes
}

fn digest_of_bytes(bytes: &[u8; 32]) -> Digest {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(71);
    text.push_str("sha256:");
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    Digest::try_from(text).expect("64 hexadecimal digits are a digest")
}

/// The files of a context, with digests from [`FileDigests`].
#[derive(Debug)]
pub(crate) struct ContextTree {
    root: Rooted,
    digests: FileDigests,
    /// What [`ContextTree::read_ahead`] found; each is used once, at once.
    ahead: Mutex<BTreeMap<LayerPath, Digest>>,
}

impl ContextTree {
    pub(crate) fn new(root: Rooted, digests: FileDigests) -> Self {
        Self { root, digests, ahead: Mutex::default() }
    }

    /// Keeps what was found out for the next build.
    pub(crate) fn save(&self) -> Result<(), Error> {
        self.digests.save()
    }

    /// Computes the digests that are about to be asked for on several threads.
    pub(crate) fn read_ahead(&self, paths: &[&LayerPath]) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut found = Vec::new();
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                // Who asks for this one meets the error.
                if let Ok(digest) = self.digests.digest(&self.root, path) {
                    found.push(((*path).clone(), digest));
                }
            }
            self.ahead.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(found);
        };
        if threads > 1 && paths.len() > 1 {
            std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        }
    }
}

impl Tree for ContextTree {
    fn entry(&self, path: &LayerPath) -> Result<Option<Entry>, Error> {
        self.root.entry(path)
    }

    fn read_link(&self, path: &LayerPath) -> Result<Vec<u8>, Error> {
        Tree::read_link(&self.root, path)
    }

    fn names(&self, path: &LayerPath) -> Result<Vec<Vec<u8>>, Error> {
        Tree::names(&self.root, path)
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
        Tree::shown(&self.root, path)
    }

    fn content_digest(&self, path: &LayerPath) -> Result<Digest, Error> {
        let ahead = self.ahead.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(path);
        ahead.map_or_else(|| self.digests.digest(&self.root, path), Ok)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn an_old_file_is_read_once_and_a_changed_one_again() {
        let dir = tempfile::tempdir().unwrap();
        let (context, cache) = (dir.path().join("context"), dir.path().join("cache"));
        fs::create_dir(&context).unwrap();
        fs::write(context.join("a"), "old").unwrap();
        let path = LayerPath::parse(b"a").unwrap();
        let look_at = |now: fn() -> SystemTime| {
            let digests = FileDigests { now, ..FileDigests::open(&cache, &context).unwrap() };
            let tree = ContextTree::new(Rooted::open(&context).unwrap(), digests);
            let digest = tree.content_digest(&path).unwrap();
            tree.save().unwrap();
            (digest, tree.digests.lock().changed)
        };
        let look = || look_at(SystemTime::now);
        let is = |text: &str| Hasher::digest_of(text.as_bytes());
        assert_eq!(look(), (is("old"), false), "it was changed just now");
        assert_eq!(look_at(|| SystemTime::now() + 2 * RACY), (is("old"), true));
        assert_eq!(look(), (is("old"), false), "it was known");
        // The same size and time of change: the inode's own time tells.
        let modified = fs::metadata(context.join("a")).unwrap().modified().unwrap();
        fs::write(context.join("a"), "new").unwrap();
        File::options().write(true).open(context.join("a")).unwrap().set_modified(modified).unwrap();
        assert_eq!(look(), (is("new"), false));
        let file = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        fs::write(&file, b"damaged").unwrap();
        assert_eq!(look().0, is("new"));
    }

    #[test]
    fn reading_ahead_finds_the_same_digests() {
        let dir = tempfile::tempdir().unwrap();
        let context = dir.path().join("context");
        fs::create_dir(&context).unwrap();
        let paths: Vec<_> =
            (0..100).map(|number| LayerPath::parse(format!("{number}").as_bytes()).unwrap()).collect();
        paths.iter().for_each(|path| fs::write(context.join(path.as_path()), path.as_bytes()).unwrap());
        let root = Rooted::open(&context).unwrap();
        let digests = FileDigests::open(dir.path(), &context).unwrap();
        let tree = ContextTree::new(root, digests);
        tree.read_ahead(&paths.iter().collect::<Vec<_>>());
        for path in &paths {
            assert_eq!(tree.content_digest(path).unwrap(), Hasher::digest_of(path.as_bytes()));
        }
        assert!(tree.ahead.lock().unwrap().is_empty(), "each is used once");
    }

    #[test]
    fn the_file_is_bounded_by_its_form() {
        assert!(parse(b"").is_none() && parse(&[0; 100]).is_none());
        let digest = Hasher::digest_of(b"x");
        assert_eq!(digest_of_bytes(&digest_bytes(&digest)), digest);
    }
}
