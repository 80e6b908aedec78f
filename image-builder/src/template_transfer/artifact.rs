//! The artifact: a manifest that names a template's parts.

use std::collections::HashSet;
use std::path::Path;

use oci::{Descriptor, Hasher, ImageManifest, MAX_MANIFEST, MediaType};
use rootfs_tools::chunk::{ChunkSize, ContentDigest, Manifest, packed_limit};
use serde_json::json;
use template::{MAX_TEMPLATE_JSON, Template, parse_template};

use crate::error::Error;

/// What the artifact is, for registries and for people who list them.
const ARTIFACT: &str = "application/vnd.tiffin.template.v1";
const CONFIG: &str = "application/vnd.tiffin.template.config.v1+json";
const LIST: &str = "application/vnd.tiffin.rootfs.chunks.v1+json";
const CHUNK: &str = "application/vnd.tiffin.rootfs.chunk.v1+zstd";

/// How many chunks a file is cut into, more or less. A chunk is a request or two, and a line of 170 bytes in a manifest.
const USUAL_CHUNKS: u64 = 2048;
/// Of an image of 200 MiB two builds share as much in chunks of 1 MiB as in those of 64 KiB, because what two images have in
/// common is at the same place in both; smaller chunks are only more requests.
const LEAST_CHUNK: u64 = 1 << 20;
/// The largest chunk that there is.
const MOST_CHUNK: u64 = 16 << 20;
/// The most chunks of an artifact: 320 GiB of data, and a manifest that registries take (4 MiB).
const MAX_CHUNKS: usize = 20_000;
/// The longest list: each of the chunks may be there more than once, and has zeros beside it.
pub(super) const MAX_LIST: u64 = 32 << 20;

/// The parts of a template, as the manifest names them.
pub(super) struct Artifact {
    /// The manifest itself.
    pub(super) descriptor: Descriptor,
    pub(super) config: Descriptor,
    pub(super) list: Descriptor,
    pub(super) chunks: Vec<Descriptor>,
}

/// A chunk by its contents, with their length.
pub(super) type Chunk = (ContentDigest, u64);

/// How a file of that length is cut.
pub(super) fn chunk_size(file: u64) -> ChunkSize {
    let wanted = file.div_ceil(USUAL_CHUNKS).next_power_of_two().clamp(LEAST_CHUNK, MOST_CHUNK);
    ChunkSize::new(wanted).unwrap_or_default()
}

/// Each chunk once, in the order in which the file first has it: the order of the artifact's layers.
pub(super) fn distinct(list: &Manifest) -> Vec<Chunk> {
    let mut known = HashSet::new();
    list.stored().filter(|(digest, _)| known.insert(*digest)).collect()
}

