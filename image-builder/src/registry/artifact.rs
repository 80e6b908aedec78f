//! Artifacts that are no images: their blobs are the caller's to understand.

use std::path::PathBuf;
use std::sync::Arc;

use oci::{Descriptor, Hasher, ImageName};

use super::download::Sink;
use super::failure::Failure;
use super::manifests::Wanted;
use super::push::{PushReport, Tally};
use super::session::Session;
use super::upload::{Contents, Local};
use super::{Registries, error, parallel};
use crate::console::Console;
use crate::error::Error;

/// A blob of an artifact that is to be pushed.
pub(crate) enum ArtifactBlob<'a> {
    Bytes(&'a Descriptor, &'a [u8]),
    File(&'a Descriptor, PathBuf),
}

/// Where the blobs of an artifact are fetched from.
pub(crate) struct ArtifactSource<'a> {
    registries: &'a Registries,
    session: Session<'a>,
}

impl Sink for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

impl ArtifactSource<'_> {
    /// A blob as a whole; the caller has a bound on its length.
    pub(crate) fn blob(&self, blob: &Descriptor) -> Result<Vec<u8>, Error> {
        self.registries
            .runtime
            .block_on(self.fetch(blob))
            .map_err(|failure| error(self.session.host(), failure))
    }

    /// Fetches several blobs at once, and hands each to `take` when it is whole and checked.
    pub(crate) fn each<T: Sync>(
        &self,
        items: &[T],
        blob: impl Fn(&T) -> &Descriptor + Sync,
        take: impl Fn(&T, Vec<u8>) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        parallel::each(&self.registries.runtime, items, async |item| {
            let bytes = self.fetch(blob(item)).await?;
            take(item, bytes).map_err(Failure::Local)
        })
        .map_err(|failure| error(self.session.host(), failure))
    }

    async fn fetch(&self, blob: &Descriptor) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        self.session.fetch_blob(blob, &mut bytes).await?;
        let digest = Hasher::digest_of(&bytes);
        match digest == *blob.digest() {
            true => Ok(bytes),
            false => {
                Err(Failure::Final(format!("corrupt blob {}: the registry sends {digest}", blob.digest())))
            }
        }
    }
}

impl Registries {
    /// Brings an artifact to a registry: its blobs, those that are there not again, then its manifest. The report is of the
    /// blobs that are files.
    pub(crate) fn push_artifact(
        &self,
        name: &ImageName,
        manifest: &Descriptor,
        bytes: &[u8],
        blobs: &[ArtifactBlob<'_>],
        console: &Console,
    ) -> Result<PushReport, Error> {
        let endpoint = self.configuration.push_to(name)?;
        let Some(tag) = name.tag() else {
            return Err(Error::Invalid { what: name.to_string(), reason: "push it to a tag".to_owned() });
        };
        console.line(&format!("pushing {} to {}", name.canonical(), endpoint.host));
        let session = self.open_session(name, endpoint, "pull,push", &[], console)?;
        let host = session.host().to_owned();
        let failed = |failure| error(&host, failure);
        let descriptor = |blob: &ArtifactBlob<'_>| match blob {
            ArtifactBlob::Bytes(blob, _) | ArtifactBlob::File(blob, _) => (*blob).clone(),
        };
        let total = blobs.iter().map(|blob| descriptor(blob).size()).sum();
        let work = Arc::new(
            console.work(&format!("sending {} blobs ({} KiB)", blobs.len(), total / 1024), Some(total)),
        );
        let tally = Tally::default();
        parallel::each(&self.runtime, blobs, async |blob| {
            let progress = work.clone();
            let contents = match blob {
                ArtifactBlob::Bytes(_, bytes) => Contents::Bytes(bytes.to_vec()),
                ArtifactBlob::File(_, path) => Contents::File(path),
            };
            let blob = descriptor(blob);
            let progress = Arc::new(move |bytes| progress.advance(bytes));
            let local = Local { blob: &blob, contents, mount_from: None, progress };
            let upload = session.push_blob(&local).await?;
            if matches!(local.contents, Contents::File(_)) {
                tally.count(upload, &blob);
            }
            Ok(())
        })
        .map_err(failed)?;
        let put = session.put_manifest(tag, manifest.media_type(), bytes.to_vec());
        self.runtime.block_on(put).map_err(failed)?;
        Ok(tally.report(name, manifest.digest(), &host))
    }

    /// Does `take` with an artifact's manifest and the way to its blobs, at the first mirror or registry where that goes well.
    pub(crate) fn with_artifact<T>(
        &self,
        name: &ImageName,
        console: &Console,
        take: impl Fn(ArtifactSource<'_>, Descriptor, &[u8]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.at_each(name, console, |endpoint| {
            let session = self.open_session(name, endpoint, "pull", &[], console)?;
            let wanted = match name.digest() {
                Some(digest) => Wanted::Digest(digest),
                None => Wanted::Tag(name.tag().unwrap_or("latest")),
            };
            let (descriptor, bytes) = self
                .runtime
                .block_on(session.manifest(wanted))
                .map_err(|failure| error(session.host(), failure))?;
            take(ArtifactSource { registries: self, session }, descriptor, &bytes)
        })
    }
}
