//! The guest's RAM: a file that is mapped privately, pages that were written over it, and a count of those.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub(crate) const PAGE: usize = 4096;

/// RAM of a machine.
pub(crate) struct Ram {
    size: u64,
    base: Option<File>,
    own: BTreeMap<u64, Vec<u8>>,
    /// Pages written since the last snapshot, where they are counted.
    written: Option<BTreeSet<u64>>,
}

impl Ram {
    pub(crate) fn empty(mib: u64, counts: bool) -> Self {
        Self { size: mib << 20, base: None, own: BTreeMap::new(), written: counts.then(BTreeSet::new) }
    }

    pub(crate) fn map(path: &Path, mib: u64, counts: bool) -> Result<Self, String> {
        // For reading alone: a private mapping asks for no more.
        let base = File::open(path).map_err(|error| format!("Failed to load guest memory: {error}"))?;
        let found = base.metadata().map_err(|error| error.to_string())?.len();
        if found != mib << 20 {
            return Err(format!("Failed to load guest memory: a file of {found} bytes for {mib} MiB"));
        }
        Ok(Self { base: Some(base), ..Self::empty(mib, counts) })
    }

    pub(crate) fn read(&self, page: u64) -> Vec<u8> {
        if let Some(own) = self.own.get(&page) {
            return own.clone();
        }
        let mut bytes = vec![0; PAGE];
        if let Some(base) = &self.base {
            base.read_exact_at(&mut bytes, page * PAGE as u64).unwrap();
        }
        bytes
    }

    pub(crate) fn write(&mut self, page: u64, text: &[u8]) {
        let mut bytes = text.to_vec();
        bytes.resize(PAGE, 0);
        self.own.insert(page, bytes);
        if let Some(written) = &mut self.written {
            written.insert(page);
        }
    }

    /// All of it, densely.
    pub(crate) fn save_full(&mut self, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() != self.size {
            file.set_len(0)?;
        }
        file.set_len(self.size)?;
        let mut out = io::BufWriter::with_capacity(1 << 20, &file);
        for page in 0..self.size / PAGE as u64 {
            out.write_all(&self.read(page))?;
        }
        out.flush()?;
        self.count_anew();
        Ok(())
    }

    /// What was written since the last snapshot, into a file that has the rest.
    pub(crate) fn save_diff(&mut self, path: &Path) -> io::Result<()> {
        let written = self.written.as_ref().ok_or_else(|| {
            io::Error::other(
                "Cannot get dirty bitmap: the pages are not counted, and what is resident is too little",
            )
        })?;
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        // An existing file of the RAM's size is what the pages are written over.
        if file.metadata()?.len() != self.size {
            file.set_len(0)?;
        }
        file.set_len(self.size)?;
        for &page in written {
            file.write_all_at(&self.own[&page], page * PAGE as u64)?;
        }
        self.count_anew();
        Ok(())
    }

    fn count_anew(&mut self) {
        if let Some(written) = &mut self.written {
            written.clear();
        }
    }
}
