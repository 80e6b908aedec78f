//! A folder of chunks, each named by its digest.
//!
//! ```text
//! STORE/chunk-store        says what this is, and in which version
//!       sha256/ab/cdef..   one zstd frame: the chunk whose digest begins with abcdef
//!       incoming/          what is being written
//! ```
//!
//! Chunks are always zstd, and never plain: of what does not compress zstd keeps the bytes, which costs 3 bytes for each
//! 128 KiB, and one form leaves nothing to tell apart. A chunk is written to `incoming`, synced and renamed, so that one
//! with its final name is whole; the sync is one of the whole file system for many chunks, because one for each costs a
//! turn of the disk. Any number of processes may write and read at once; pruning wants the store alone.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::{ChunkError, ContentDigest, Manifest};
use crate::Error;
use crate::error::at;

/// What says that a folder is a chunk store.
const MARKER: &str = "chunk-store";
/// Its contents.
const VERSION: &str = "tiffin chunk store 1\n";
const CHUNKS: &str = "sha256";
const INCOMING: &str = "incoming";

/// In chunks of 64 KiB a Debian root comes to 33.2 % of its size at level 1, to 31.7 % at 3 and to 29.5 % at 9, which takes
/// some eight times as long as 3.
const ZSTD_LEVEL: i32 = 3;

/// Chunks that are synced and renamed together: 64 MiB of them at the usual size.
const BATCH: usize = 1024;

/// A folder of chunks. While this lives, nobody prunes it.
#[derive(Debug)]
pub struct ChunkStore {
    root: PathBuf,
    /// The folder itself: locked, and a handle of its file system.
    folder: File,
}

/// What [`ChunkStore::prune`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Chunks that stay.
    pub kept: u64,
    /// Chunks that were removed.
    pub removed: u64,
    /// Bytes that they took.
    pub removed_bytes: u64,
    /// Chunks that the manifests name and the store has not.
    pub missing: u64,
}

impl ChunkStore {
    /// Opens a store that must be there. Waits while it is being pruned.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let folder = open_marked(root)?;
        folder.lock_shared().map_err(at(root))?;
        Ok(Self { root: root.to_owned(), folder })
    }

    /// Opens the store, making an empty one in a folder that is not there or empty. What an aborted writer left is
    /// removed when nobody else is at work.
    pub fn open_or_create(root: &Path) -> Result<Self, Error> {
        let marker = root.join(MARKER);
        if !marker.try_exists().map_err(at(&marker))? {
            create(root)?;
        }
        let folder = open_marked(root)?;
        if folder.try_lock().is_ok() {
            sweep(&root.join(INCOMING))?;
        }
        folder.lock_shared().map_err(at(root))?;
        Ok(Self { root: root.to_owned(), folder })
    }

    /// The contents of a chunk, checked: the length before anything is decompressed, then the digest.
    pub fn read(&self, digest: ContentDigest, length: u64) -> Result<Vec<u8>, Error> {
        let path = self.path_of(digest);
        let file = self.open_chunk(digest, &path)?;
        let damaged = |expected: String, got: String| {
            Error::from(ChunkError::Damaged { digest, expected, got, path: path.clone() })
        };
        // Chunks of a manifest are at most 16 MiB.
        let length = length as usize;
        let most = zstd::zstd_safe::compress_bound(length) as u64;
        let mut packed = Vec::new();
        file.take(most + 1).read_to_end(&mut packed).map_err(at(&path))?;
        if packed.len() as u64 > most {
            return Err(damaged(format!("a file of at most {most} bytes"), "more".to_owned()));
        }
        let bytes = unpack(&packed, length as u64, &damaged)?;
        let got = ContentDigest::of(&bytes);
        if got != digest {
            return Err(damaged(digest.to_string(), got.to_string()));
        }
        Ok(bytes)
    }

    pub(super) fn open_chunk(&self, digest: ContentDigest, path: &Path) -> Result<File, Error> {
        File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::from(ChunkError::Missing { digest, path: path.to_owned() }),
            _ => at(path)(error),
        })
    }

    /// Removes every chunk that none of `manifests` names. Refused while anybody else has the store open.
    pub fn prune(root: &Path, manifests: &[Manifest]) -> Result<PruneReport, Error> {
        let folder = open_marked(root)?;
        folder.try_lock().map_err(|_| ChunkError::Store {
            path: root.to_owned(),
            reason: "chunks are being written or read: prune when nobody does".to_owned(),
        })?;
        sweep(&root.join(INCOMING))?;
        let named: HashSet<ContentDigest> =
            manifests.iter().flat_map(Manifest::stored).map(|(digest, _)| digest).collect();
        let mut report = PruneReport::default();
        for shard in list(&root.join(CHUNKS))? {
            for path in list(&shard)? {
                // What is no chunk is not ours to remove.
                let Some(digest) = digest_of_path(&path) else { continue };
                if named.contains(&digest) {
                    report.kept += 1;
                    continue;
                }
                report.removed_bytes += fs::symlink_metadata(&path).map_err(at(&path))?.len();
                fs::remove_file(&path).map_err(at(&path))?;
                report.removed += 1;
            }
        }
        report.missing = named.len() as u64 - report.kept;
        Ok(report)
    }

    /// Whether a chunk of that digest is there. Its bytes are checked when they are read.
    pub fn has(&self, digest: ContentDigest) -> Result<bool, Error> {
        let path = self.path_of(digest);
        path.try_exists().map_err(at(&path))
    }

    /// Starts to add chunks.
    pub fn writer(&self) -> Result<ChunkWriter<'_>, Error> {
        let incoming = self.root.join(INCOMING);
        let folder = tempfile::tempdir_in(&incoming).map_err(at(&incoming))?;
        Ok(ChunkWriter { store: self, folder, state: Mutex::default() })
    }

    pub(super) fn path_of(&self, digest: ContentDigest) -> PathBuf {
        let hex = digest.hex();
        let (shard, name) = hex.split_at(2);
        [self.root.as_path(), CHUNKS.as_ref(), shard.as_ref(), name.as_ref()].iter().collect()
    }

    /// Everything written so far to the store's file system is on disk when this returns.
    fn sync(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.folder).map_err(|error| at(&self.root)(error.into()))
    }
}

