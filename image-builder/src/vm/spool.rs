//! Layers, decompressed once: files without a name, which are read at any place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use oci::{Digest, Layer};

use crate::error::{Error, at};

/// The layers of a build that were looked at.
#[derive(Debug)]
pub(super) struct Spools {
    /// Where they take their room.
    folder: PathBuf,
    files: Mutex<HashMap<Digest, Arc<Spool>>>,
}

/// The tar stream of a layer. Its digests were checked when it was written.
#[derive(Debug)]
pub(super) struct Spool(File);

impl Spools {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), files: Mutex::default() }
    }

    /// The layer's.
    pub(super) fn of(&self, layer: &Layer) -> Result<Arc<Spool>, Error> {
        if let Some(known) = self.lock().get(&layer.diff_id) {
            return Ok(Arc::clone(known));
        }
        let file = tempfile::tempfile_in(&self.folder).map_err(at(&self.folder))?;
        let mut writer = BufWriter::with_capacity(1 << 20, &file);
        let copied = io::copy(&mut layer.open()?, &mut writer).and_then(|_| writer.flush());
        copied.map_err(at(Path::new(&format!("layer {}", layer.descriptor.digest()))))?;
        drop(writer);
        let spool = Arc::new(Spool(file));
        self.lock().insert(layer.diff_id.clone(), Arc::clone(&spool));
        Ok(spool)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Spool>>> {
        self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Spool {
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    /// All of it, from its beginning.
    pub(super) fn reader(&self) -> SpoolReader<'_> {
        SpoolReader { spool: self, position: 0 }
    }
}

/// A reader of its own; others are not moved by it.
pub(super) struct SpoolReader<'a> {
    spool: &'a Spool,
    position: u64,
}

impl io::Read for SpoolReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.spool.0.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}
