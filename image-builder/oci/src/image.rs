//! An image: manifest, config, layers.

use std::io::{self, Read};

use oci_spec::image::{
    Arch, Descriptor, Digest, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os, Platform,
};
use std::str::FromStr;

use crate::digest::{DigestMismatch, VerifyingReader};
use crate::layer::Compression;
use crate::{Error, Store};

/// overlayfs stacks at most 500 layers (`OVL_MAX_STACK`); Docker stops at 127.
pub const MAX_LAYERS: usize = 500;
/// The longest uncompressed layer. Larger than any disk that a sandbox is given, small enough to end a bomb.
pub const MAX_UNCOMPRESSED_LAYER: u64 = 64 << 30;
/// deflate cannot exceed 1032:1, so an honest gzip layer never meets this; zstd bombs do.
const MAX_RATIO: u64 = 1100;
/// Small blobs may exceed the ratio (a sparse file of zeros in a zstd layer).
const RATIO_FLOOR: u64 = 256 << 20;
/// Registries take manifests of up to 4 MiB (distribution-spec 1.1).
pub const MAX_MANIFEST: u64 = 4 << 20;
/// A config grows with its history; 127 layers make some 30 KB.
const MAX_CONFIG: u64 = 8 << 20;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// An image whose manifest and config were read and fit each other. Its layers are checked when they are read.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest's descriptor.
    pub descriptor: Descriptor,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The config, as far as the specification names its fields.
    pub config: ImageConfiguration,
    /// The config with every field, also Docker's own (`Shell`, `Healthcheck`, `OnBuild`).
    pub config_json: serde_json::Value,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// A layer of an image in a store.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The compressed blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
    compression: Compression,
    store: Store,
}

impl Image {
    /// Reads the image that `descriptor` names: a manifest, or an index with one for this machine's platform.
    pub fn open(store: &Store, descriptor: &Descriptor) -> Result<Self, Error> {
        let manifest_descriptor = select_manifest(store, descriptor)?;
        let what = format!("manifest {}", manifest_descriptor.digest());
        let manifest: ImageManifest = parse(&what, &store.read_blob(&manifest_descriptor, MAX_MANIFEST)?)?;
        if manifest.schema_version() != 2 {
            return Err(Error::unsupported(
                what,
                format!("its schema version is {}, only 2 is known", manifest.schema_version()),
            ));
        }
        let config_type = manifest.config().media_type();
        if *config_type != MediaType::ImageConfig && config_type.as_ref() != DOCKER_CONFIG {
            return Err(Error::unsupported(
                what,
                format!("its config is a {config_type}: this is an artifact, not a container image"),
            ));
        }
        let config_what = format!("config {}", manifest.config().digest());
        let config_bytes = store.read_blob(manifest.config(), MAX_CONFIG)?;
        let config: ImageConfiguration = parse(&config_what, &config_bytes)?;
        let config_json = parse(&config_what, &config_bytes)?;

        let (descriptors, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
        if descriptors.len() != diff_ids.len() {
            return Err(Error::corrupt(
                what,
                format!("it has {} layers, its config names {} diff_ids", descriptors.len(), diff_ids.len()),
            ));
        }
        if descriptors.len() > MAX_LAYERS {
            return Err(Error::unsupported(
                what,
                format!("it has {} layers, at most {MAX_LAYERS} can be stacked", descriptors.len()),
            ));
        }
        let layer = |(descriptor, diff_id): (&Descriptor, &String)| {
            let compression = Compression::of(descriptor.media_type()).ok_or_else(|| {
                Error::unsupported(
                    format!("layer {}", descriptor.digest()),
                    format!("its media type is {}", descriptor.media_type()),
                )
            })?;
            let diff_id = Digest::from_str(diff_id).map_err(|error| {
                Error::corrupt(config_what.clone(), format!("diff_id {diff_id:?}: {error}"))
            })?;
            Ok(Layer { descriptor: descriptor.clone(), diff_id, compression, store: store.clone() })
        };
        let layers = descriptors.iter().zip(diff_ids).map(layer).collect::<Result<_, Error>>()?;
        Ok(Self {
            digest: manifest_descriptor.digest().clone(),
            descriptor: manifest_descriptor,
            manifest,
            config,
            config_json,
            layers,
        })
    }

    /// What it runs on, as its config says.
    pub fn platform(&self) -> Platform {
        let mut platform = Platform::default();
        platform.set_os(self.config.os().clone());
        platform.set_architecture(self.config.architecture().clone());
        platform.set_variant(self.config_json["variant"].as_str().map(str::to_owned));
        platform
    }

    /// The sum of the compressed sizes, in bytes.
    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.descriptor.size()).fold(0, u64::saturating_add)
    }
}

