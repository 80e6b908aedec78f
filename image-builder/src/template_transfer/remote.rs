//! Templates in registries.

use oci::{Descriptor, ImageName};
use rootfs_tools::chunk::ChunkWriter;
use template::{DataDir, TemplateName};

use super::TransferReport;
use super::artifact::{Artifact, Chunk};
use super::cache::Cache;
use super::import::{Source, receive};
use crate::console::{Console, Work};
use crate::error::Error;
use crate::registry::{ArtifactBlob, ArtifactSource, Registries, RegistryOptions};
use crate::templates;

/// Brings a template to a registry.
pub fn push(
    data: &DataDir,
    name: &TemplateName,
    destination: &ImageName,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<TransferReport, Error> {
    let folder = templates::open(data, name.as_str())?;
    let registries = Registries::open(registries)?;
    let cache = Cache::new(data);
    let store = cache.open()?;
    let packed = cache.pack(&store, &folder, console)?;
    let artifact = &packed.artifact;
    let mut blobs = vec![
        ArtifactBlob::Bytes(&artifact.config, &packed.config),
        ArtifactBlob::Bytes(&artifact.list, &packed.list),
    ];
    for ((digest, _), blob) in packed.chunks.iter().zip(&artifact.chunks) {
        blobs.push(ArtifactBlob::File(blob, store.packed(*digest)?.0));
    }
    let report =
        registries.push_artifact(destination, &artifact.descriptor, &packed.manifest, &blobs, console)?;
    drop((blobs, store));
    cache.cut_back(data)?;
    Ok(TransferReport {
        name: name.clone(),
        path: folder.path().to_owned(),
        place: report.name.clone(),
        digest: report.digest.clone(),
        rootfs: folder.template().rootfs.digest.clone(),
        chunks: packed.chunks.len(),
        moved: report.sent,
        bytes: report.bytes,
    })
}

/// A template's chunks in a registry.
struct Remote<'a>(ArtifactSource<'a>);

impl Source for Remote<'_> {
    fn blob(&self, blob: &Descriptor) -> Result<Vec<u8>, Error> {
        self.0.blob(blob)
    }

    fn chunks(
        &self,
        missing: &[(Chunk, &Descriptor)],
        into: &ChunkWriter<'_>,
        work: &Work,
    ) -> Result<(), Error> {
        self.0.each(
            missing,
            |(_, blob)| blob,
            |((digest, length), blob), bytes| {
                into.add_packed(*digest, *length, &bytes)?;
                work.advance(blob.size());
                Ok(())
            },
        )
    }
}

/// Fetches a template from a registry, under that name, or the last part of the repository's. Mirrors are tried first.
pub fn pull(
    data: &DataDir,
    source: &ImageName,
    name: Option<&TemplateName>,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<TransferReport, Error> {
    let name = match name {
        Some(name) => name.clone(),
        None => source.repository().rsplit('/').next().unwrap_or_default().parse()?,
    };
    let registries = Registries::open(registries)?;
    registries.with_artifact(source, console, |remote, descriptor, bytes| {
        let artifact = Artifact::parse(descriptor, bytes)?;
        receive(data, &name, &artifact, &Remote(remote), source.canonical(), console)
    })
}
