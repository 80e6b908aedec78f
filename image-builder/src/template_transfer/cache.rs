//! The chunks that this machine has of its templates: `cache/template-chunks`, with the lists that name them beside it.
//!
//! It holds what the templates that are here were last sent or fetched as, and is cut back to that after each transfer.

use std::path::{Path, PathBuf};

use rootfs_tools::chunk::{ChunkStore, Manifest, split};
use template::{DataDir, TemplateFolder};

use super::artifact::{Artifact, Chunk, chunk_descriptor, chunk_size, distinct};
use crate::console::Console;
use crate::error::{Error, at};

/// The folders of a data folder's cache.
pub(super) struct Cache {
    chunks: PathBuf,
    lists: PathBuf,
}

/// A template that is ready to leave.
pub(super) struct Packed {
    pub(super) artifact: Artifact,
    /// The bytes of the artifact's own blobs.
    pub(super) manifest: Vec<u8>,
    pub(super) config: Vec<u8>,
    pub(super) list: Vec<u8>,
    /// The chunks in the order of the artifact.
    pub(super) chunks: Vec<Chunk>,
}

impl Cache {
    pub(super) fn new(data: &DataDir) -> Self {
        let folder = data.cache();
        Self { chunks: folder.join("template-chunks"), lists: folder.join("template-chunk-lists") }
    }

    /// The chunks. While this is open nobody cuts them back.
    pub(super) fn open(&self) -> Result<ChunkStore, Error> {
        Ok(ChunkStore::open_or_create(&self.chunks)?)
    }

    /// Cuts a template into chunks.
    pub(super) fn pack(
        &self,
        store: &ChunkStore,
        folder: &TemplateFolder,
        console: &Console,
    ) -> Result<Packed, Error> {
        let template = folder.template();
        if template.snapshot_only {
            return Err(Error::Invalid {
                what: folder.path().display().to_string(),
                reason: "it is one of a sandbox's snapshot, and snapshots stay on their machine".to_owned(),
            });
        }
        let _work = console.work("reading the root file system", None);
        let (list, _) = split(&folder.rootfs(), store, chunk_size(template.rootfs.size))?;
        if list.digest().to_string() != template.rootfs.digest.as_ref() {
            return Err(Error::Oci(oci::Error::Corrupt {
                what: folder.rootfs().display().to_string(),
                reason: format!(
                    "expected the digest {}, got {}; make the template again",
                    template.rootfs.digest,
                    list.digest()
                ),
            }));
        }
        self.remember(&list)?;
        let chunks = distinct(&list);
        let mut blobs = Vec::with_capacity(chunks.len());
        for (digest, _) in &chunks {
            let (path, mut file) = store.packed(*digest)?;
            blobs.push(chunk_descriptor(&mut file).map_err(at(&path))?);
        }
        let config =
            oci::canonical_json(template).map_err(|error| at(folder.path())(std::io::Error::from(error)))?;
        let list = list.to_json();
        let (artifact, manifest) = Artifact::new(&config, &list, blobs, template)?;
        Ok(Packed { artifact, manifest, config, list, chunks })
    }

    /// Keeps a list, so that its chunks are not cut away while its template is here.
    pub(super) fn remember(&self, list: &Manifest) -> Result<(), Error> {
        std::fs::create_dir_all(&self.lists).map_err(at(&self.lists))?;
        let name = list.digest().to_string().replace(':', "-");
        list.write(&self.lists.join(format!("{name}.json")))?;
        Ok(())
    }

    /// Removes what no template that is here was made of. Nothing while somebody else is at work on the chunks: the next
    /// transfer does it.
    pub(super) fn cut_back(&self, data: &DataDir) -> Result<(), Error> {
        let mut here = Vec::new();
        for name in TemplateFolder::list(&data.templates())? {
            // One that went away, or is damaged, needs no chunks.
            if let Ok(folder) = TemplateFolder::open(&data.templates().join(name.as_str())) {
                here.push(folder.template().rootfs.digest.to_string().replace(':', "-"));
            }
        }
        let mut lists = Vec::new();
        for entry in std::fs::read_dir(&self.lists).map_err(at(&self.lists))? {
            let path = entry.map_err(at(&self.lists))?.path();
            let known = |path: &Path| {
                here.iter().any(|digest| path.file_stem().is_some_and(|stem| stem == digest.as_str()))
            };
            match Manifest::read(&path) {
                Ok(list) if known(&path) => lists.push(list),
                // Another transfer may have been first.
                _ => drop(std::fs::remove_file(&path)),
            }
        }
        match ChunkStore::prune(&self.chunks, &lists) {
            Err(rootfs_tools::Error::Chunk(rootfs_tools::chunk::ChunkError::Store { .. })) => Ok(()),
            other => other.map(drop).map_err(Error::from),
        }
    }
}