impl Layer {
    /// The layer with that blob in the store; its media type says how it is compressed.
    pub fn new(store: &Store, descriptor: Descriptor, diff_id: Digest) -> Result<Self, Error> {
        let compression = Compression::of(descriptor.media_type()).ok_or_else(|| {
            Error::unsupported(
                format!("layer {}", descriptor.digest()),
                format!("its media type is {}", descriptor.media_type()),
            )
        })?;
        Ok(Self { descriptor, diff_id, compression, store: store.clone() })
    }

    /// The store that has the blob.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The uncompressed tar stream. Reading it to its end checks the size and the digest of the blob and the diff_id;
    /// a mismatch is an `InvalidData` error with [`DigestMismatch`] inside. A consumer that stops earlier has checked
    /// nothing.
    pub fn open(&self) -> Result<impl Read + Send + use<>, Error> {
        let blob = self.store.open_blob(&self.descriptor)?;
        let what = format!("layer {} (diff_id)", self.descriptor.digest());
        VerifyingReader::new(self.decompress(blob)?, what, self.diff_id.clone(), None)
    }

    /// The uncompressed stream of `blob`, which must be this layer's, within the bounds of [`Layer::open`] but unchecked: the
    /// caller compares the digests. Reading it to its end, or to an error, reads the blob to its end.
    pub fn decompress<R: Read + Send + 'static>(&self, blob: R) -> Result<impl Read + Send + use<R>, Error> {
        let what = format!("layer {}", self.descriptor.digest());
        let decoder = self.compression.decoder(blob).map_err(|error| Error::reading(&what, error))?;
        let limit = MAX_UNCOMPRESSED_LAYER
            .min(self.descriptor.size().saturating_mul(MAX_RATIO))
            .max(RATIO_FLOOR.min(MAX_UNCOMPRESSED_LAYER));
        Ok(Bounded { inner: decoder, left: limit, limit, what })
    }
}

struct Bounded<R> {
    inner: R,
    left: u64,
    limit: u64,
    what: String,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => {
                return Err(DigestMismatch {
                    what: format!("{} (decompressed)", self.what),
                    expected: format!("at most {} bytes", self.limit),
                    got: "more".to_owned(),
                }
                .into());
            }
        }
        Ok(count)
    }
}

/// The blobs that a manifest in the store names, config first, whether they are there or not.
pub fn blobs_of(store: &Store, manifest: &Descriptor) -> Result<Vec<Descriptor>, Error> {
    let what = format!("manifest {}", manifest.digest());
    let manifest: ImageManifest = parse(&what, &store.read_blob(manifest, MAX_MANIFEST)?)?;
    if manifest.layers().len() > MAX_LAYERS {
        return Err(Error::unsupported(what, format!("it has more than {MAX_LAYERS} layers")));
    }
    Ok([manifest.config()].into_iter().chain(manifest.layers()).cloned().collect())
}

/// What an index in the store names.
pub fn manifests_of(store: &Store, index: &Descriptor) -> Result<Vec<Descriptor>, Error> {
    let what = format!("index {}", index.digest());
    let index: ImageIndex = parse(&what, &store.read_blob(index, MAX_MANIFEST)?)?;
    Ok(index.manifests().clone())
}