impl Artifact {
    /// The artifact of these parts, and the bytes of its manifest.
    pub(super) fn new(
        config: &[u8],
        list: &[u8],
        chunks: Vec<Descriptor>,
        template: &Template,
    ) -> Result<(Self, Vec<u8>), Error> {
        let blob = |media_type: &str, bytes: &[u8]| {
            Descriptor::new(media_type.into(), bytes.len() as u64, Hasher::digest_of(bytes))
        };
        let (config, list) = (blob(CONFIG, config), blob(LIST, list));
        let layers: Vec<_> = [&list].into_iter().chain(&chunks).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "artifactType": ARTIFACT,
            "config": config, "layers": layers,
            "annotations": {"tiffin.rootfs.digest": template.rootfs.digest, "tiffin.image.digest": template.image.digest},
        });
        let text = oci::canonical_json(&manifest)
            .map_err(|error| Error::Io { path: "the manifest".into(), error: error.into() })?;
        if chunks.len() > MAX_CHUNKS || text.len() as u64 > MAX_MANIFEST {
            return Err(Error::Invalid {
                what: "the root file system".to_owned(),
                reason: format!("it has {} chunks of data; at most {MAX_CHUNKS} can travel", chunks.len()),
            });
        }
        let descriptor =
            Descriptor::new(MediaType::ImageManifest, text.len() as u64, Hasher::digest_of(&text));
        Ok((Self { descriptor, config, list, chunks }, text))
    }

    /// What a manifest names. `descriptor` is that of its bytes.
    pub(super) fn parse(descriptor: Descriptor, bytes: &[u8]) -> Result<Self, Error> {
        let what = format!("template artifact {}", descriptor.digest());
        let corrupt = |reason: String| Error::Oci(oci::Error::Corrupt { what: what.clone(), reason });
        let manifest: ImageManifest =
            serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
        let artifact_type = manifest.artifact_type().as_ref().map(MediaType::as_ref).unwrap_or_default();
        if artifact_type != ARTIFACT || manifest.config().media_type().as_ref() != CONFIG {
            let reason = match manifest.config().media_type() {
                MediaType::ImageConfig => {
                    "this is an image; make a template of it with template create".to_owned()
                }
                other => format!(
                    "expected the artifact type {ARTIFACT}, got {artifact_type:?} with a config of {other}"
                ),
            };
            return Err(Error::Invalid { what, reason });
        }
        let (list, chunks) = match manifest.layers().split_first() {
            Some((list, chunks)) if list.media_type().as_ref() == LIST => (list.clone(), chunks.to_vec()),
            _ => return Err(corrupt(format!("expected a first layer of type {LIST}"))),
        };
        if chunks.len() > MAX_CHUNKS {
            return Err(corrupt(format!("it has {} chunks, at most {MAX_CHUNKS} are taken", chunks.len())));
        }
        if let Some(other) = chunks.iter().find(|chunk| chunk.media_type().as_ref() != CHUNK) {
            return Err(corrupt(format!("expected layers of type {CHUNK}, got {}", other.media_type())));
        }
        for (blob, most) in [(manifest.config(), MAX_TEMPLATE_JSON), (&list, MAX_LIST)] {
            if blob.size() > most {
                return Err(corrupt(format!(
                    "{} has {} bytes, at most {most} expected",
                    blob.digest(),
                    blob.size()
                )));
            }
        }
        let config = manifest.config().clone();
        Ok(Self { descriptor, config, list, chunks })
    }

    /// The template and the list of its chunks, which must fit each other and the manifest. Gives them with the chunks in
    /// the order of the layers.
    pub(super) fn contents(
        &self,
        config: &[u8],
        list: &[u8],
    ) -> Result<(Template, Manifest, Vec<Chunk>), Error> {
        let what = format!("template artifact {}", self.descriptor.digest());
        let corrupt = |reason: String| Error::Oci(oci::Error::Corrupt { what: what.clone(), reason });
        let template = parse_template(Path::new(&what), config)?;
        let list = Manifest::parse(&what, list).map_err(|error| corrupt(error.to_string()))?;
        let (got, expected) = (list.digest().to_string(), template.rootfs.digest.to_string());
        if got != expected || list.size() != template.rootfs.size {
            return Err(corrupt(format!(
                "its chunks make {} bytes with the digest {got}, its template says {} bytes with {expected}",
                list.size(),
                template.rootfs.size
            )));
        }
        if template.snapshot_only {
            return Err(corrupt("it is one of a sandbox's snapshot, which does not travel".to_owned()));
        }
        let chunks = distinct(&list);
        if chunks.len() != self.chunks.len() {
            return Err(corrupt(format!("it has {} chunks, its list {}", self.chunks.len(), chunks.len())));
        }
        for ((digest, length), blob) in chunks.iter().zip(&self.chunks) {
            let most = packed_limit(*length);
            if blob.size() > most {
                return Err(corrupt(format!(
                    "chunk {digest} of {length} bytes is packed in {}, at most {most} expected",
                    blob.size()
                )));
            }
        }
        Ok((template, list, chunks))
    }
}