/// What became of a chunk that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// It was there, or is being written.
    Known,
    /// It was not, and takes so many bytes.
    New(u64),
}

/// Adds chunks to a store, from several threads at once.
pub struct ChunkWriter<'a> {
    store: &'a ChunkStore,
    folder: tempfile::TempDir,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Chunks that some thread writes or has written, and that have not got their names.
    claimed: HashSet<ContentDigest>,
    /// Those of them that are written.
    written: Vec<ContentDigest>,
}

impl ChunkWriter<'_> {
    /// Adds a chunk; `digest` is that of `bytes`.
    pub(super) fn put(&self, digest: ContentDigest, bytes: &[u8], packer: &mut Packer) -> Result<Put, Error> {
        if !self.claim(digest)? {
            return Ok(Put::Known);
        }
        let path = self.incoming(digest);
        let packed = packer.pack(bytes).map_err(at(&path))?;
        self.write(digest, packed)?;
        Ok(Put::New(packed.len() as u64))
    }

    /// As [`ChunkWriter::put`] for a chunk that is packed. `None` where it was known.
    pub(super) fn put_packed(&self, digest: ContentDigest, packed: &[u8]) -> Result<Option<()>, Error> {
        match self.claim(digest)? {
            true => self.write(digest, packed).map(Some),
            false => Ok(None),
        }
    }

    /// Whether the chunk is one for the caller to write.
    fn claim(&self, digest: ContentDigest) -> Result<bool, Error> {
        // In this order: a chunk that is claimed no more has its name.
        if !self.state().claimed.insert(digest) {
            return Ok(false);
        }
        if self.store.has(digest)? {
            self.state().claimed.remove(&digest);
            return Ok(false);
        }
        Ok(true)
    }

    fn write(&self, digest: ContentDigest, packed: &[u8]) -> Result<(), Error> {
        let path = self.incoming(digest);
        let mut file = File::create_new(&path).map_err(at(&path))?;
        file.write_all(packed).map_err(at(&path))?;
        let mut state = self.state();
        state.written.push(digest);
        let full = state.written.len() >= BATCH;
        let batch = if full { std::mem::take(&mut state.written) } else { Vec::new() };
        drop(state);
        self.name(batch)
    }

    /// Gives the last chunks their names. All that were put are on disk when this returns.
    pub fn finish(self) -> Result<(), Error> {
        let rest = std::mem::take(&mut self.state().written);
        self.name(rest)?;
        // The names; also those of chunks that another writer has only just put there.
        self.store.sync()
    }

    fn name(&self, batch: Vec<ContentDigest>) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        self.store.sync()?;
        for digest in &batch {
            let path = self.store.path_of(*digest);
            fs::rename(self.incoming(*digest), &path).map_err(at(&path))?;
        }
        let mut state = self.state();
        for digest in &batch {
            state.claimed.remove(digest);
        }
        Ok(())
    }

    fn incoming(&self, digest: ContentDigest) -> PathBuf {
        self.folder.path().join(digest.hex())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Each change of the state is one call, so a thread that panicked left none half made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compresses, with memory that it keeps from one chunk to the next.
pub(super) struct Packer {
    compressor: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
}

impl Packer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { compressor: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, packed: Vec::new() })
    }

    fn pack(&mut self, bytes: &[u8]) -> io::Result<&[u8]> {
        self.packed.resize(zstd::zstd_safe::compress_bound(bytes.len()), 0);
        let length = self.compressor.compress_to_buffer(bytes, &mut self.packed[..])?;
        Ok(&self.packed[..length])
    }
}

