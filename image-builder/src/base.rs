//! Where base images come from: the local store, files, a registry.

use oci::{Archive, Descriptor, Image, ImageName, ImageReference, Store, copy_image};

use crate::console::Console;
use crate::error::Error;
use crate::registry;

/// The image, in the local store when this returns. A name is looked for in the store first, then in its registry.
pub(crate) fn resolve(store: &Store, reference: &ImageReference, console: &Console) -> Result<Image, Error> {
    let descriptor = match reference {
        ImageReference::Name(name) => match find_local(store, name)? {
            Some(descriptor) => descriptor,
            None => pull(store, name, console)?,
        },
        ImageReference::Layout { .. } | ImageReference::Archive { .. } | ImageReference::Skopeo(_) => {
            import(store, reference)?
        }
    };
    Ok(Image::open(store, &descriptor)?)
}

/// Copies an image from a layout, an archive or whatever skopeo reads into the store, without a name.
pub(crate) fn import(store: &Store, reference: &ImageReference) -> Result<Descriptor, Error> {
    match reference {
        ImageReference::Layout { directory, tag } => {
            let layout = Store::open(directory)?;
            let descriptor = layout.resolve_or_only(tag.as_deref())?;
            Ok(copy_image(&layout, &descriptor, store)?)
        }
        ImageReference::Archive { file, tag } => {
            let scratch = store.scratch()?;
            let archive = Archive::open(file, scratch.path())?;
            let descriptor = archive.store().resolve_or_only(tag.as_deref())?;
            Ok(copy_image(archive.store(), &descriptor, store)?)
        }
        ImageReference::Skopeo(reference) => {
            let scratch = store.scratch()?;
            let fetched = reference.fetch(scratch.path())?;
            let descriptor = fetched.store().resolve_or_only(None)?;
            Ok(copy_image(fetched.store(), &descriptor, store)?)
        }
        ImageReference::Name(name) => Err(Error::Invalid {
            what: name.to_string(),
            reason: "expected oci:DIR[:TAG] or oci-archive:FILE[:TAG]".to_owned(),
        }),
    }
}

/// Looks in the store alone. A digest is found under any name.
pub(crate) fn find_local(store: &Store, name: &ImageName) -> Result<Option<Descriptor>, Error> {
    if let Some(found) = store.resolve(&name.canonical())? {
        return Ok(Some(found));
    }
    let Some(digest) = name.digest() else { return Ok(None) };
    Ok(store
        .list()?
        .into_iter()
        .map(|entry| entry.descriptor)
        .find(|descriptor| descriptor.digest() == digest))
}

/// Fetches the image from its registry and gives it its name in the store.
pub(crate) fn pull(store: &Store, name: &ImageName, console: &Console) -> Result<Descriptor, Error> {
    registry::pull(store, name, console).map_err(|error| {
        let Error::Registry { registry, reason } = error else { return error };
        let debian = name.registry() == "docker.io" && name.repository() == "library/debian";
        let advice = match (debian, name.tag()) {
            (true, Some(suite)) if suite != "latest" => format!(
                "\nWithout a registry, make it from a Debian mirror: image-builder bootstrap debian:{suite}"
            ),
            _ => "\nIf you have it as a file: image-builder load oci-archive:FILE -t NAME".to_owned(),
        };
        Error::BaseNotFound {
            name: name.to_string(),
            tried: vec![
                format!("the local store {}: no {}", store.path().display(), name.canonical()),
                format!("the registry {registry}: {reason}"),
            ],
            advice,
        }
    })
}
