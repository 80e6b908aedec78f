//! An image's manifest and config without its layers.

use oci::{Descriptor, ImageName, MediaType, Store};

use super::manifests::Wanted;
use super::pull::fetch;
use super::{Platforms, Registries, error};
use crate::console::Console;
use crate::error::Error;

impl Registries {
    /// Fetches what describes an image into a store: what the name names, and of the image for the platform the manifest and
    /// the config. Of all platforms nothing more is fetched than the index.
    pub(crate) fn describe(
        &self,
        store: &Store,
        name: &ImageName,
        platforms: &Platforms,
        console: &Console,
    ) -> Result<Descriptor, Error> {
        let endpoint = self.configuration.push_to(name)?;
        let session = self.open_session(name, endpoint, "pull", &[], console)?;
        let wanted = match name.digest() {
            Some(digest) => Wanted::Digest(digest),
            None => Wanted::Tag(name.tag().unwrap_or("latest")),
        };
        let top = self.fetch_manifest(store, &session, wanted)?;
        let image = match platforms {
            Platforms::All => return Ok(top),
            Platforms::Host => oci::select_manifest(store, &top)?,
            Platforms::One(platform) => oci::select_manifest_for(store, &top, platform)?,
        };
        if oci::oci_media_type(top.media_type()) == MediaType::ImageIndex && !store.has_blob(&image) {
            self.fetch_manifest(store, &session, Wanted::Named(&image))?;
        }
        if let Some(config) = oci::blobs_of(store, &image)?.first().filter(|config| !store.has_blob(config)) {
            let work = console.work("fetching the config", Some(config.size()));
            let fetched = self.runtime.block_on(fetch(store, &session, config, &work));
            fetched.map_err(|failure| error(session.host(), failure))?;
        }
        Ok(top)
    }
}
