//! Compressed layers, decompressed once: into files without names beside the output, checked on the way.
//!
//! ```text
//! blob ──► decompressor ──► channel ──► blob digest, diff_id, spool file
//!          one thread                   another thread, for each layer that is under way
//! ```
//!
//! Nobody reads a spool before the digests of its layer are known to be right, and nobody else can write to it: what comes
//! out of it needs no further check.

use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use oci::{Digest, DigestMismatch, Hasher, Layer};

use crate::Error;
use crate::error::at;

/// Bytes that are handed over at once.
const BUFFER: usize = 256 << 10;

/// Buffers between the two threads of a layer.
const QUEUE: usize = 16;

/// A layer's spool, or why there is none.
type Outcome = Result<File, Error>;

/// Threads that decompress `layers`, lowest first, as many at a time as `threads`; runs `body` with a receiver for each layer
/// meanwhile.
pub(crate) fn with_spools<T>(
    layers: &[&Layer],
    folder: &Path,
    threads: NonZeroUsize,
    body: impl FnOnce(Vec<Receiver<Outcome>>) -> T,
) -> Result<T, Error> {
    // Taken out by who answers, so that one who ends without an answer is noticed.
    let (senders, receivers): (Vec<Mutex<Option<SyncSender<Outcome>>>>, Vec<_>) = layers
        .iter()
        .map(|_| {
            let (sender, receiver) = sync_channel(1);
            (Mutex::new(Some(sender)), receiver)
        })
        .unzip();
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let sender = senders.get(index).and_then(|sender| sender.lock().ok()?.take());
            let (Some(layer), Some(sender)) = (layers.get(index), sender) else { return };
            let outcome = spool(layer, folder);
            let failed = outcome.is_err();
            // Nobody waits for it any more when a layer below has failed.
            if sender.send(outcome).is_err() || failed {
                next.store(layers.len(), Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads.get().min(layers.len()) {
            let builder = thread::Builder::new().name("decompress".to_owned());
            builder.spawn_scoped(scope, work).map_err(at(folder))?;
        }
        let done = body(receivers);
        next.store(layers.len(), Ordering::Relaxed);
        Ok(done)
    })
}

/// What a worker that ended without an answer left behind.
pub(crate) fn gone() -> Error {
    Error::Io {
        path: PathBuf::from("layers"),
        error: io::Error::other("a decompressing thread has ended early"),
    }
}

enum Part {
    /// Bytes of the blob.
    Blob(Vec<u8>),
    /// Bytes of the tar stream.
    Stream(Vec<u8>),
}

fn spool(layer: &Layer, folder: &Path) -> Outcome {
    let what = format!("layer {}", layer.descriptor.digest());
    // Opened by the store first, which says what is missing.
    drop(layer.store().open_blob(&layer.descriptor)?);
    let path = layer.store().blob_path(layer.descriptor.digest())?;
    let blob = File::open(&path).map_err(at(&path))?;
    let mut file = tempfile::tempfile_in(folder).map_err(at(folder))?;
    let (parts, received) = sync_channel(QUEUE);
    let (returned, spare) = channel();
    let target = &mut file;
    let (decompressed, checked) = thread::scope(|scope| {
        let builder = thread::Builder::new().name("check".to_owned());
        let checker: ScopedJoinHandle<'_, io::Result<Digests>> =
            match builder.spawn_scoped(scope, move || check(&received, &returned, target)) {
                Ok(checker) => checker,
                Err(error) => return (Ok(()), Err(error)),
            };
        let decompressed = decompress(layer, blob, parts, &spare);
        let checked =
            checker.join().unwrap_or_else(|_| Err(io::Error::other("the checking thread has panicked")));
        (decompressed, checked)
    });
    let Digests { blob, stream } = checked.map_err(at(folder))?;
    let (got, size) = match &decompressed {
        Ok(()) => blob.finish(),
        // It may have ended before the blob did.
        Err(_) => digest_of(&path, layer.descriptor.size()).map_err(at(&path))?,
    };
    let mismatch = |what: String, expected: String, got: String| {
        let reason = DigestMismatch { what, expected, got }.to_string();
        Error::Image(oci::Error::Corrupt { what: format!("layer {}", layer.descriptor.digest()), reason })
    };
    // Damage is better explained by the digest than by what the damage looks like, so the blob comes first.
    let name = || format!("blob {}", layer.descriptor.digest());
    if size != layer.descriptor.size() {
        let more = if size > layer.descriptor.size() { "at least " } else { "" };
        return Err(mismatch(
            name(),
            format!("{} bytes", layer.descriptor.size()),
            format!("{more}{size} bytes"),
        ));
    }
    if got != *layer.descriptor.digest() {
        return Err(mismatch(name(), layer.descriptor.digest().to_string(), got.to_string()));
    }
    decompressed.map_err(|error| match error {
        Failed::Oci(error) => Error::Image(error),
        Failed::Io(error) => match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
                Error::Image(oci::Error::Corrupt { what: what.clone(), reason: error.to_string() })
            }
            _ => Error::Image(oci::Error::Io { path: what.clone().into(), error }),
        },
    })?;
    let (got, _) = stream.finish();
    if got != layer.diff_id {
        return Err(mismatch(format!("{what} (diff_id)"), layer.diff_id.to_string(), got.to_string()));
    }
    Ok(file)
}

