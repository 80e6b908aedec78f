//! `--cache-to` and `--cache-from`: results of steps for another machine, as an image layout.
//!
//! ```text
//! index.json       one entry, named "tiffin-cache"
//!   manifest       config: the records of the steps; layers: their layers
//! ```
//!
//! It is an artifact like any other, so that registries and skopeo carry it. Nothing in it is believed: a record must have
//! the digest of its key, and before a layer is used its blob and its contents are checked against both of their digests.
//! What a layer holds is a promise of whoever made it, as with every image: take caches from builds that you trust.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use oci::{Descriptor, Digest, Layer, MAX_LAYERS, MediaType, Store};
use serde_json::{Value, json};

use crate::cache::{Record, StepCache, StepKey, StepResult};
use crate::console::Console;
use crate::error::{Error, at};

/// The name of the entry.
const NAME: &str = "tiffin-cache";
const MEDIA_TYPE: &str = "application/vnd.tiffin.cache.v1+json";
/// The longest list of records that is read or written; an average record has 2 KiB.
const MAX_RECORDS: u64 = 32 << 20;
const MAX_MANIFEST: u64 = 4 << 20;

/// A folder of `--cache-from`.
#[derive(Debug)]
pub(crate) struct Imported {
    folder: PathBuf,
    layout: Store,
    /// By the digests of their keys.
    records: HashMap<String, Record>,
}

impl Imported {
    /// Reads the records. A folder that is not there is an empty cache: the first build of a pipeline has none.
    pub(crate) fn open(folder: &Path, console: &Console) -> Result<Option<Self>, Error> {
        if !folder.join("index.json").exists() {
            console.line(&format!("note: there is no cache in {}", folder.display()));
            return Ok(None);
        }
        let layout = Store::open(folder)?;
        let descriptor = layout.resolve_or_only(Some(NAME))?;
        let corrupt = |reason: String| {
            Error::Oci(oci::Error::Corrupt { what: format!("cache {}", folder.display()), reason })
        };
        let manifest: Value = serde_json::from_slice(&layout.read_blob(&descriptor, MAX_MANIFEST)?)
            .map_err(|error| corrupt(error.to_string()))?;
        let config: Descriptor = serde_json::from_value(manifest["config"].clone())
            .map_err(|error| corrupt(format!("its config: {error}")))?;
        if config.media_type().as_ref() != MEDIA_TYPE {
            return Err(corrupt(format!(
                "its records are of type {}, expected {MEDIA_TYPE}",
                config.media_type()
            )));
        }
        let text = layout.read_blob(&config, MAX_RECORDS)?;
        let list: Vec<Record> = serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))?;
        let with_key = |record: Record| Some((record.step_key()?.digest().digest().to_owned(), record));
        let records = list.into_iter().filter_map(with_key).collect();
        Ok(Some(Self { folder: folder.to_owned(), layout, records }))
    }

    /// The result of the step, checked and in our own store and cache from now on.
    pub(crate) fn take(
        &self,
        key: &StepKey,
        store: &Store,
        cache: &StepCache,
        console: &Console,
    ) -> Option<StepResult> {
        let record = self.records.get(key.digest().digest())?;
        match self.fetch(record, store).and_then(|()| cache.put_record(key, record)) {
            Ok(()) => Some(record.result.clone()),
            Err(error) => {
                let folder = self.folder.display();
                console.line(&format!(
                    "warning: the cache {folder} has a damaged result, which is not used: {error}"
                ));
                None
            }
        }
    }

    fn fetch(&self, record: &Record, store: &Store) -> Result<(), Error> {
        let Some(layer) = &record.result.layer else { return Ok(()) };
        if !store.has_blob(&layer.descriptor) {
            // The contents first: a blob that is in the store under its own digest is not damage.
            let theirs = Layer::new(&self.layout, layer.descriptor.clone(), layer.diff_id.clone())?;
            let path = self.layout.blob_path(layer.descriptor.digest())?;
            io::copy(&mut theirs.open()?, &mut io::sink()).map_err(at(&path))?;
            store.put_verified(&layer.descriptor, self.layout.open_blob(&layer.descriptor)?)?;
        } else {
            let ours = Layer::new(store, layer.descriptor.clone(), layer.diff_id.clone())?;
            let path = store.blob_path(layer.descriptor.digest())?;
            io::copy(&mut ours.open()?, &mut io::sink()).map_err(at(&path))?;
        }
        Ok(())
    }
}

/// Writes the results with those keys, and takes away what the folder held besides.
pub(crate) fn export(
    folder: &Path,
    keys: &[Digest],
    store: &Store,
    cache: &StepCache,
    console: &Console,
) -> Result<(), Error> {
    let layout = Store::open_or_create(folder)?;
    let mut records = BTreeMap::new();
    let mut layers: BTreeMap<String, Descriptor> = BTreeMap::new();
    for key in keys {
        let Some(record) = cache.record(key) else { continue };
        if let Some(layer) = &record.result.layer {
            layers.insert(layer.descriptor.digest().to_string(), layer.descriptor.clone());
        }
        records.insert(key.digest().to_owned(), record);
    }
    if layers.len() > MAX_LAYERS {
        return Err(Error::Invalid {
            what: format!("--cache-to {}", folder.display()),
            reason: format!("the build has {} layers, at most {MAX_LAYERS} can be exported", layers.len()),
        });
    }
    let total = layers.values().map(Descriptor::size).fold(0, u64::saturating_add);
    let work = console.work(&format!("writing the cache to {}", folder.display()), Some(total));
    for layer in layers.values() {
        layout.put_verified(layer, store.open_blob(layer)?)?;
        work.advance(layer.size());
    }
    let encode =
        |value: &Value| serde_json::to_vec(value).map_err(|error| at(folder)(io::Error::from(error)));
    let text = encode(&json!(records.values().collect::<Vec<_>>()))?;
    if text.len() as u64 > MAX_RECORDS {
        return Err(Error::Invalid {
            what: format!("--cache-to {}", folder.display()),
            reason: format!("its records have {} bytes, at most {MAX_RECORDS} can be exported", text.len()),
        });
    }
    let config = layout.put_blob(MediaType::Other(MEDIA_TYPE.to_owned()), &text[..])?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MediaType::ImageManifest,
        "artifactType": MEDIA_TYPE,
        "config": config,
        "layers": layers.into_values().collect::<Vec<_>>(),
    });
    let descriptor = layout.put_blob(MediaType::ImageManifest, &encode(&manifest)?[..])?;
    layout.tag(NAME, &descriptor)?;
    // What earlier builds left: else the folder grows with each.
    let mut reached: Vec<Digest> = Vec::new();
    for entry in layout.list()? {
        reached.extend(layout.reachable(&entry.descriptor));
    }
    let reached: std::collections::HashSet<_> = reached.iter().map(|digest| digest.to_string()).collect();
    // Our own session must not protect what we want to be gone.
    let path = layout.path().to_owned();
    drop(layout);
    let layout = Store::open(&path)?;
    let removal = layout.removal()?;
    for blob in layout.blobs()?.0 {
        if !reached.contains(blob.digest.as_ref()) {
            layout.remove_blob(&removal, &blob.digest)?;
        }
    }
    Ok(())
}
