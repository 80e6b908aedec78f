//! From an artifact to a template, wherever the artifact is.

use std::path::Path;

use oci::{Archive, Descriptor, Image, MAX_MANIFEST, Store};
use rootfs_tools::chunk::{ChunkStore, ChunkWriter, join};
use template::{DataDir, NewTemplate, TemplateName};

use super::TransferReport;
use super::artifact::{Artifact, Chunk};
use super::cache::Cache;
use crate::console::{Console, Work};
use crate::error::Error;

/// Where an artifact's blobs are.
pub(super) trait Source {
    /// A blob as a whole, checked.
    fn blob(&self, blob: &Descriptor) -> Result<Vec<u8>, Error>;

    /// Puts these chunks, which the store has not, into it.
    fn chunks(
        &self,
        missing: &[(Chunk, &Descriptor)],
        into: &ChunkWriter<'_>,
        work: &Work,
    ) -> Result<(), Error>;
}

/// Makes the template of an artifact under that name, where it appears when it is whole. One of that name is replaced, and
/// who has its files open goes on with them.
pub(super) fn receive(
    data: &DataDir,
    name: &TemplateName,
    artifact: &Artifact,
    source: &impl Source,
    place: String,
    console: &Console,
) -> Result<TransferReport, Error> {
    let (template, list, chunks) =
        artifact.contents(&source.blob(&artifact.config)?, &source.blob(&artifact.list)?)?;
    let new = NewTemplate::begin(&data.templates(), name)?;
    let cache = Cache::new(data);
    let store = cache.open()?;
    let mut missing = Vec::new();
    for (chunk, blob) in chunks.iter().zip(&artifact.chunks) {
        if !store.has(chunk.0)? {
            missing.push((*chunk, blob));
        }
    }
    let bytes = missing.iter().map(|(_, blob)| blob.size()).sum();
    if !missing.is_empty() {
        let work =
            console.work(&format!("fetching {} of {} chunks", missing.len(), chunks.len()), Some(bytes));
        fill(&store, &missing, source, &work)?;
    }
    {
        let _work = console.work("putting the root file system together", None);
        join(&list, &store, &new.rootfs())?;
    }
    cache.remember(&list)?;
    let folder = new.publish(&template)?;
    drop(store);
    cache.cut_back(data)?;
    Ok(TransferReport {
        name: name.clone(),
        path: folder.path().to_owned(),
        place,
        digest: artifact.descriptor.digest().clone(),
        rootfs: template.rootfs.digest,
        chunks: chunks.len(),
        moved: missing.len(),
        bytes,
    })
}

fn fill(
    store: &ChunkStore,
    missing: &[(Chunk, &Descriptor)],
    source: &impl Source,
    work: &Work,
) -> Result<(), Error> {
    let writer = store.writer()?;
    let filled = source.chunks(missing, &writer, work);
    // What came before an error is good, and is not fetched again.
    let finished = writer.finish();
    filled?;
    Ok(finished?)
}

/// Blobs of an unpacked archive.
struct Unpacked<'a>(&'a Store);

impl Source for Unpacked<'_> {
    fn blob(&self, blob: &Descriptor) -> Result<Vec<u8>, Error> {
        // The artifact's bounds are on each.
        Ok(self.0.read_blob(blob, blob.size())?)
    }

    fn chunks(
        &self,
        missing: &[(Chunk, &Descriptor)],
        into: &ChunkWriter<'_>,
        work: &Work,
    ) -> Result<(), Error> {
        for ((digest, length), blob) in missing {
            into.add_packed(*digest, *length, &self.blob(blob)?)?;
            work.advance(blob.size());
        }
        Ok(())
    }
}

/// Makes a template of a file that [`super::export()`] wrote, under that name, or the one that it had.
pub fn import(
    data: &DataDir,
    file: &Path,
    name: Option<&TemplateName>,
    console: &Console,
) -> Result<TransferReport, Error> {
    let images = Store::open_or_create(&data.images())?;
    let scratch = images.scratch()?;
    let archive = {
        let _work = console.work(&format!("reading {}", file.display()), None);
        Archive::open(file, scratch.path())?
    };
    let layout = archive.store();
    let descriptor = layout.resolve_or_only(None)?;
    let bytes = layout.read_blob(&descriptor, MAX_MANIFEST)?;
    let artifact = Artifact::parse(descriptor.clone(), &bytes).map_err(|error| {
        // An archive of an image is the mistake that is made.
        match Image::open(layout, &descriptor) {
            Ok(_) => Error::Invalid {
                what: file.display().to_string(),
                reason:
                    "this is an image; make a template of it with template create --image oci-archive:FILE"
                        .to_owned(),
            },
            Err(_) => error,
        }
    })?;
    let written = layout.list()?.into_iter().next().and_then(|entry| entry.name);
    let name = match (name, written) {
        (Some(name), _) => name.clone(),
        (None, Some(written)) => written.parse()?,
        (None, None) => {
            return Err(Error::Invalid {
                what: file.display().to_string(),
                reason: "it does not say the template's name: name one behind the file".to_owned(),
            });
        }
    };
    receive(data, &name, &artifact, &Unpacked(layout), file.display().to_string(), console)
}
