//! `docker-archive`: what `docker save` writes and `docker load` reads.
//!
//! ```text
//! manifest.json   [{"Config": "<hex>.json", "RepoTags": ["app:1"], "Layers": ["<hex>.tar", ..]}]
//! <hex>.json      the image's config
//! <hex>.tar       a layer, not compressed; older ones are links to where another image has the same
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::Path;

use oci_spec::image::{Descriptor, MediaType};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::archive::{append, replace};
use crate::error::at;
use crate::layer::{Change, Compression, Kind, LayerReader};
use crate::{Archive, Error, Image, MAX_LAYERS, Store};

/// The longest `manifest.json`: hundreds of images with all their layers.
const MAX_LIST: u64 = 4 << 20;
/// The most files of an archive: every layer of hundreds of images with the three files that old ones have beside it.
const MAX_FILES: usize = 100_000;
/// How many links are followed to a layer. Writers make one.
const MAX_LINKS: usize = 8;

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Unpacks one image of the archive into a temporary layout under `scratch`: the one of that name, or the only one. Its
/// layers are kept as they are, so that their digests are their diff_ids.
pub fn open_docker_archive(file: &Path, name: Option<&str>, scratch: &Path) -> Result<Archive, Error> {
    let what = format!("docker-archive {}", file.display());
    let input = BufReader::with_capacity(256 << 10, File::open(file).map_err(at(file))?);
    let folder = tempfile::tempdir_in(scratch).map_err(at(scratch))?;
    let store = Store::temporary(folder.path())?;
    let corrupt = |reason: String| Error::corrupt(what.clone(), reason);
    let mut reader = LayerReader::new(input);
    let (mut blobs, mut links, mut list) = (HashMap::new(), HashMap::new(), None);
    while let Some(change) = reader.next_change().map_err(|error| corrupt(error.to_string()))? {
        let Change::Node(node) = change else { continue };
        let path = String::from_utf8_lossy(node.path.as_bytes()).into_owned();
        if blobs.len() + links.len() >= MAX_FILES {
            return Err(corrupt(format!("it has more than {MAX_FILES} files")));
        }
        match node.kind {
            Kind::File { size, .. } if path == "manifest.json" => {
                if size > MAX_LIST {
                    return Err(corrupt(format!(
                        "manifest.json has {size} bytes, at most {MAX_LIST} expected"
                    )));
                }
                let mut text = Vec::new();
                reader.read_to_end(&mut text).map_err(|error| Error::reading(&what, error))?;
                let parsed: Vec<Listed> = serde_json::from_slice(&text)
                    .map_err(|error| corrupt(format!("manifest.json: {error}")))?;
                list = Some(parsed);
            }
            Kind::File { .. } => {
                let blob = store.put_blob(MediaType::ImageLayer, &mut reader)?;
                blobs.insert(path, blob);
            }
            Kind::Symlink(target) => {
                links.insert(path, String::from_utf8_lossy(&target).into_owned());
            }
            _ => {}
        }
    }
    let list = list.ok_or_else(|| Error::Invalid {
        what: what.clone(),
        reason: "no docker-archive: manifest.json is missing".to_owned(),
    })?;
    let image = choose(&what, list, name)?;
    let find = |path: &str| {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            match (blobs.get(&path), links.get(&path)) {
                (Some(blob), _) => return Ok(blob.clone()),
                (None, Some(target)) => path = beside(&path, target),
                (None, None) => break,
            }
        }
        Err(corrupt(format!("manifest.json names {path:?}, which is not there")))
    };
    if image.layers.len() > MAX_LAYERS {
        return Err(corrupt(format!(
            "it has {} layers, at most {MAX_LAYERS} can be stacked",
            image.layers.len()
        )));
    }
    let mut config = find(&image.config)?;
    config.set_media_type(MediaType::ImageConfig);
    let mut layers = Vec::new();
    for path in &image.layers {
        let mut layer = find(path)?;
        layer.set_media_type(compression(&store, &layer)?.media_type());
        layers.push(layer);
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": layers,
    });
    let text = serde_json::to_vec(&manifest).map_err(|error| corrupt(error.to_string()))?;
    let manifest = store.put_blob(MediaType::ImageManifest, &text[..])?;
    store.tag("image", &manifest)?;
    Ok(Archive::filled(store, folder))
}

fn choose(what: &str, list: Vec<Listed>, name: Option<&str>) -> Result<Listed, Error> {
    let names: Vec<_> = list.iter().flat_map(|image| image.repo_tags.iter().flatten().cloned()).collect();
    let invalid = |reason: String| Error::Invalid {
        what: what.to_owned(),
        reason: format!("{reason} (it holds: {})", names.join(", ")),
    };
    let named = |image: &Listed, name: &str| {
        let tags = image.repo_tags.iter().flatten();
        let same =
            |tag: &String| tag == name || matches!((full(tag), full(name)), (Some(a), Some(b)) if a == b);
        tags.into_iter().any(same)
    };
    let count = list.len();
    let mut fitting = list.into_iter().filter(|image| name.is_none_or(|name| named(image, name)));
    match (fitting.next(), fitting.next(), name) {
        (Some(image), None, _) | (Some(image), _, Some(_)) => Ok(image),
        (None, _, Some(name)) => Err(invalid(format!("there is no image {name:?} in it"))),
        _ => Err(invalid(format!("it holds {count} images: say which one with docker-archive:FILE:NAME"))),
    }
}

