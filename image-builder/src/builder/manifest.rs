//! The image of layers and a config.

use std::collections::BTreeMap;
use std::path::Path;

use oci::{Descriptor, Hasher, Image, Layer, MediaType, Store, canonical_json};
use serde_json::{Value, json};

use crate::error::{Error, at};

/// Writes config and manifest of an image whose layers are in the store.
pub(crate) fn write_image(store: &Store, layers: &[Layer], config: &Value) -> Result<Descriptor, Error> {
    write_annotated_image(store, layers, config, &BTreeMap::new())
}

/// As [`write_image`], with annotations of the manifest.
pub(super) fn write_annotated_image(
    store: &Store,
    layers: &[Layer],
    config: &Value,
    annotations: &BTreeMap<String, String>,
) -> Result<Descriptor, Error> {
    let put = |media_type: MediaType, value: &Value| {
        let path = Path::new("image config");
        let text = canonical_json(value).map_err(|error| at(path)(std::io::Error::from(error)))?;
        let descriptor = Descriptor::new(media_type.clone(), text.len() as u64, Hasher::digest_of(&text));
        // Of a build from the cache nothing is new, and nothing has to wait for the disk.
        if store.has_blob(&descriptor) && store.read_blob(&descriptor, text.len() as u64).is_ok() {
            return Ok(descriptor);
        }
        Ok::<_, Error>(store.put_blob(media_type, &text[..])?)
    };
    let config = put(MediaType::ImageConfig, config)?;
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            json!({
                "mediaType": oci::oci_media_type(layer.descriptor.media_type()),
                "digest": layer.descriptor.digest(), "size": layer.descriptor.size(),
            })
        })
        .collect();
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MediaType::ImageManifest,
        "config": config,
        "layers": layers,
    });
    if !annotations.is_empty() {
        manifest["annotations"] = json!(annotations);
    }
    let mut descriptor = put(MediaType::ImageManifest, &manifest)?;
    descriptor.set_platform(Some(oci::host_platform()));
    // The specification's own rules, before the image gets a name.
    Image::open(store, &descriptor)?;
    Ok(descriptor)
}