/// The digest of a blob that promises `size` bytes, and how many it has, one more at the most.
fn digest_of(path: &Path, size: u64) -> io::Result<(Digest, u64)> {
    let mut blob = File::open(path)?.take(size.saturating_add(1));
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

enum Failed {
    Oci(oci::Error),
    Io(io::Error),
}

/// Sends the blob and what it decompresses to.
fn decompress(
    layer: &Layer,
    blob: File,
    parts: SyncSender<Part>,
    spare: &Receiver<Vec<u8>>,
) -> Result<(), Failed> {
    // One byte more than promised is enough to know.
    let blob = blob.take(layer.descriptor.size().saturating_add(1));
    let blob = Tee { inner: blob, seen: Vec::with_capacity(BUFFER), parts: parts.clone() };
    let mut stream = layer.decompress(blob).map_err(Failed::Oci)?;
    loop {
        let mut buffer = spare.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let mut filled = 0;
        while filled < buffer.len() {
            match stream.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failed::Io(error)),
            }
        }
        let ended = filled < buffer.len();
        buffer.truncate(filled);
        if parts.send(Part::Stream(buffer)).is_err() || ended {
            return Ok(());
        }
    }
}

/// Passes a blob on and sends a copy of it, at the latest when it is dropped. Decoders read little at a time: sent as it
/// comes it would fill the queue, and the decoder would wait for the checks.
struct Tee<R> {
    inner: R,
    seen: Vec<u8>,
    parts: SyncSender<Part>,
}

impl<R> Tee<R> {
    fn send(&mut self) -> io::Result<()> {
        let seen = std::mem::replace(&mut self.seen, Vec::with_capacity(BUFFER));
        // If nobody receives it, the checks have failed, and say why.
        self.parts.send(Part::Blob(seen)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl<R> Drop for Tee<R> {
    fn drop(&mut self) {
        let _ = self.parts.send(Part::Blob(std::mem::take(&mut self.seen)));
    }
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if self.seen.len() + count > BUFFER {
            self.send()?;
        }
        self.seen.extend_from_slice(&buffer[..count]);
        Ok(count)
    }
}

#[derive(Default)]
struct Digests {
    blob: Hasher,
    stream: Hasher,
}

fn check(parts: &Receiver<Part>, returned: &Sender<Vec<u8>>, spool: &mut File) -> io::Result<Digests> {
    let mut digests = Digests::default();
    for part in parts {
        match part {
            Part::Blob(bytes) => digests.blob.update(&bytes),
            Part::Stream(bytes) => {
                digests.stream.update(&bytes);
                spool.write_all(&bytes)?;
                // Nobody wants it back when the sender has ended.
                let _ = returned.send(bytes);
            }
        }
    }
    Ok(digests)
}
