//! Pulling images.

use std::collections::HashSet;

use oci::{BlobWriter, Descriptor, Digest, Image, ImageName, MediaType, Platform, Store};
use serde::Serialize;
use std::io::Write;

use super::configuration::Endpoint;
use super::download::Sink;
use super::failure::Failure;
use super::limits::{MAX_INDEX_ENTRIES, MAX_MANIFEST};
use super::manifests::Wanted;
use super::session::Session;
use super::{Platforms, Registries, error, parallel};
use crate::console::{Console, Work};
use crate::error::Error;

/// What was pulled.
#[derive(Clone, Debug, Serialize)]
pub struct PullReport {
    /// The full name that it has in the local store.
    pub name: String,
    /// Digest of the manifest, or of the index where all its images were asked for.
    pub digest: Digest,
    /// The registry or mirror that it came from.
    pub registry: String,
    /// Blobs that were fetched.
    pub fetched: usize,
    /// Blobs that the store had.
    pub existed: usize,
    /// Bytes that were fetched.
    pub bytes: u64,
}

/// A blob on its way into the store.
struct IntoStore<'a> {
    writer: BlobWriter,
    work: &'a Work,
}

impl Sink for IntoStore<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.writer.write_all(bytes).map_err(|error| {
            Failure::Local(Error::Io { path: "a new blob of the image store".into(), error })
        })?;
        self.work.advance(bytes.len() as u64);
        Ok(())
    }
}

impl Registries {
    /// Fetches an image into the store, without a name there. Mirrors are tried in their order, then the registry.
    pub(crate) fn pull(
        &self,
        store: &Store,
        name: &ImageName,
        platforms: &Platforms,
        console: &Console,
    ) -> Result<(Descriptor, PullReport), Error> {
        self.at_each(name, console, |endpoint| self.pull_from(store, name, endpoint, platforms, console))
    }

    /// Does `from` at each place that the name's images may be pulled from, until it goes well.
    pub(super) fn at_each<T>(
        &self,
        name: &ImageName,
        console: &Console,
        from: impl Fn(Endpoint) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut failures: Vec<(String, String)> = Vec::new();
        for endpoint in self.configuration.pull_from(name)? {
            let host = endpoint.known_as().to_owned();
            console.line(&format!("pulling {} from {host}", name.canonical()));
            match from(endpoint) {
                Ok(done) => return Ok(done),
                Err(Error::Registry { registry, reason }) => failures.push((registry, reason)),
                // A blob that is not what it should be is this registry's fault too.
                Err(Error::Oci(oci::Error::Corrupt { what, reason })) => {
                    failures.push((host, format!("corrupt {what}: {reason}")));
                }
                Err(error) => return Err(error),
            }
        }
        let (registry, mut reason) = failures.pop().unwrap_or_default();
        for (mirror, why) in failures {
            reason.push_str(&format!("\nbefore, the mirror {mirror}: {why}"));
        }
        Err(Error::Registry { registry, reason })
    }

