//! Images made by hand: tar streams by the tar crate, an OCI layout around them.

use std::path::{Path, PathBuf};

use oci::layer::Compression;
use oci::{Hasher, Image, MediaType, Store};
use serde_json::json;

/// One entry of a layer, with everything that a tar header and its PAX records say.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: tar::EntryType,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// As PAX has it: `[-]SECONDS[.FRACTION]`.
    pub(crate) mtime: String,
    pub(crate) link: Vec<u8>,
    pub(crate) data: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    fn new(path: impl AsRef<[u8]>, kind: tar::EntryType, mode: u32) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: "1700000000.123456789".to_owned(),
            link: Vec::new(),
            data: Vec::new(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    pub(crate) fn file(path: impl AsRef<[u8]>, data: impl Into<Vec<u8>>) -> Self {
        Self { data: data.into(), ..Self::new(path, tar::EntryType::Regular, 0o644) }
    }

    pub(crate) fn directory(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, tar::EntryType::Directory, 0o755)
    }

    pub(crate) fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, tar::EntryType::Symlink, 0o777) }
    }

    pub(crate) fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, tar::EntryType::Link, 0o644) }
    }

    pub(crate) fn device(path: impl AsRef<[u8]>, kind: tar::EntryType, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, kind, 0o660) }
    }

    pub(crate) fn fifo(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, tar::EntryType::Fifo, 0o600)
    }

    pub(crate) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub(crate) fn owner(self, uid: u64, gid: u64) -> Self {
        Self { uid, gid, ..self }
    }

    pub(crate) fn mtime(self, mtime: impl Into<String>) -> Self {
        Self { mtime: mtime.into(), ..self }
    }

    pub(crate) fn xattr(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.to_owned(), value.into()));
        self
    }
}

/// The tar stream of `entries`.
pub(crate) fn layer(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut records: Vec<(String, Vec<u8>)> = vec![
            ("path".to_owned(), entry.path.clone()),
            ("mtime".to_owned(), entry.mtime.clone().into_bytes()),
            ("uid".to_owned(), entry.uid.to_string().into_bytes()),
            ("gid".to_owned(), entry.gid.to_string().into_bytes()),
        ];
        if !entry.link.is_empty() {
            records.push(("linkpath".to_owned(), entry.link.clone()));
        }
        for (name, value) in &entry.xattrs {
            records.push((format!("SCHILY.xattr.{name}"), value.clone()));
        }
        builder
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
            .unwrap();
        let mut header = tar::Header::new_ustar();
        // Names go in as they are: the tar crate's own setters would refuse the hostile ones.
        let shorten = |field: &mut [u8; 100], name: &[u8]| {
            let length = name.len().min(99);
            field[..length].copy_from_slice(&name[..length]);
        };
        shorten(&mut header.as_old_mut().name, &entry.path);
        shorten(&mut header.as_old_mut().linkname, &entry.link);
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(0);
        header.set_size(entry.data.len() as u64);
        header.set_device_major(entry.device.0).unwrap();
        header.set_device_minor(entry.device.1).unwrap();
        header.set_cksum();
        builder.append(&header, &entry.data[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// An OCI layout in a temporary folder with one image, `test`.
pub(crate) struct TestImage {
    folder: tempfile::TempDir,
}

impl TestImage {
    /// The layers are gzip blobs.
    pub(crate) fn new(layers: &[Vec<u8>]) -> Self {
        Self::compressed(layers, Compression::Gzip)
    }

    /// The layers are their tar streams.
    pub(crate) fn plain(layers: &[Vec<u8>]) -> Self {
        Self::compressed(layers, Compression::None)
    }

    pub(crate) fn compressed(layers: &[Vec<u8>], compression: Compression) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(folder.path()).unwrap();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|tar| {
                let blob = match compression {
                    Compression::Gzip => gzip(tar),
                    Compression::Zstd => zstd::encode_all(&tar[..], 1).unwrap(),
                    Compression::None => tar.clone(),
                };
                store.put_blob(compression.media_type(), &blob[..]).unwrap()
            })
            .collect();
        let diff_ids: Vec<_> = layers.iter().map(|tar| Hasher::digest_of(tar).to_string()).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageManifest,
            "config": config,
            "layers": descriptors,
        });
        let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
        store.tag("test", &manifest).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn open(&self) -> Image {
        Store::open(self.path()).unwrap().image("test").unwrap()
    }

    /// The blob of layer `index`.
    pub(crate) fn blob(&self, index: usize) -> PathBuf {
        let image = self.open();
        Store::open(self.path()).unwrap().blob_path(image.layers[index].descriptor.digest()).unwrap()
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