/// The `length` bytes that are packed in a frame. What a frame says of its length is seen before anything is unpacked.
pub(super) fn unpack(
    packed: &[u8],
    length: u64,
    damaged: &dyn Fn(String, String) -> Error,
) -> Result<Vec<u8>, Error> {
    let promised = zstd::zstd_safe::get_frame_content_size(packed).ok().flatten();
    if promised != Some(length) {
        let got = promised.map_or("no zstd frame of known length".to_owned(), |got| format!("{got} bytes"));
        return Err(damaged(format!("{length} bytes"), got));
    }
    let mut bytes = vec![0; length as usize];
    let unpacked = zstd::bulk::decompress_to_buffer(packed, &mut bytes)
        .map_err(|error| damaged("a zstd frame".to_owned(), error.to_string()))?;
    bytes.truncate(unpacked);
    Ok(bytes)
}

/// The folder of a store, without a lock.
fn open_marked(root: &Path) -> Result<File, Error> {
    let marker = root.join(MARKER);
    let refuse = |reason: String| ChunkError::Store { path: root.to_owned(), reason };
    let mut version = Vec::new();
    match File::open(&marker) {
        Ok(file) => file.take(VERSION.len() as u64 + 1).read_to_end(&mut version).map_err(at(&marker))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refuse(format!("no chunk store: {MARKER} is missing")).into());
        }
        Err(error) => return Err(at(&marker)(error)),
    };
    if version != VERSION.as_bytes() {
        let got = String::from_utf8_lossy(&version);
        return Err(refuse(format!("{MARKER} says {got:?}, expected {VERSION:?}")).into());
    }
    File::open(root).map_err(at(root))
}

fn create(root: &Path) -> Result<(), Error> {
    fs::create_dir_all(root).map_err(at(root))?;
    let folder = File::open(root).map_err(at(root))?;
    folder.lock().map_err(at(root))?;
    // An earlier attempt may have ended on the way.
    let ours = |path: &Path| {
        let name = path.file_name().unwrap_or_default();
        [MARKER, CHUNKS, INCOMING].iter().any(|ours| name == *ours)
    };
    if let Some(foreign) = list(root)?.into_iter().find(|path| !ours(path)) {
        let name = foreign.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let reason = format!("neither a chunk store nor empty: it has {name:?}");
        return Err(ChunkError::Store { path: root.to_owned(), reason }.into());
    }
    let incoming = root.join(INCOMING);
    fs::create_dir_all(&incoming).map_err(at(&incoming))?;
    for shard in 0..=u8::MAX {
        let shard = root.join(CHUNKS).join(format!("{shard:02x}"));
        fs::create_dir_all(&shard).map_err(at(&shard))?;
    }
    let mut marker = tempfile::NamedTempFile::new_in(&incoming).map_err(at(&incoming))?;
    let path = root.join(MARKER);
    marker.write_all(VERSION.as_bytes()).and_then(|()| marker.as_file().sync_all()).map_err(at(&path))?;
    marker.persist(&path).map_err(|error| at(&path)(error.error))?;
    Ok(())
}

/// Removes what is in `incoming`.
fn sweep(incoming: &Path) -> Result<(), Error> {
    for path in list(incoming)? {
        let is_folder = fs::symlink_metadata(&path).map_err(at(&path))?.is_dir();
        let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(at(&path))?;
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    entries.map(|entry| Ok(entry.map_err(at(folder))?.path())).collect()
}

fn digest_of_path(path: &Path) -> Option<ContentDigest> {
    let name = path.file_name()?.to_str()?;
    let shard = path.parent()?.file_name()?.to_str()?;
    (shard.len() == 2).then(|| ContentDigest::from_hex(&format!("{shard}{name}"))).flatten()
}