/// The type of a manifest or an index, from its own bytes. It names it itself; old OCI ones do not, but an index has
/// `manifests`.
pub fn media_type_of(manifest: &[u8]) -> Result<MediaType, Error> {
    let value: serde_json::Value = parse("manifest", manifest)?;
    Ok(match value["mediaType"].as_str() {
        Some(name) => MediaType::from(name),
        None if value["manifests"].is_array() => MediaType::ImageIndex,
        None => MediaType::ImageManifest,
    })
}

/// The platform whose images run on this machine.
pub fn host_platform() -> Platform {
    let mut platform = Platform::default();
    platform.set_os(Os::Linux);
    platform.set_architecture(if cfg!(target_arch = "aarch64") { Arch::ARM64 } else { Arch::Amd64 });
    platform
}

/// The OCI media type of a layer or config that may carry Docker's, the bytes being the same.
pub fn oci_media_type(media_type: &MediaType) -> MediaType {
    match media_type.as_ref() {
        DOCKER_MANIFEST => MediaType::ImageManifest,
        DOCKER_LIST => MediaType::ImageIndex,
        DOCKER_CONFIG => MediaType::ImageConfig,
        DOCKER_LAYER => MediaType::ImageLayer,
        DOCKER_LAYER_GZIP => MediaType::ImageLayerGzip,
        DOCKER_LAYER_ZSTD => MediaType::ImageLayerZstd,
        _ => media_type.clone(),
    }
}

/// The manifest that `descriptor` names: itself, or the one for this machine's platform in an index. Only the index
/// must be in the store.
pub fn select_manifest(store: &Store, descriptor: &Descriptor) -> Result<Descriptor, Error> {
    select_manifest_for(store, descriptor, &host_platform())
}

