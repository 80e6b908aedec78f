//! From chunks to the file that they make.

use std::io;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use serde::Serialize;

use super::{AHEAD, ChunkError, ChunkStore, ContentDigest, Entry, Manifest, workers};
use crate::Error;
use crate::error::at;
use crate::format::Sink;
use crate::output::Output;

/// What [`join()`] made.
#[derive(Clone, Debug, Serialize)]
pub struct JoinReport {
    /// Digest of the file.
    pub digest: ContentDigest,
    /// Length of the file in bytes.
    pub size: u64,
    /// Chunks that came from the store.
    pub stored: u64,
    /// Chunks that are holes.
    pub zero: u64,
}

/// Makes the file that `manifest` describes, sparse, from the chunks in the store. It appears at `output` when it is
/// whole, checked and on disk; on an error nothing is left behind.
pub fn join(manifest: &Manifest, store: &ChunkStore, output: &Path) -> Result<JoinReport, Error> {
    // First of all, so that a bad path costs nothing.
    let mut file = Output::create_hashed(output)?;
    let (mut stored, mut zero) = (0, 0);
    std::thread::scope(|scope| {
        let workers = workers();
        let mut channels = Vec::new();
        for first in 0..workers {
            let (chunks, received) = sync_channel(AHEAD);
            let wanted = manifest.stored().skip(first).step_by(workers);
            let read = move || {
                for (digest, length) in wanted {
                    let chunk = store.read(digest, length);
                    let failed = chunk.is_err();
                    // Nobody listens any more when another chunk has failed.
                    if chunks.send(chunk).is_err() || failed {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("unchunk".to_owned());
            thread.spawn_scoped(scope, read).map_err(at(output))?;
            channels.push(received);
        }
        let mut channels = channels.iter().cycle();
        for entry in manifest.entries() {
            match *entry {
                Entry::Zeros { zeros } => {
                    let end = file.position() + zeros * manifest.chunk_size().bytes();
                    file.zeros_to(end.min(manifest.size()))?;
                    zero += zeros;
                }
                Entry::Stored { .. } => {
                    let chunk = channels.next().and_then(|channel| channel.recv().ok());
                    let ended = || at(output)(io::Error::other("a thread has ended early"));
                    file.write(&chunk.ok_or_else(ended)??)?;
                    stored += 1;
                }
            }
        }
        Ok::<_, Error>(())
    })?;
    let expected = manifest.digest();
    file.publish_checked(|got| {
        let lie = || ChunkError::Lie { expected, got: got.to_string() };
        (got.as_ref() == expected.to_string()).then_some(()).ok_or_else(|| lie().into())
    })?;
    Ok(JoinReport { digest: expected, size: manifest.size(), stored, zero })
}
