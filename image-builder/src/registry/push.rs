//! Pushing images.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use oci::{Descriptor, Digest, ImageName, MediaType, Store};
use serde::Serialize;

use super::failure::Failure;
use super::limits::MAX_MANIFEST;
use super::upload::{Contents, Local, Upload};
use super::{Registries, error, parallel};
use crate::console::Console;
use crate::error::Error;

/// How many other repositories a token is asked for. More would make the question longer than some services take.
const MAX_MOUNTED_FROM: usize = 8;

/// What was pushed.
#[derive(Clone, Debug, Serialize)]
pub struct PushReport {
    /// The full name that it has in the registry.
    pub name: String,
    /// Digest of the manifest or index, the same as here.
    pub digest: Digest,
    /// The registry's host.
    pub registry: String,
    /// Blobs that were sent.
    pub sent: usize,
    /// Blobs that the registry took from another of its repositories.
    pub mounted: usize,
    /// Blobs that the repository had.
    pub existed: usize,
    /// Bytes of the blobs that were sent.
    pub bytes: u64,
}

/// What became of several blobs.
#[derive(Default)]
pub(super) struct Tally {
    sent: AtomicUsize,
    mounted: AtomicUsize,
    existed: AtomicUsize,
    bytes: AtomicU64,
}

impl Tally {
    pub(super) fn count(&self, upload: Upload, blob: &Descriptor) {
        match upload {
            Upload::Existed => &self.existed,
            Upload::Mounted => &self.mounted,
            Upload::Sent => {
                self.bytes.fetch_add(blob.size(), Ordering::Relaxed);
                &self.sent
            }
        }
        .fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn report(&self, name: &ImageName, digest: &Digest, registry: &str) -> PushReport {
        PushReport {
            name: name.canonical(),
            digest: digest.clone(),
            registry: registry.to_owned(),
            sent: self.sent.load(Ordering::Relaxed),
            mounted: self.mounted.load(Ordering::Relaxed),
            existed: self.existed.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Registries {
    /// Brings an image, or an index with its images, to the registry that the name names, byte for byte.
    pub(crate) fn push(
        &self,
        store: &Store,
        top: &Descriptor,
        name: &ImageName,
        console: &Console,
    ) -> Result<PushReport, Error> {
        let endpoint = self.configuration.push_to(name)?;
        let reference = match (name.digest(), name.tag()) {
            (Some(digest), _) if digest != top.digest() => {
                return Err(Error::Invalid {
                    what: name.to_string(),
                    reason: format!("the image has the digest {}; push it to a tag", top.digest()),
                });
            }
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let is_index = oci::oci_media_type(top.media_type()) == MediaType::ImageIndex;
        let images = if is_index { oci::manifests_of(store, top)? } else { vec![top.clone()] };
        let (mut blobs, mut known) = (Vec::new(), HashSet::new());
        for image in &images {
            if !store.has_blob(image) {
                return Err(Error::Invalid {
                    what: format!("index {}", top.digest()),
                    reason: format!(
                        "the local store has not its image {}; fetch all with pull --platform all",
                        image.digest()
                    ),
                });
            }
            blobs.extend(
                oci::blobs_of(store, image)?.into_iter().filter(|blob| known.insert(blob.digest().clone())),
            );
        }
        let sources = self.mount_sources(store, name, &endpoint, &known)?;
        let mut others: Vec<_> = sources.values().cloned().collect::<HashSet<_>>().into_iter().collect();
        others.sort();
        others.truncate(MAX_MOUNTED_FROM);
        console.line(&format!("pushing {} to {}", name.canonical(), endpoint.host));
        let session = self.open_session(name, endpoint, "pull,push", &others, console)?;
        let host = session.host().to_owned();
        let failed = |failure| error(&host, failure);

        let total = blobs.iter().map(Descriptor::size).fold(0, u64::saturating_add);
        let work = Arc::new(
            console.work(&format!("sending {} blobs ({} KiB)", blobs.len(), total / 1024), Some(total)),
        );
        let tally = Tally::default();
        parallel::each(&self.runtime, &blobs, async |blob| {
            let path = store.blob_path(blob.digest()).map_err(|error| Failure::Local(error.into()))?;
            if !store.has_blob(blob) {
                return Err(Failure::Local(
                    oci::Error::NotFound {
                        what: format!("blob {}", blob.digest()),
                        place: format!(
                            "the local store {}; pull or build the image again",
                            store.path().display()
                        ),
                    }
                    .into(),
                ));
            }
            let work = work.clone();
            let local = Local {
                blob,
                contents: Contents::File(&path),
                mount_from: sources.get(blob.digest()).map(String::as_str),
                progress: Arc::new(move |bytes| work.advance(bytes)),
            };
            tally.count(session.push_blob(&local).await?, blob);
            Ok(())
        })
        .map_err(failed)?;
        // What a manifest names is there before it.
        for image in images.iter().filter(|_| is_index) {
            let bytes = store.read_blob(image, MAX_MANIFEST)?;
            let put = session.put_manifest(image.digest().as_ref(), image.media_type(), bytes);
            self.runtime.block_on(put).map_err(failed)?;
        }
        let bytes = store.read_blob(top, MAX_MANIFEST)?;
        self.runtime.block_on(session.put_manifest(&reference, top.media_type(), bytes)).map_err(failed)?;
        Ok(tally.report(name, top.digest(), &host))
    }

    /// Repositories of the same registry that have some of these blobs, by what the local store's names say.
    fn mount_sources(
        &self,
        store: &Store,
        name: &ImageName,
        endpoint: &super::Endpoint,
        wanted: &HashSet<Digest>,
    ) -> Result<HashMap<Digest, String>, Error> {
        let mut sources = HashMap::new();
        for entry in store.list()? {
            let Some(other) = entry.name.and_then(|name| name.parse::<ImageName>().ok()) else { continue };
            if other.registry() != name.registry() {
                continue;
            }
            let Ok(place) = self.configuration.push_to(&other) else { continue };
            if place.host != endpoint.host || place.repository == endpoint.repository {
                continue;
            }
            // Names of this machine are often names of nothing in a registry: then the mount is refused, and the blob sent.
            let image = oci::select_manifest(store, &entry.descriptor);
            for blob in image.and_then(|image| oci::blobs_of(store, &image)).unwrap_or_default() {
                if wanted.contains(blob.digest()) {
                    sources.entry(blob.digest().clone()).or_insert_with(|| place.repository.clone());
                }
            }
        }
        Ok(sources)
    }
}
