//! `load`, `save` and `images`.

use oci::{Digest, Image, ImageName, ImageReference, Store, copy_image, write_archive};
use serde::Serialize;

use crate::base;
use crate::console::Console;
use crate::error::Error;

/// One image of the local store.
#[derive(Clone, Debug, Serialize)]
pub struct ListedImage {
    /// The full name.
    pub name: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Number of layers; `None` for an image that cannot be read.
    pub layers: Option<usize>,
    /// Sum of the compressed layers in bytes; `None` for an image that cannot be read.
    pub size: Option<u64>,
    /// When it was made, where it says so.
    pub created: Option<String>,
}

/// Brings an image into the store under that name: from a layout, an archive, or a registry.
pub fn load(
    store: &Store,
    source: &ImageReference,
    name: &ImageName,
    console: &Console,
) -> Result<Digest, Error> {
    let descriptor = match source {
        ImageReference::Name(source) => match base::find_local(store, source)? {
            Some(descriptor) => descriptor,
            None => base::pull(store, source, console)?,
        },
        _ => {
            let _work = console.work(&format!("loading {source}"), None);
            base::import(store, source)?
        }
    };
    // An image that cannot be read gets no name.
    let image = Image::open(store, &descriptor)?;
    store.tag(&name.canonical(), &image.descriptor)?;
    Ok(image.digest)
}

/// Writes an image of the store to a layout or an archive.
pub fn save(
    store: &Store,
    name: &ImageName,
    destination: &ImageReference,
    console: &Console,
) -> Result<Digest, Error> {
    let descriptor = base::find_local(store, name)?.ok_or_else(|| {
        Error::Oci(oci::Error::NotFound {
            what: format!("image {name} ({})", name.canonical()),
            place: format!("the local store {}; list it with image-builder images", store.path().display()),
        })
    })?;
    let _work = console.work(&format!("saving {name} to {destination}"), None);
    match destination {
        ImageReference::Layout { directory, tag } => {
            let layout = Store::open_or_create(directory)?;
            let copied = copy_image(store, &descriptor, &layout)?;
            layout.tag(tag.as_deref().unwrap_or(name.tag().unwrap_or("latest")), &copied)?;
        }
        ImageReference::Archive { file, tag } => {
            write_archive(store, &descriptor, tag.as_deref().or(name.tag()), file)?;
        }
        ImageReference::Name(_) | ImageReference::Skopeo(_) => {
            return Err(Error::Invalid {
                what: format!("destination {destination}"),
                reason: "expected oci:DIR[:TAG] or oci-archive:FILE[:TAG]".to_owned(),
            });
        }
    }
    Ok(descriptor.digest().clone())
}

/// The images of the store, by name. One that is damaged is listed, not hidden.
pub fn images(store: &Store) -> Result<Vec<ListedImage>, Error> {
    let listed = store.list()?.into_iter().filter_map(|entry| {
        let name = entry.name?;
        let image = Image::open(store, &entry.descriptor).ok();
        Some(ListedImage {
            name,
            digest: entry.descriptor.digest().clone(),
            layers: image.as_ref().map(|image| image.layers.len()),
            size: image.as_ref().map(Image::compressed_size),
            created: image.and_then(|image| image.config.created().clone()),
        })
    });
    Ok(listed.collect())
}
