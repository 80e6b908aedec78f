//! The file being written: sequential, sparse, hashed on the way, and in its place only when it is whole.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use oci::{Digest, Hasher};

use crate::Error;
use crate::error::at;
use crate::format::Sink;

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// Buffers that may wait to be written and hashed.
const QUEUE: usize = 6;

/// Blocks of zeros of this size become holes of the host's file.
const HOLE: usize = 4096;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A file under a temporary name beside its final one. Dropped without [`Output::publish`] it leaves nothing.
pub(crate) struct Output {
    file: tempfile::NamedTempFile,
    target: PathBuf,
    buffer: Vec<u8>,
    filled: usize,
    /// Where the buffer's first byte belongs.
    flushed: u64,
    /// Writes and hashes full buffers, each on a thread of its own; without it they are written at once and not hashed.
    behind: Option<WriteBehind>,
}

impl Output {
    /// Starts the file that will be `target`.
    pub(crate) fn create(target: &Path) -> Result<Self, Error> {
        if target.file_name().is_none() || target.is_dir() {
            let reason = "expected the name of a file to write, not of a folder".to_owned();
            return Err(Error::Invalid { what: target.display().to_string(), reason });
        }
        let folder = folder_of(target);
        let file = tempfile::Builder::new()
            .prefix(".rootfs-tools-")
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(folder)
            .map_err(at(folder))?;
        let target = target.to_owned();
        Ok(Self { file, target, buffer: vec![0; BUFFER], filled: 0, flushed: 0, behind: None })
    }

    /// As [`Output::create`]; the file is written and hashed on threads of their own, beside the reading and checking of the
    /// layers.
    pub(crate) fn create_hashed(target: &Path) -> Result<Self, Error> {
        let mut output = Self::create(target)?;
        output.behind = Some(WriteBehind::start(output.file.as_file()).map_err(at(target))?);
        Ok(output)
    }

    /// Where the file will be: a place for what is needed on the way to it.
    pub(crate) fn folder(&self) -> &Path {
        folder_of(&self.target)
    }

    /// Ends the file and gives it its name. It is left to the page cache: a power cut may take it.
    pub(crate) fn publish(mut self) -> Result<(), Error> {
        self.end()?;
        self.rename()
    }

    /// Ends the file, syncs it, gives it its name, and says its digest.
    pub(crate) fn publish_hashed(self) -> Result<Digest, Error> {
        self.publish_checked(|_| Ok(()))
    }

    /// As [`Output::publish_hashed`], unless `check` refuses the digest.
    pub(crate) fn publish_checked(
        mut self,
        check: impl FnOnce(&Digest) -> Result<(), Error>,
    ) -> Result<Digest, Error> {
        // A thread that failed is gone; whoever went on after its error ends here.
        let digest = self.end()?.ok_or_else(|| io::Error::other("the hashing thread has ended early"));
        let digest = digest.map_err(at(&self.target))?;
        check(&digest)?;
        self.file.as_file().sync_all().map_err(at(&self.target))?;
        let folder = folder_of(&self.target).to_owned();
        self.rename()?;
        // rename alone is not enough after a power cut.
        File::open(&folder).and_then(|folder| folder.sync_all()).map_err(at(&folder))?;
        Ok(digest)
    }

    /// Writes what is left; the digest, if the file is hashed.
    fn end(&mut self) -> Result<Option<Digest>, Error> {
        self.flush()?;
        let digest = self.behind.take().map(WriteBehind::finish).transpose().map_err(at(&self.target))?;
        self.file.as_file().set_len(self.flushed).map_err(at(&self.target))?;
        Ok(digest)
    }

    fn rename(self) -> Result<(), Error> {
        self.file.persist(&self.target).map_err(|error| at(&self.target)(error.error))?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        match &self.behind {
            Some(behind) => {
                let mut spare = behind.spare.try_recv().unwrap_or_default();
                spare.resize(BUFFER, 0);
                let mut full = std::mem::replace(&mut self.buffer, spare);
                full.truncate(self.filled);
                self.send(Chunk::Bytes(Arc::new(full), self.flushed))?;
            }
            None => {
                let bytes = &self.buffer[..self.filled];
                write_sparse(self.file.as_file(), bytes, self.flushed).map_err(at(&self.target))?;
            }
        }
        self.flushed += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    fn send(&mut self, chunk: Chunk) -> Result<(), Error> {
        let refused = self.behind.as_ref().is_some_and(|behind| !behind.send(chunk));
        // Only a thread that failed refuses; its end says why.
        match self.behind.take_if(|_| refused).map(WriteBehind::finish) {
            Some(Err(error)) => Err(at(&self.target)(error)),
            _ => Ok(()),
        }
    }
}

impl Sink for Output {
    fn position(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    fn room(&mut self, wanted: u64) -> Result<&mut [u8], Error> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        let room = &mut self.buffer[self.filled..];
        let length = usize::try_from(wanted).unwrap_or(usize::MAX).min(room.len());
        Ok(&mut room[..length])
    }

    fn advance(&mut self, count: usize) {
        self.filled += count;
    }

