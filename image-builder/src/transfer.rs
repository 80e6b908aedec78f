//! Images between the local store and other places: `pull`, `push`, `load`, `save`, `tag`, `rm` and `images`.

use oci::{Descriptor, Digest, Image, ImageName, ImageReference, Store, copy_image, write_archive};
use serde::Serialize;

use crate::base;
use crate::console::Console;
use crate::error::Error;
use crate::registry::{Platforms, PullReport, PushReport, Registries, RegistryOptions};

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

/// Where an image went.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Saved {
    /// To a registry.
    Pushed(PushReport),
    /// To a file or a folder.
    Written {
        /// The reference of the place.
        destination: String,
        /// Digest of the manifest in the local store.
        digest: Digest,
    },
}

/// Fetches an image from its registry, whatever the store has, and gives it its name there.
pub fn pull(
    store: &Store,
    name: &ImageName,
    platforms: &Platforms,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<PullReport, Error> {
    let (descriptor, report) = Registries::open(registries)?.pull(store, name, platforms, console)?;
    store.tag(&name.canonical(), &descriptor)?;
    Ok(report)
}

/// Brings an image to another place: to the registry that its own name names, where none is given. What is not in the local
/// store is brought there first, without a name.
pub fn push(
    store: &Store,
    source: &ImageReference,
    destination: Option<&ImageReference>,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Saved, Error> {
    let (descriptor, name) = match source {
        ImageReference::Name(name) => (base::local(store, name)?, Some(name)),
        ImageReference::Registry(name) => {
            let pulled = Registries::open(registries)?.pull(store, name, &Platforms::Host, console)?;
            (pulled.0, Some(name))
        }
        _ => (base::import(store, source)?, None),
    };
    match (destination, name) {
        (Some(destination), name) => {
            save_descriptor(store, &descriptor, name, destination, registries, console)
        }
        (None, Some(name)) => {
            Ok(Saved::Pushed(Registries::open(registries)?.push(store, &descriptor, name, console)?))
        }
        (None, None) => Err(Error::Invalid {
            what: source.to_string(),
            reason: "it says no registry to push to; name one as docker://REGISTRY/NAME:TAG".to_owned(),
        }),
    }
}

/// Brings an image into the store under that name: from a layout, an archive, or a registry.
pub fn load(
    store: &Store,
    source: &ImageReference,
    name: &ImageName,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Digest, Error> {
    let descriptor = match source {
        ImageReference::Name(source) => match base::find_local(store, source)? {
            Some(descriptor) => descriptor,
            None => base::pull(store, source, &Platforms::Host, registries, console)?.0,
        },
        ImageReference::Registry(source) => {
            Registries::open(registries)?.pull(store, source, &Platforms::Host, console)?.0
        }
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

/// Writes an image of the store to a layout, an archive, a registry, or whatever skopeo writes.
pub fn save(
    store: &Store,
    name: &ImageName,
    destination: &ImageReference,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Saved, Error> {
    let descriptor = base::local(store, name)?;
    save_descriptor(store, &descriptor, Some(name), destination, registries, console)
}

fn save_descriptor(
    store: &Store,
    descriptor: &Descriptor,
    name: Option<&ImageName>,
    destination: &ImageReference,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Saved, Error> {
    let label = || {
        let source = name.map_or_else(|| descriptor.digest().to_string(), ImageName::to_string);
        console.work(&format!("saving {source} to {destination}"), None)
    };
    let tag = name.and_then(ImageName::tag);
    match destination {
        ImageReference::Name(name) | ImageReference::Registry(name) => {
            return Ok(Saved::Pushed(Registries::open(registries)?.push(store, descriptor, name, console)?));
        }
        ImageReference::Layout { directory, tag: written } => {
            let _work = label();
            let layout = Store::open_or_create(directory)?;
            let copied = copy_image(store, descriptor, &layout)?;
            layout.tag(written.as_deref().or(tag).unwrap_or("latest"), &copied)?;
        }
        ImageReference::Archive { file, tag: written } => {
            let _work = label();
            write_archive(store, descriptor, written.as_deref().or(tag), file)?;
        }
        ImageReference::DockerArchive { file, name: written } => {
            let _work = label();
            let canonical = name.filter(|name| name.digest().is_none()).map(ImageName::canonical);
            oci::write_docker_archive(store, descriptor, written.as_deref().or(canonical.as_deref()), file)?;
        }
        ImageReference::Skopeo(reference) => {
            let _work = label();
            reference.send(store, descriptor)?;
        }
    }
    Ok(Saved::Written { destination: destination.to_string(), digest: descriptor.digest().clone() })
}

/// Gives an image of the store further names.
pub fn tag(store: &Store, source: &ImageName, names: &[ImageName]) -> Result<Digest, Error> {
    let descriptor = base::local(store, source)?;
    for name in names {
        if name.digest().is_some_and(|digest| digest != descriptor.digest()) {
            return Err(Error::Invalid {
                what: name.to_string(),
                reason: format!("the image has the digest {}", descriptor.digest()),
            });
        }
        store.tag(&name.canonical(), &descriptor)?;
    }
    Ok(descriptor.digest().clone())
}

/// Takes names away, and gives those that there were. Blobs stay until somebody prunes. A name that is not there is an error
/// unless `missing_ok`; then nothing is taken away.
pub fn remove(store: &Store, names: &[ImageName], missing_ok: bool) -> Result<Vec<String>, Error> {
    for name in names.iter().filter(|_| !missing_ok) {
        if store.resolve(&name.canonical())?.is_none() {
            base::local(store, name)?;
            return Err(Error::Invalid {
                what: name.to_string(),
                reason: "the image is there under other names; name one of those".to_owned(),
            });
        }
    }
    let mut removed = Vec::new();
    for name in names.iter().map(ImageName::canonical) {
        if store.untag(&name)? {
            removed.push(name);
        }
    }
    Ok(removed)
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