fn full(name: &str) -> Option<String> {
    name.parse::<crate::ImageName>().ok().map(|name| name.canonical())
}

/// Where a link leads inside the archive.
fn beside(path: &str, target: &str) -> String {
    let mut parts: Vec<_> = path.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Most layers are plain; some writers compress them and say so nowhere.
fn compression(store: &Store, layer: &Descriptor) -> Result<Compression, Error> {
    let path = store.blob_path(layer.digest())?;
    let mut start = Vec::new();
    File::open(&path).and_then(|file| file.take(4).read_to_end(&mut start)).map_err(at(&path))?;
    Ok(match start.as_slice() {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
        _ => Compression::None,
    })
}

/// Writes one image, under a temporary name that is renamed at the end. Every byte is checked on the way.
pub fn write_docker_archive(
    store: &Store,
    descriptor: &Descriptor,
    name: Option<&str>,
    file: &Path,
) -> Result<(), Error> {
    let image = Image::open(store, descriptor)?;
    let config = store.read_blob(image.manifest.config(), image.manifest.config().size())?;
    let config_name = format!("{}.json", image.manifest.config().digest().digest());
    let listed = Listed {
        config: config_name.clone(),
        repo_tags: name.map(|name| vec![name.to_owned()]),
        layers: image.layers.iter().map(|layer| format!("{}.tar", layer.diff_id.digest())).collect(),
    };
    let list = serde_json::to_vec(&[&listed]).map_err(|error| at(file)(error.into()))?;
    let scratch = store.scratch()?;
    replace(file, |output| {
        let mut builder = tar::Builder::new(output);
        for (index, layer) in image.layers.iter().enumerate() {
            // The same layer twice is one file.
            if listed.layers[..index].contains(&listed.layers[index]) {
                continue;
            }
            // A tar header has the length first, and only the decompressed bytes tell it.
            let mut plain = tempfile::tempfile_in(scratch.path())?;
            let size = io::copy(&mut layer.open().map_err(io::Error::other)?, &mut plain)?;
            plain.rewind()?;
            append(&mut builder, &listed.layers[index], size, plain)?;
        }
        append(&mut builder, &config_name, config.len() as u64, &config[..])?;
        append(&mut builder, "manifest.json", list.len() as u64, &list[..])?;
        builder.into_inner()?.flush()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{LayerPath, LayerWriter, Metadata, Node};

    fn image(store: &Store, compression: Compression) -> Descriptor {
        let mut writer = LayerWriter::new(store, compression).unwrap();
        let kind = Kind::File { size: 5, offset: 0 };
        let path = LayerPath::parse(b"file").unwrap();
        writer
            .append(
                &Node { path, metadata: Metadata { mode: 0o644, ..Metadata::default() }, kind },
                &b"hello"[..],
            )
            .unwrap();
        let layer = writer.finish().unwrap();
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        });
        let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer.descriptor]});
        store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn an_image_comes_back_with_its_config_and_contents() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        let file = dir.path().join("image.tar");
        for compression in [Compression::Zstd, Compression::Gzip, Compression::None] {
            let written = Image::open(&store, &image(&store, compression)).unwrap();
            write_docker_archive(&store, &written.descriptor, Some("app:1"), &file).unwrap();
            for name in [None, Some("app:1"), Some("docker.io/library/app:1")] {
                let archive = open_docker_archive(&file, name, dir.path()).unwrap();
                let found = archive.store().image("image").unwrap();
                assert_eq!(found.manifest.config().digest(), written.manifest.config().digest());
                assert_eq!(found.layers[0].diff_id, written.layers[0].diff_id);
                io::copy(&mut found.layers[0].open().unwrap(), &mut io::sink()).unwrap();
            }
            let missing =
                open_docker_archive(&file, Some("other:1"), dir.path()).map(drop).unwrap_err().to_string();
            assert!(missing.contains("it holds: app:1"), "{missing}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn links_stay_inside_and_lies_are_named() {
        for (path, target, found) in [
            ("a/layer.tar", "../b/layer.tar", "b/layer.tar"),
            ("x", "../../../etc/passwd", "etc/passwd"),
            ("a/b", "/c", "a/c"),
        ] {
            assert_eq!(beside(path, target), found);
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bad.tar");
        let refused = |entries: &[(&str, &[u8])], reason: &str| {
            let mut builder = tar::Builder::new(File::create(&file).unwrap());
            for (name, contents) in entries {
                append(&mut builder, name, contents.len() as u64, *contents).unwrap();
            }
            let mut link = tar::Header::new_gnu();
            link.set_entry_type(tar::EntryType::Symlink);
            link.set_size(0);
            builder.append_link(&mut link, "loop", "loop").unwrap();
            builder.into_inner().unwrap();
            let error = open_docker_archive(&file, None, dir.path()).map(drop).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused(&[("x", b"y")], "manifest.json is missing");
        refused(&[("manifest.json", b"{")], "manifest.json:");
        refused(&[("manifest.json", b"[]")], "it holds 0 images");
        let listed = br#"[{"Config":"../../etc/passwd","RepoTags":null,"Layers":[]}]"#;
        refused(&[("manifest.json", listed)], "which is not there");
        let listed = br#"[{"Config":"loop","RepoTags":null,"Layers":[]}]"#;
        refused(&[("manifest.json", listed)], "which is not there");
    }
}
