//! From the last stage to an image in the store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use oci::layer::Timestamp;
use oci::{Descriptor, Hasher, Image, Layer, MediaType, Store, canonical_json};
use serde_json::{Value, json};

use super::{Build, BuildReport, Built};
use crate::cache::{About, Parts, StepKey, StepResult, layer_of};
use crate::clock;
use crate::error::{Error, at};
use crate::rewrite;

impl Build<'_> {
    /// Writes the image of a stage, and gives it its names.
    pub(super) fn image(&self, mut built: Built) -> Result<BuildReport, Error> {
        built.config.labels.extend(self.labels.clone());
        built.config.labels.extend(self.options.labels.clone());
        if let Some(epoch) = self.epoch {
            built.created = clock::rfc3339(epoch);
            built.history.iter_mut().for_each(|entry| entry.created.clone_from(&built.created));
            if self.options.rewrite_timestamp {
                self.rewrite(&mut built, epoch)?;
            }
        }
        let diff_ids: Vec<_> = built.layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let config = built.config.to_json(&built.created, &diff_ids, &built.history);
        let descriptor =
            write_annotated_image(&self.store, &built.layers, &config, &self.options.annotations)?;
        let image = Image::open(&self.store, &descriptor)?;
        let mut names = Vec::new();
        for name in &self.options.names {
            self.store.tag(&name.canonical(), &descriptor)?;
            names.push(name.canonical());
        }
        Ok(BuildReport {
            names,
            digest: descriptor.digest().clone(),
            config_digest: image.manifest.config().digest().clone(),
            size: descriptor.size(),
            platform: oci::platform_text(&image.platform()),
            layers: built.layers.len(),
            executed: self.counts.executed.load(Ordering::Relaxed),
            cached: self.counts.cached.load(Ordering::Relaxed),
            shared: self.counts.shared.load(Ordering::Relaxed),
            outputs: Vec::new(),
        })
    }

    /// The layers of this build without files that are newer than `epoch`.
    fn rewrite(&self, built: &mut Built, epoch: Timestamp) -> Result<(), Error> {
        for layer in built.layers.iter_mut().skip(built.base_layers) {
            let parts = Parts::from_iter([
                ("kind".to_owned(), "rewrite".to_owned()),
                ("layer".to_owned(), layer.diff_id.to_string()),
                ("latest".to_owned(), clock::rfc3339(epoch)),
                ("compression".to_owned(), format!("{:?}", self.options.compression)),
            ]);
            let key = StepKey::of_parts(parts)?;
            let found = self.cache.find(&key, &self.store).filter(|_| !self.options.no_cache);
            let result = match found {
                Some(result) => result,
                None => {
                    let layer = rewrite::clamp(&self.store, layer, epoch, self.options.compression)?;
                    let created = clock::rfc3339(epoch);
                    let result = StepResult { layer: Some(layer), created };
                    self.cache.put(&key, &result, &About::default())?;
                    result
                }
            };
            if let Some(rewritten) = layer_of(&result, &self.store)? {
                *layer = rewritten;
            }
        }
        Ok(())
    }
}

/// Writes config and manifest of an image whose layers are in the store.
pub(crate) fn write_image(store: &Store, layers: &[Layer], config: &Value) -> Result<Descriptor, Error> {
    write_annotated_image(store, layers, config, &BTreeMap::new())
}

fn write_annotated_image(
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
    // The specification's own rules, before the image gets a name.
    descriptor.set_platform(Some(Image::open(store, &descriptor)?.platform()));
    Ok(descriptor)
}