    fn zeros_to(&mut self, position: u64) -> Result<(), Error> {
        let gap = position.saturating_sub(self.position());
        if gap <= (self.buffer.len() - self.filled) as u64 {
            let end = self.filled + gap as usize;
            self.buffer[self.filled..end].fill(0);
            self.filled = end;
            return Ok(());
        }
        self.flush()?;
        self.flushed += gap;
        self.send(Chunk::Zeros(gap))
    }
}

fn folder_of(target: &Path) -> &Path {
    target.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

/// Writes what is not zero.
fn write_sparse(file: &File, bytes: &[u8], position: u64) -> io::Result<()> {
    let mut from = 0;
    while from < bytes.len() {
        let is_hole = |at: usize| bytes[at..bytes.len().min(at + HOLE)].iter().all(|&byte| byte == 0);
        let hole = is_hole(from);
        let mut to = from;
        while to < bytes.len() && is_hole(to) == hole {
            to = bytes.len().min(to + HOLE);
        }
        if !hole {
            file.write_all_at(&bytes[from..to], position + from as u64)?;
        }
        from = to;
    }
    Ok(())
}

#[derive(Clone)]
enum Chunk {
    /// Bytes, and where they belong.
    Bytes(Arc<Vec<u8>>, u64),
    Zeros(u64),
}

/// Two threads that write and hash chunks in the order in which they are sent.
struct WriteBehind {
    to_writer: SyncSender<Chunk>,
    to_hasher: SyncSender<Chunk>,
    /// Buffers that both are done with.
    spare: Receiver<Vec<u8>>,
    writer: JoinHandle<io::Result<()>>,
    hasher: JoinHandle<Digest>,
}

impl WriteBehind {
    fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (to_writer, for_writer) = sync_channel(QUEUE);
        let (to_hasher, for_hasher) = sync_channel(QUEUE);
        let (returned, spare) = channel();
        let also_returned = returned.clone();
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let writer = thread("write").spawn(move || write_all(&file, &for_writer, &returned))?;
        let hasher = thread("hash").spawn(move || hash_all(&for_hasher, &also_returned))?;
        Ok(Self { to_writer, to_hasher, spare, writer, hasher })
    }

    /// Whether both took it.
    fn send(&self, chunk: Chunk) -> bool {
        self.to_hasher.send(chunk.clone()).is_ok() && self.to_writer.send(chunk).is_ok()
    }

    /// Waits for what was sent; the digest of all of it.
    fn finish(self) -> io::Result<Digest> {
        drop((self.to_writer, self.to_hasher));
        let panicked = || io::Error::other("a writing thread has panicked");
        let digest = self.hasher.join().map_err(|_| panicked());
        self.writer.join().map_err(|_| panicked())??;
        digest
    }
}

fn write_all(file: &File, chunks: &Receiver<Chunk>, returned: &Sender<Vec<u8>>) -> io::Result<()> {
    for chunk in chunks {
        if let Chunk::Bytes(bytes, position) = chunk {
            write_sparse(file, &bytes, position)?;
            give_back(bytes, returned);
        }
    }
    Ok(())
}

fn hash_all(chunks: &Receiver<Chunk>, returned: &Sender<Vec<u8>>) -> Digest {
    let mut hasher = Hasher::new();
    for chunk in chunks {
        match chunk {
            Chunk::Bytes(bytes, _) => {
                hasher.update(&bytes);
                give_back(bytes, returned);
            }
            Chunk::Zeros(mut count) => {
                while count > 0 {
                    let now = count.min(ZEROS.len() as u64);
                    hasher.update(&ZEROS[..now as usize]);
                    count -= now;
                }
            }
        }
    }
    hasher.finish().0
}

/// The last one that has the buffer returns it.
fn give_back(bytes: Arc<Vec<u8>>, returned: &Sender<Vec<u8>>) {
    if let Some(bytes) = Arc::into_inner(bytes) {
        // Nobody wants it back when the sender has failed.
        let _ = returned.send(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_holes_and_digest_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut output = Output::create_hashed(&path).unwrap();
        let mut expected = Vec::new();
        for (bytes, end) in [(10, 5000), (BUFFER + 7, 3 * BUFFER as u64), (1, 3 * BUFFER as u64 + 1)] {
            let data: Vec<u8> = (0..bytes).map(|n| n as u8 | 1).collect();
            output.write(&data).unwrap();
            expected.extend_from_slice(&data);
            output.zeros_to(end).unwrap();
            expected.resize(end as usize, 0);
            assert_eq!(output.position(), end);
        }
        output.zeros_to(64 << 20).unwrap();
        expected.resize(64 << 20, 0);
        let digest = output.publish_hashed().unwrap();
        let written = fs::read(&path).unwrap();
        assert!(written == expected);
        assert_eq!(digest, Hasher::digest_of(&expected));
        use std::os::unix::fs::MetadataExt;
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 8 << 20, "the zeros are holes");
    }

    /// What the thread ran into is what the caller hears.
    #[test]
    fn errors_of_the_thread_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create_hashed(&dir.path().join("out")).unwrap();
        let read_only = File::open(output.file.path()).unwrap();
        output.behind = Some(WriteBehind::start(&read_only).unwrap());
        let error = (0..QUEUE + 3).find_map(|_| output.write(&vec![1; BUFFER]).err());
        let error = error.or_else(|| output.publish_hashed().err()).unwrap();
        assert!(error.to_string().contains("Bad file descriptor"), "{error}");
    }

    #[test]
    fn nothing_is_left_without_publish() {
        let dir = tempfile::tempdir().unwrap();
        let mut output = Output::create_hashed(&dir.path().join("out")).unwrap();
        output.write(b"half").unwrap();
        drop(output);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Output::create(dir.path()).is_err(), "a folder");
    }
}