/// As [`select_manifest`], for another platform. One without a variant takes any.
pub fn select_manifest_for(
    store: &Store,
    descriptor: &Descriptor,
    wanted: &Platform,
) -> Result<Descriptor, Error> {
    match oci_media_type(descriptor.media_type()) {
        MediaType::ImageManifest => return Ok(descriptor.clone()),
        MediaType::ImageIndex => {}
        other => {
            return Err(Error::unsupported(
                format!("image {}", descriptor.digest()),
                format!("its media type is {other}; expected an OCI or Docker schema 2 manifest or index"),
            ));
        }
    }
    let what = format!("index {}", descriptor.digest());
    let index: ImageIndex = parse(&what, &store.read_blob(descriptor, MAX_MANIFEST)?)?;
    let fits = |platform: &Platform| crate::platform::platform_fits(platform, wanted);
    let is_manifest =
        |candidate: &&Descriptor| oci_media_type(candidate.media_type()) == MediaType::ImageManifest;
    let found = index
        .manifests()
        .iter()
        .filter(is_manifest)
        .find(|candidate| candidate.platform().as_ref().is_some_and(fits))
        // An index that skopeo or a test wrote for one image may name no platform at all.
        .or_else(|| {
            index.manifests().iter().filter(is_manifest).find(|candidate| candidate.platform().is_none())
        });
    found.cloned().ok_or_else(|| {
        let platforms: Vec<_> = index
            .manifests()
            .iter()
            .filter_map(|candidate| candidate.platform().as_ref())
            .map(crate::platform_text)
            .collect();
        Error::NotFound {
            what: format!("an image for {}", crate::platform_text(wanted)),
            place: format!("{what} (it holds: {})", platforms.join(", ")),
        }
    })
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::corrupt(what, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hasher;
    use crate::layer::{Kind, LayerPath, LayerReader, LayerWriter, Metadata, Node, WrittenLayer};
    use crate::{Archive, ImageReference, copy_image, write_archive};
    use serde_json::json;

    fn layer(store: &Store, compression: Compression) -> WrittenLayer {
        let mut writer = LayerWriter::new(store, compression).unwrap();
        let node = Node {
            path: LayerPath::parse(b"file").unwrap(),
            metadata: Metadata { mode: 0o644, ..Metadata::default() },
            kind: Kind::File { size: 5, offset: 0 },
        };
        writer.append(&node, &b"hello"[..]).unwrap();
        writer.finish().unwrap()
    }

    fn put(store: &Store, media_type: &str, value: &serde_json::Value) -> Descriptor {
        store.put_blob(media_type.into(), value.to_string().as_bytes()).unwrap()
    }

    fn image_with(store: &Store, layer: &WrittenLayer, media_type: &str, diff_id: &str) -> Descriptor {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Shell": ["/bin/x"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        });
        let config = put(store, DOCKER_CONFIG, &config);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
            "config": config,
            "layers": [{
                "mediaType": media_type, "digest": layer.descriptor.digest(), "size": layer.descriptor.size(),
            }],
        });
        put(store, DOCKER_MANIFEST, &manifest)
    }

    fn docker_image(store: &Store) -> Descriptor {
        let layer = layer(store, Compression::Gzip);
        image_with(store, &layer, DOCKER_LAYER_GZIP, layer.diff_id.as_ref())
    }

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        (dir, store)
    }

    #[test]
    fn dockers_images_are_read_and_keep_their_fields() {
        let (_dir, store) = store();
        let image = Image::open(&store, &docker_image(&store)).unwrap();
        assert_eq!(image.config_json["config"]["Shell"], json!(["/bin/x"]));
        let mut reader = LayerReader::new(image.layers[0].open().unwrap());
        assert!(reader.next_change().unwrap().is_some());
        assert_eq!(reader.next_change().unwrap(), None);
    }

    #[test]
    fn an_index_gives_the_image_of_this_machine() {
        let (_dir, store) = store();
        let image = docker_image(&store);
        let other = put(&store, DOCKER_MANIFEST, &json!({"other": true}));
        let host = host_platform().architecture().to_string();
        let entry = |descriptor: &Descriptor, architecture: &str| {
            json!({
                "mediaType": DOCKER_MANIFEST, "digest": descriptor.digest(), "size": descriptor.size(),
                "platform": {"os": "linux", "architecture": architecture},
            })
        };
        let index = |entries: Vec<serde_json::Value>| {
            put(
                &store,
                DOCKER_LIST,
                &json!({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": entries}),
            )
        };
        let found = Image::open(&store, &index(vec![entry(&other, "s390x"), entry(&image, &host)])).unwrap();
        assert_eq!(found.digest, *image.digest());
        let error = Image::open(&store, &index(vec![entry(&other, "s390x")])).unwrap_err().to_string();
        assert!(error.contains("it holds: linux/s390x"), "{error}");
    }

    #[test]
    fn a_damaged_layer_is_refused_by_digest() {
        let (_dir, store) = store();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let written = layer(&store, compression);
            let descriptor =
                image_with(&store, &written, compression.media_type().as_ref(), written.diff_id.as_ref());
            let image = Image::open(&store, &descriptor).unwrap();
            let path = store.blob_path(written.descriptor.digest()).unwrap();
            let good = std::fs::read(&path).unwrap();
            for damage in 0..good.len().min(400) {
                let mut bad = good.clone();
                bad[damage] ^= 0x40;
                std::fs::write(&path, &bad).unwrap();
                let error = match image.layers[0].open() {
                    Ok(mut stream) => io::copy(&mut stream, &mut io::sink()).unwrap_err(),
                    Err(error) => panic!("{error}"),
                };
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                let inner = error.get_ref().unwrap().downcast_ref::<DigestMismatch>();
                assert!(inner.is_some(), "{compression:?} byte {damage}: {error}");
            }
            std::fs::write(&path, &good).unwrap();
        }
    }

    #[test]
    fn a_wrong_diff_id_is_refused() {
        let (_dir, store) = store();
        let written = layer(&store, Compression::Zstd);
        let wrong = Hasher::digest_of(b"something else");
        let descriptor = image_with(&store, &written, DOCKER_LAYER_ZSTD, wrong.as_ref());
        let image = Image::open(&store, &descriptor).unwrap();
        let error = io::copy(&mut image.layers[0].open().unwrap(), &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("diff_id") && error.contains(wrong.as_ref()), "{error}");
    }

    #[test]
    fn a_decompression_bomb_ends() {
        let (_dir, store) = store();
        // 300 MiB of zeros in some 10 KB: more than the ratio and the floor allow.
        let mut encoder = Compression::Zstd.encoder(Vec::new()).unwrap();
        io::copy(&mut io::repeat(0).take(300 << 20), &mut encoder).unwrap();
        let blob = encoder.finish().unwrap();
        let descriptor = store.put_blob(MediaType::ImageLayerZstd, &blob[..]).unwrap();
        let bomb = Layer {
            descriptor,
            diff_id: Hasher::digest_of(b""),
            compression: Compression::Zstd,
            store: store.clone(),
        };
        let error = io::copy(&mut bomb.open().unwrap(), &mut io::sink()).unwrap_err().to_string();
        assert!(error.contains("expected at most"), "{error}");
    }

    #[test]
    fn what_is_no_image_is_said_to_be_none() {
        let (_dir, store) = store();
        let written = layer(&store, Compression::Gzip);
        let refused = |descriptor: &Descriptor, text: &str| {
            let error = Image::open(&store, descriptor).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        refused(
            &image_with(&store, &written, "application/x-thing", written.diff_id.as_ref()),
            "application/x-thing",
        );
        refused(&image_with(&store, &written, DOCKER_LAYER, "sha256:short"), "sha256:short");
        refused(&put(&store, "application/vnd.docker.distribution.manifest.v1+json", &json!({})), "schema 2");
        refused(&put(&store, DOCKER_MANIFEST, &json!({})), "corrupt manifest");
        let chart = json!({
            "schemaVersion": 2, "layers": [],
            "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": written.diff_id, "size": 2},
        });
        refused(&put(&store, DOCKER_MANIFEST, &chart), "artifact");
    }

    #[test]
    fn archives_hold_the_whole_image() {
        let (dir, store) = store();
        let image = docker_image(&store);
        let file = dir.path().join("image.tar");
        write_archive(&store, &image, Some("x:1"), &file).unwrap();
        let archive = Archive::open(&file, dir.path()).unwrap();
        let found = archive.store().resolve_or_only(Some("x:1")).unwrap();
        assert_eq!(found.digest(), image.digest());
        let other = Store::open_or_create(&dir.path().join("other")).unwrap();
        copy_image(archive.store(), &found, &other).unwrap();
        io::copy(&mut Image::open(&other, &found).unwrap().layers[0].open().unwrap(), &mut io::sink())
            .unwrap();
        drop(archive);
        let left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        assert_eq!(std::fs::read_dir(store.path().join(".incoming")).unwrap().count(), 0);

        let good = std::fs::read(&file).unwrap();
        let mut bad = good.clone();
        let last = good.windows(5).rposition(|window| window == b"layer").unwrap();
        bad[last] ^= 1;
        std::fs::write(&file, bad).unwrap();
        assert!(matches!(Archive::open(&file, dir.path()), Err(Error::Corrupt { .. })));
        std::fs::write(&file, [0x1f, 0x8b, 8, 0]).unwrap();
        assert!(matches!(Archive::open(&file, dir.path()), Err(Error::Unsupported { .. })));
        std::fs::write(&file, [0; 1024]).unwrap();
        assert!(matches!(Archive::open(&file, dir.path()), Err(Error::Invalid { .. })));
        assert!("oci-archive:x".parse::<ImageReference>().is_ok());
    }
}