/// The descriptor of a packed chunk.
pub(super) fn chunk_descriptor(packed: &mut impl std::io::Read) -> std::io::Result<Descriptor> {
    let mut hasher = Hasher::new();
    std::io::copy(packed, &mut hasher)?;
    let (digest, size) = hasher.finish();
    Ok(Descriptor::new(CHUNK.into(), size, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use template::{Machine, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage};

    fn template(list: &Manifest) -> Template {
        Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "app".into(), digest: Hasher::digest_of(b"image") },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: list.digest().to_string().parse().unwrap(), size: list.size() },
            runtime: RuntimeConfig::default(),
            machine: Machine::default(),
            snapshot_only: false,
        }
    }

    fn list(digests: &[&str]) -> Manifest {
        let chunks: Vec<_> = digests
            .iter()
            .map(|text| json!({"digest": ContentDigest::of(text.as_bytes()), "length": 4096}))
            .collect();
        let text = json!({
            "schema_version": 1, "chunk_size": 4096, "size": 4096 * digests.len(),
            "digest": ContentDigest::of(b"file"), "chunks": chunks,
        });
        Manifest::parse("m", text.to_string().as_bytes()).unwrap()
    }

    fn chunk(text: &str) -> Descriptor {
        chunk_descriptor(&mut text.as_bytes()).unwrap()
    }

    #[test]
    fn chunks_grow_with_the_file() {
        for (file, chunk) in [
            (0, 1 << 20),
            (200 << 20, 1 << 20),
            (2 << 30, 1 << 20),
            (3u64 << 30, 2 << 20),
            (1 << 40, 16 << 20),
        ] {
            assert_eq!(chunk_size(file).bytes(), chunk, "{file}");
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let made = list(&["a", "b", "a"]);
        let (config, text) = (serde_json::to_vec(&template(&made)).unwrap(), made.to_json());
        let (artifact, manifest) =
            Artifact::new(&config, &text, vec![chunk("A"), chunk("B")], &template(&made)).unwrap();
        let parsed = Artifact::parse(artifact.descriptor.clone(), &manifest).unwrap();
        let (_, _, chunks) = parsed.contents(&config, &text).unwrap();
        assert_eq!(chunks.len(), 2, "a chunk that is there twice is one layer");

        let manifest = String::from_utf8(manifest).unwrap();
        let refused = |from: &str, to: &str, reason: &str| {
            let bad = manifest.replacen(from, to, 1);
            assert_ne!(bad, manifest);
            let error = Artifact::parse(artifact.descriptor.clone(), bad.as_bytes())
                .map(drop)
                .unwrap_err()
                .to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused(ARTIFACT, "application/x", "expected the artifact type");
        refused(CONFIG, "application/vnd.oci.image.config.v1+json", "this is an image");
        refused(LIST, CHUNK, "expected a first layer");
        refused(CHUNK, "application/x", "expected layers of type");
        refused(&format!("\"size\":{}", artifact.list.size()), "\"size\":99999999999", "at most");

        let other = list(&["a", "b", "c"]);
        let error = |config: &[u8], text: &[u8]| parsed.contents(config, text).unwrap_err().to_string();
        assert!(error(&config, &other.to_json()).contains("its list 3"));
        assert!(
            error(&serde_json::to_vec(&template(&list(&["a"]))).unwrap(), &text)
                .contains("its template says")
        );
        assert!(error(b"{}", &text).contains("schema_version"));
        let big = vec![Descriptor::new(CHUNK.into(), 1 << 20, Hasher::digest_of(b"x")); 2];
        let (big, _) = Artifact::new(&config, &text, big, &template(&made)).unwrap();
        assert!(big.contents(&config, &text).unwrap_err().to_string().contains("is packed in"));
        let many = vec![chunk("A"); MAX_CHUNKS + 1];
        assert!(Artifact::new(&config, &text, many, &template(&made)).is_err());
        // As many as may be are a manifest that registries take.
        assert!(Artifact::new(&config, &text, vec![chunk("A"); MAX_CHUNKS], &template(&made)).is_ok());
    }
}
