//! Where base images come from: the local store, files, a registry.

use oci::{Archive, Descriptor, Image, ImageName, ImageReference, Platform, Store, copy_image};

use crate::console::Console;
use crate::error::Error;
use crate::registry::{Platforms, PullReport, Registries, RegistryOptions};

/// Whether a registry is asked for what the local store has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// No.
    #[default]
    Missing,
    /// Yes: a tag may name another image by now.
    Always,
}

/// When and how registries are asked for images.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Whether they are asked for what is there.
    pub policy: PullPolicy,
    /// How they are found.
    pub registries: RegistryOptions,
    /// For which platform; this machine's by default.
    pub platform: Option<Platform>,
}

/// The image, in the local store when this returns. A name is looked for in the store first, if the policy allows it, and
/// then in its registry.
pub(crate) fn resolve(
    store: &Store,
    reference: &ImageReference,
    options: &PullOptions,
    console: &Console,
) -> Result<Image, Error> {
    let (platforms, wanted) = match &options.platform {
        Some(platform) => (Platforms::One(platform.clone()), platform.clone()),
        None => (Platforms::Host, oci::host_platform()),
    };
    let fetch = |name| pull(store, name, &platforms, &options.registries, console).map(|(found, _)| found);
    let descriptor = match reference {
        ImageReference::Name(name) => match (options.policy, find_local(store, name)?) {
            // What has a digest is the same everywhere.
            (PullPolicy::Always, Some(found)) if name.digest().is_some() => found,
            // One for another platform may have its name.
            (PullPolicy::Missing, Some(found))
                if options.platform.is_none() || fits(store, &found, &wanted) =>
            {
                found
            }
            _ => fetch(name)?,
        },
        ImageReference::Registry(name) => fetch(name)?,
        _ => import_for(store, reference, &wanted)?,
    };
    let image = Image::open(store, &oci::select_manifest_for(store, &descriptor, &wanted)?)?;
    if options.platform.is_some() && !oci::platform_fits(&image.platform(), &wanted) {
        return Err(Error::Invalid {
            what: reference.to_string(),
            reason: format!(
                "it is an image for {}, and one for {} is asked for",
                oci::platform_text(&image.platform()),
                oci::platform_text(&wanted)
            ),
        });
    }
    Ok(image)
}

/// Whether there is an image for that platform, with all its parts.
fn fits(store: &Store, descriptor: &Descriptor, wanted: &Platform) -> bool {
    oci::select_manifest_for(store, descriptor, wanted)
        .and_then(|manifest| Image::open(store, &manifest))
        .is_ok_and(|image| {
            oci::platform_fits(&image.platform(), wanted)
                && image.layers.iter().all(|layer| store.has_blob(&layer.descriptor))
        })
}

/// Copies an image for this machine, as [`import_for`].
pub(crate) fn import(store: &Store, reference: &ImageReference) -> Result<Descriptor, Error> {
    import_for(store, reference, &oci::host_platform())
}

/// Copies an image from a layout, an archive or whatever skopeo reads into the store, without a name.
fn import_for(store: &Store, reference: &ImageReference, wanted: &Platform) -> Result<Descriptor, Error> {
    let only = |archive: Archive, tag: Option<&str>| {
        let descriptor = archive.store().resolve_or_only(tag)?;
        let descriptor = oci::select_manifest_for(archive.store(), &descriptor, wanted)?;
        Ok(copy_image(archive.store(), &descriptor, store)?)
    };
    let scratch = store.scratch()?;
    match reference {
        ImageReference::Layout { directory, tag } => {
            let layout = Store::open(directory)?;
            let descriptor = layout.resolve_or_only(tag.as_deref())?;
            let descriptor = oci::select_manifest_for(&layout, &descriptor, wanted)?;
            Ok(copy_image(&layout, &descriptor, store)?)
        }
        ImageReference::Archive { file, tag } => only(Archive::open(file, scratch.path())?, tag.as_deref()),
        ImageReference::DockerArchive { file, name } => {
            only(oci::open_docker_archive(file, name.as_deref(), scratch.path())?, None)
        }
        ImageReference::Skopeo(reference) => only(reference.fetch(scratch.path())?, None),
        ImageReference::Name(name) | ImageReference::Registry(name) => Err(Error::Invalid {
            what: name.to_string(),
            reason: "expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME]".to_owned(),
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

/// As [`find_local`]; an image that is not there is an error that says where it was looked for.
pub(crate) fn local(store: &Store, name: &ImageName) -> Result<Descriptor, Error> {
    find_local(store, name)?.ok_or_else(|| {
        Error::Oci(oci::Error::NotFound {
            what: format!("image {name} ({})", name.canonical()),
            place: format!("the local store {}; list it with image-builder images", store.path().display()),
        })
    })
}

/// Fetches the image from its registry and gives it its name in the store.
pub(crate) fn pull(
    store: &Store,
    name: &ImageName,
    platforms: &Platforms,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<(Descriptor, PullReport), Error> {
    let pulled = Registries::open(registries)?.pull(store, name, platforms, console);
    let (descriptor, report) = pulled.map_err(|error| {
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
    })?;
    store.tag(&name.canonical(), &descriptor)?;
    Ok((descriptor, report))
}