    fn pull_from(
        &self,
        store: &Store,
        name: &ImageName,
        endpoint: Endpoint,
        platforms: &Platforms,
        console: &Console,
    ) -> Result<(Descriptor, PullReport), Error> {
        let session = self.open_session(name, endpoint, "pull", &[], console)?;
        let host = session.host().to_owned();
        let failed = |failure| error(&host, failure);
        let wanted = match name.digest() {
            Some(digest) => Wanted::Digest(digest),
            None => Wanted::Tag(name.tag().unwrap_or("latest")),
        };
        let top = self.fetch_manifest(store, &session, wanted)?;
        let is_index = oci::oci_media_type(top.media_type()) == MediaType::ImageIndex;
        let (descriptor, children) = match (is_index, platforms) {
            (false, Platforms::One(platform)) => {
                check_platform(self, store, &session, &top, platform)?;
                (top.clone(), vec![top])
            }
            (false, _) => (top.clone(), vec![top]),
            (true, Platforms::All) => {
                let all = oci::manifests_of(store, &top)?;
                if all.len() > MAX_INDEX_ENTRIES {
                    return Err(failed(Failure::Final(format!(
                        "index {} names {} images, at most {MAX_INDEX_ENTRIES} are fetched",
                        top.digest(),
                        all.len()
                    ))));
                }
                (top, all)
            }
            (true, Platforms::Host) => {
                let one = oci::select_manifest(store, &top)?;
                (one.clone(), vec![one])
            }
            (true, Platforms::One(platform)) => {
                let one = oci::select_manifest_for(store, &top, platform)?;
                (one.clone(), vec![one])
            }
        };
        let mut blobs = Vec::new();
        let mut known = HashSet::new();
        for child in &children {
            let nested = oci::oci_media_type(child.media_type()) != MediaType::ImageManifest;
            if nested {
                return Err(failed(Failure::Final(format!(
                    "the index names {}, a {}, where only images are understood",
                    child.digest(),
                    child.media_type()
                ))));
            }
            if !store.has_blob(child) {
                self.fetch_manifest(store, &session, Wanted::Named(child))?;
            }
            blobs.extend(
                oci::blobs_of(store, child)?.into_iter().filter(|blob| known.insert(blob.digest().clone())),
            );
        }
        let all = blobs.len();
        blobs.retain(|blob| !store.has_blob(blob));
        let bytes = blobs.iter().map(Descriptor::size).fold(0, u64::saturating_add);
        if !blobs.is_empty() {
            let label = format!("fetching {} blobs ({} KiB)", blobs.len(), bytes / 1024);
            let work = console.work(&label, Some(bytes));
            parallel::each(&self.runtime, &blobs, async |blob| fetch(store, &session, blob, &work).await)
                .map_err(failed)?;
        }
        if !matches!(platforms, Platforms::All) {
            // An image that cannot be read gets no name.
            Image::open(store, &descriptor)?;
        }
        let report = PullReport {
            name: name.canonical(),
            digest: descriptor.digest().clone(),
            registry: host.clone(),
            fetched: blobs.len(),
            existed: all - blobs.len(),
            bytes,
        };
        Ok((descriptor, report))
    }

    pub(super) fn fetch_manifest(
        &self,
        store: &Store,
        session: &Session<'_>,
        wanted: Wanted<'_>,
    ) -> Result<Descriptor, Error> {
        let (descriptor, bytes) = self
            .runtime
            .block_on(session.manifest(wanted))
            .map_err(|failure| error(session.host(), failure))?;
        Ok(store.put_blob(descriptor.media_type().clone(), &bytes[..])?)
    }
}

/// An image without an index says in its config what it is for. Nothing but the config is fetched for that.
fn check_platform(
    registries: &Registries,
    store: &Store,
    session: &Session<'_>,
    manifest: &Descriptor,
    wanted: &Platform,
) -> Result<(), Error> {
    let blobs = oci::blobs_of(store, manifest)?;
    let Some(config) = blobs.first().filter(|config| config.size() <= MAX_MANIFEST) else { return Ok(()) };
    if !store.has_blob(config) {
        let work = Console::new(true).work("", None);
        registries
            .runtime
            .block_on(fetch(store, session, config, &work))
            .map_err(|failure| error(session.host(), failure))?;
    }
    let text = store.read_blob(config, MAX_MANIFEST)?;
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let part = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let mut got = format!("{}/{}", part("os"), part("architecture"));
    if !part("variant").is_empty() {
        got = format!("{got}/{}", part("variant"));
    }
    let fits = oci::parse_platform(&got).is_ok_and(|got| oci::platform_fits(&got, wanted));
    match fits {
        true => Ok(()),
        false => Err(oci::Error::NotFound {
            what: format!("an image for {}", oci::platform_text(wanted)),
            place: format!("manifest {}, which is for {got} alone", manifest.digest()),
        }
        .into()),
    }
}

pub(super) async fn fetch(
    store: &Store,
    session: &Session<'_>,
    blob: &Descriptor,
    work: &Work,
) -> Result<(), Failure> {
    let local = |error: oci::Error| Failure::Local(error.into());
    // Before anything is fetched: a digest of another algorithm could not be checked.
    store.blob_path(blob.digest()).map_err(local)?;
    let mut sink = IntoStore { writer: store.blob_writer().map_err(local)?, work };
    session.fetch_blob(blob, &mut sink).await?;
    sink.writer.finish_as(blob).map_err(|error| match error {
        oci::Error::Corrupt { what, reason } => Failure::Final(format!("corrupt {what}: {reason}")),
        error => local(error),
    })
}
