//! From a file to chunks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::manifest::{Builder, MAX_SIZE, MAX_STORED_CHUNKS};
use super::store::{ChunkWriter, Packer, Put};
use super::{AHEAD, ChunkError, ChunkSize, ChunkStore, ContentDigest, Manifest, workers};
use crate::Error;
use crate::error::at;

/// What [`split()`] found.
#[derive(Clone, Debug, Serialize)]
pub struct SplitReport {
    /// Digest of the file.
    pub digest: ContentDigest,
    /// Length of the file in bytes.
    pub size: u64,
    /// Chunks of the file.
    pub chunks: u64,
    /// Those of them that are zeros, which the store does not keep.
    pub zero: u64,
    /// Those that the store did not have.
    pub new: u64,
    /// Those that it had, or that the file has more than once.
    pub reused: u64,
    /// Bytes of the new chunks.
    pub new_bytes: u64,
    /// Bytes that the new chunks take in the store, compressed.
    pub stored_bytes: u64,
    /// `stored_bytes` for each byte of the file.
    pub ratio: f64,
}

/// Puts the chunks of `file` into the store, and gives the manifest from which [`super::join()`] makes the file again.
///
/// The manifest depends on the file's bytes and the chunk size alone. Everything that it names is on disk when this
/// returns. On an error the store may have more chunks than before, which harm nobody.
pub fn split(file: &Path, store: &ChunkStore, size: ChunkSize) -> Result<(Manifest, SplitReport), Error> {
    let input = File::open(file).map_err(at(file))?;
    let metadata = input.metadata().map_err(at(file))?;
    if !metadata.is_file() {
        let reason = "expected a regular file".to_owned();
        return Err(Error::Invalid { what: file.display().to_string(), reason });
    }
    let source = Source { path: file, input, size: metadata.len(), chunk: size.bytes() };
    if source.size > MAX_SIZE {
        let reason = format!("it has {} bytes, at most {MAX_SIZE} are taken", source.size);
        return Err(ChunkError::TooLarge { file: file.to_owned(), reason }.into());
    }
    let writer = store.writer()?;
    let found = std::thread::scope(|scope| {
        let workers = workers();
        let mut channels = Vec::new();
        for first in 0..workers as u64 {
            let (results, received) = sync_channel(AHEAD);
            let (source, writer) = (&source, &writer);
            std::thread::Builder::new()
                .name("chunk".to_owned())
                .spawn_scoped(scope, move || source.work(first, workers, writer, &results))
                .map_err(at(file))?;
            channels.push(received);
        }
        collect(&source, size, &channels)
    })?;
    writer.finish()?;
    Ok(found)
}

/// Takes what the workers find in the order of the file.
fn collect(
    source: &Source<'_>,
    size: ChunkSize,
    workers: &[Receiver<Result<Found, Error>>],
) -> Result<(Manifest, SplitReport), Error> {
    let zeros = vec![0; source.chunk as usize];
    let (mut hasher, mut builder) = (Sha256::new(), Builder::new(size));
    let (mut zero, mut new, mut reused, mut new_bytes, mut stored_bytes) = (0, 0, 0, 0, 0);
    let chunks = source.size.div_ceil(source.chunk);
    for (index, worker) in (0..chunks).zip(workers.iter().cycle()) {
        let ended = || at(source.path)(io::Error::other("a thread has ended early"));
        match worker.recv().map_err(|_| ended())?? {
            Found::Zeros(length) => {
                hasher.update(&zeros[..length]);
                builder.zero();
                zero += 1;
            }
            Found::Data { bytes, digest, put } => {
                hasher.update(&bytes);
                match put {
                    Put::Known => reused += 1,
                    Put::New(packed) => {
                        new += 1;
                        new_bytes += bytes.len() as u64;
                        stored_bytes += packed;
                    }
                }
                if builder.stored(digest, bytes.len() as u64) > MAX_STORED_CHUNKS {
                    let reason = format!(
                        "up to byte {} it has more than {MAX_STORED_CHUNKS} chunks of {} bytes that are not zero",
                        index * source.chunk,
                        source.chunk
                    );
                    return Err(ChunkError::TooLarge { file: source.path.to_owned(), reason }.into());
                }
            }
        }
    }
    let digest = ContentDigest::finish(hasher);
    let ratio = if source.size == 0 { 0.0 } else { stored_bytes as f64 / source.size as f64 };
    let report =
        SplitReport { digest, size: source.size, chunks, zero, new, reused, new_bytes, stored_bytes, ratio };
    Ok((builder.finish(source.size, digest), report))
}

/// The file that is read, by several threads.
struct Source<'a> {
    path: &'a Path,
    input: File,
    size: u64,
    chunk: u64,
}

/// A chunk of the file.
enum Found {
    /// So many zeros.
    Zeros(usize),
    Data {
        bytes: Vec<u8>,
        digest: ContentDigest,
        put: Put,
    },
}

impl Source<'_> {
    /// Reads, hashes and stores the chunks `first`, `first + step` and so on, until nobody listens.
    fn work(
        &self,
        first: u64,
        step: usize,
        writer: &ChunkWriter<'_>,
        results: &SyncSender<Result<Found, Error>>,
    ) {
        let mut packer = match Packer::new().map_err(at(self.path)) {
            Ok(packer) => packer,
            Err(error) => return drop(results.send(Err(error))),
        };
        for index in (first..self.size.div_ceil(self.chunk)).step_by(step) {
            let found = self.chunk(index, writer, &mut packer);
            let failed = found.is_err();
            if results.send(found).is_err() || failed {
                return;
            }
        }
    }

    fn chunk(&self, index: u64, writer: &ChunkWriter<'_>, packer: &mut Packer) -> Result<Found, Error> {
        let start = index * self.chunk;
        let mut bytes = vec![0; (self.size - start).min(self.chunk) as usize];
        self.input.read_exact_at(&mut bytes, start).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::from(ChunkError::Changed {
                file: self.path.to_owned(),
                expected: self.size,
                at: start + bytes.len() as u64 - 1,
            }),
            _ => at(self.path)(error),
        })?;
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(Found::Zeros(bytes.len()));
        }
        let digest = ContentDigest::of(&bytes);
        let put = writer.put(digest, &bytes, packer)?;
        Ok(Found::Data { bytes, digest, put })
    }
}
