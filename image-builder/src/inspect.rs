//! `inspect`: what an image is, wherever it is. Of a registry's image only manifest and config are fetched.

use oci::{Archive, Descriptor, Digest, Image, ImageReference, MAX_MANIFEST, MediaType, Scratch, Store};
use serde::Serialize;

use crate::base;
use crate::console::Console;
use crate::error::Error;
use crate::registry::{Platforms, Registries, RegistryOptions};

/// An image as people and scripts want to know it.
#[derive(Clone, Debug, Serialize)]
pub struct Inspected {
    /// The reference as it was given.
    pub reference: String,
    /// Digest of what the reference names: a manifest or an index.
    pub digest: Digest,
    /// Its media type.
    pub media_type: MediaType,
    /// The platforms of an index, or of the one image.
    pub platforms: Vec<String>,
    /// Digest of the manifest of the image that is described below: this machine's, where there are several.
    pub manifest: Digest,
    /// Annotations of the manifest.
    pub annotations: std::collections::BTreeMap<String, String>,
    /// When it was made, where it says so.
    pub created: Option<String>,
    /// Sum of the compressed layers in bytes.
    pub size: u64,
    /// The layers, lowest first.
    pub layers: Vec<InspectedLayer>,
    /// The whole config: environment, command, labels, history, and what only some builders know.
    pub config: serde_json::Value,
}

/// A layer of an image.
#[derive(Clone, Debug, Serialize)]
pub struct InspectedLayer {
    /// Digest of the compressed blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// How it is compressed, as a media type.
    pub media_type: MediaType,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
}

/// Where manifest and config can be read for a while.
struct Opened {
    store: Store,
    descriptor: Descriptor,
    _keep: (Option<Archive>, Option<Scratch>),
}

fn open(
    store: &Store,
    reference: &ImageReference,
    platforms: &Platforms,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Opened, Error> {
    let of_archive = |archive: Archive, tag: Option<&str>, scratch: Scratch| {
        let descriptor = archive.store().resolve_or_only(tag)?;
        Ok(Opened { store: archive.store().clone(), descriptor, _keep: (Some(archive), Some(scratch)) })
    };
    let scratch = store.scratch()?;
    match reference {
        ImageReference::Name(name) => {
            Ok(Opened { store: store.clone(), descriptor: base::local(store, name)?, _keep: (None, None) })
        }
        ImageReference::Registry(name) => {
            let fetched = Store::open_or_create(scratch.path())?;
            let descriptor = Registries::open(registries)?.describe(&fetched, name, platforms, console)?;
            Ok(Opened { store: fetched, descriptor, _keep: (None, Some(scratch)) })
        }
        ImageReference::Layout { directory, tag } => {
            let layout = Store::open(directory)?;
            let descriptor = layout.resolve_or_only(tag.as_deref())?;
            Ok(Opened { store: layout, descriptor, _keep: (None, None) })
        }
        ImageReference::Archive { file, tag } => {
            of_archive(Archive::open(file, scratch.path())?, tag.as_deref(), scratch)
        }
        ImageReference::DockerArchive { file, name } => {
            of_archive(oci::open_docker_archive(file, name.as_deref(), scratch.path())?, None, scratch)
        }
        ImageReference::Skopeo(reference) => of_archive(reference.fetch(scratch.path())?, None, scratch),
    }
}

/// Describes an image; of an index the one for the platform.
pub fn inspect(
    store: &Store,
    reference: &ImageReference,
    platforms: &Platforms,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Inspected, Error> {
    let Opened { store, descriptor, _keep } = open(store, reference, platforms, registries, console)?;
    let index = oci::oci_media_type(descriptor.media_type()) == MediaType::ImageIndex;
    let manifest = match platforms {
        Platforms::One(platform) => oci::select_manifest_for(&store, &descriptor, platform)?,
        _ => oci::select_manifest(&store, &descriptor)?,
    };
    let image = Image::open(&store, &manifest)?;
    let text = |value: &serde_json::Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let platforms = match index {
        true => oci::manifests_of(&store, &descriptor)?
            .iter()
            .filter_map(|entry| entry.platform().as_ref())
            .map(oci::platform_text)
            .collect(),
        false => {
            let parts = ["os", "architecture", "variant"].map(|part| text(&image.config_json[part]));
            vec![parts.into_iter().flatten().collect::<Vec<_>>().join("/")]
        }
    };
    let layers = image.layers.iter().map(|layer| InspectedLayer {
        digest: layer.descriptor.digest().clone(),
        size: layer.descriptor.size(),
        media_type: layer.descriptor.media_type().clone(),
        diff_id: layer.diff_id.clone(),
    });
    Ok(Inspected {
        reference: reference.to_string(),
        digest: descriptor.digest().clone(),
        media_type: descriptor.media_type().clone(),
        platforms,
        manifest: image.digest.clone(),
        annotations: image.manifest.annotations().clone().unwrap_or_default().into_iter().collect(),
        created: image.config.created().clone(),
        size: image.compressed_size(),
        layers: layers.collect(),
        config: image.config_json,
    })
}

/// The bytes of the manifest or index that the reference names, as they are.
pub fn raw_manifest(
    store: &Store,
    reference: &ImageReference,
    registries: &RegistryOptions,
    console: &Console,
) -> Result<Vec<u8>, Error> {
    let Opened { store, descriptor, _keep } = open(store, reference, &Platforms::All, registries, console)?;
    Ok(store.read_blob(&descriptor, MAX_MANIFEST)?)
}
