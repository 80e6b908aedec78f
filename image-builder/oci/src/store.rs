//! The local store: an OCI image layout (image-spec 1.1, `image-layout.md`) that several builds may write at once.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, Digest, DigestAlgorithm, ImageIndex, ImageIndexBuilder, MediaType};

use crate::digest::{Hasher, VerifyingReader};
use crate::error::at;
use crate::sessions::Session;
use crate::{Error, Image, canonical_json};

const LAYOUT_FILE: &str = "oci-layout";
pub(crate) const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
const INDEX_FILE: &str = "index.json";
const BLOBS: &str = "blobs/sha256";
/// Blobs being written. Not in the layout's own folders, so that no reader takes one for a blob.
const INCOMING: &str = ".incoming";
/// An `index.json` that is being written.
const NEW_PREFIX: &str = ".new-";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The longest `index.json` that is read: some 20 thousand tags, and a broken file must not fill the memory.
const MAX_INDEX: u64 = 16 << 20;
/// The buffer for copying blobs.
const COPY_BUFFER: usize = 256 << 10;

/// An OCI image layout folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    /// Whether what is written must outlast a power cut.
    durable: bool,
    /// What keeps [`Store::remove_blob`] of others from what this one uses; none for a store that is only read.
    session: Option<Arc<Session>>,
}

/// One line of the store's list of images.
#[derive(Clone, Debug)]
pub struct Tagged {
    /// The value of `org.opencontainers.image.ref.name`, where there is one.
    pub name: Option<String>,
    /// The manifest or index.
    pub descriptor: Descriptor,
}

impl Store {
    /// Opens a layout that must be there.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let marker = root.join(LAYOUT_FILE);
        match fs::metadata(&marker) {
            Ok(_) => Ok(Self { root: root.to_owned(), durable: true, session: None }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Invalid {
                what: root.display().to_string(),
                reason: format!("no OCI image layout: {LAYOUT_FILE} is missing"),
            }),
            Err(error) => Err(at(&marker)(error)),
        }
    }

    /// Opens the layout, making an empty one where nothing is. What an aborted writer left is removed.
    pub fn open_or_create(root: &Path) -> Result<Self, Error> {
        Self { root: root.to_owned(), durable: true, session: None }.create()
    }

    /// A layout that nobody looks at after this process: an archive of thousands of blobs is unpacked in the time that it
    /// takes to sync some.
    pub(crate) fn temporary(root: &Path) -> Result<Self, Error> {
        Self { root: root.to_owned(), durable: false, session: None }.create()
    }

    fn create(self) -> Result<Self, Error> {
        let mut store = self;
        let root = store.root.clone();
        for folder in [store.root.join(BLOBS), store.root.join(INCOMING)] {
            fs::create_dir_all(&folder).map_err(at(&folder))?;
        }
        let _lock = store.lock()?;
        let marker = store.root.join(LAYOUT_FILE);
        if !marker.exists() {
            let index = store.root.join(INDEX_FILE);
            if !index.exists() {
                store.write_index(&empty_index())?;
            }
            store.replace(&marker, LAYOUT.as_bytes())?;
        }
        store.sweep()?;
        // The lock is ours: no index is being written.
        for entry in fs::read_dir(&root).map_err(at(&root))? {
            let path = entry.map_err(at(&root))?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NEW_PREFIX)) {
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        store.session = Some(Arc::new(Session::begin(&root)?));
        Ok(store)
    }

    /// The layout's folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Starts a blob whose digest is not known yet.
    pub fn blob_writer(&self) -> Result<BlobWriter, Error> {
        let (incoming, lock) = self.incoming()?;
        let file = tempfile::NamedTempFile::new_in(&incoming).map_err(at(&incoming))?;
        Ok(BlobWriter { store: self.clone(), file, hasher: Hasher::new(), _lock: lock })
    }

    /// A temporary folder on the store's disk. It goes when it is dropped, or is swept when its owner was killed.
    pub fn scratch(&self) -> Result<Scratch, Error> {
        let (incoming, lock) = self.incoming()?;
        let folder = tempfile::tempdir_in(&incoming).map_err(at(&incoming))?;
        Ok(Scratch { folder, _lock: lock })
    }

    /// Stores what `reader` gives under the digest that it turns out to have.
    pub fn put_blob(&self, media_type: MediaType, mut reader: impl Read) -> Result<Descriptor, Error> {
        let mut writer = self.blob_writer()?;
        let path = writer.path().to_owned();
        copy(&mut reader, &mut writer).map_err(|error| Error::reading(&path.display().to_string(), error))?;
        let (digest, size) = writer.finish()?;
        Ok(Descriptor::new(media_type, size, digest))
    }

    /// Stores a blob whose digest and size were promised; other bytes are refused and leave nothing.
    pub fn put_verified(&self, descriptor: &Descriptor, reader: impl Read) -> Result<(), Error> {
        if self.has_blob(descriptor) {
            return Ok(());
        }
        let what = format!("blob {}", descriptor.digest());
        let mut reader =
            VerifyingReader::new(reader, what.clone(), descriptor.digest().clone(), Some(descriptor.size()))?;
        let mut writer = self.blob_writer()?;
        copy(&mut reader, &mut writer).map_err(|error| Error::reading(&what, error))?;
        writer.finish()?;
        Ok(())
    }

    /// Whether the blob is there with the right length; its bytes are checked when they are read. Who asks relies on it:
    /// it counts as used now, and stays as long as this store is open.
    pub fn has_blob(&self, descriptor: &Descriptor) -> bool {
        let Ok(path) = self.blob_path(descriptor.digest()) else { return false };
        let _using = self.session.as_ref().map(|_| self.using());
        let is_there = fs::metadata(&path)
            .is_ok_and(|metadata| metadata.is_file() && metadata.len() == descriptor.size());
        if is_there && self.session.is_some() {
            // In a store that may not be written nothing is removed either.
            let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
            let _ = rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty());
        }
        is_there
    }

    /// The bytes of a blob, checked against its digest and size as they are read to the end.
    pub fn open_blob(&self, descriptor: &Descriptor) -> Result<VerifyingReader<BufReader<File>>, Error> {
        let path = self.blob_path(descriptor.digest())?;
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                what: format!("blob {}", descriptor.digest()),
                place: self.root.display().to_string(),
            },
            _ => at(&path)(error),
        })?;
        VerifyingReader::new(
            BufReader::with_capacity(COPY_BUFFER, file),
            format!("blob {}", descriptor.digest()),
            descriptor.digest().clone(),
            Some(descriptor.size()),
        )
    }

    /// A small blob as a whole, checked. More than `limit` bytes are refused before anything is read.
    pub fn read_blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, Error> {
        let what = format!("blob {}", descriptor.digest());
        if descriptor.size() > limit {
            return Err(Error::corrupt(
                what,
                format!("it has {} bytes, at most {limit} expected", descriptor.size()),
            ));
        }
        let mut bytes = Vec::with_capacity(descriptor.size() as usize);
        self.open_blob(descriptor)?.read_to_end(&mut bytes).map_err(|error| Error::reading(&what, error))?;
        Ok(bytes)
    }

    /// The file of a blob.
    pub fn blob_path(&self, digest: &Digest) -> Result<PathBuf, Error> {
        if *digest.algorithm() != DigestAlgorithm::Sha256 {
            return Err(Error::unsupported(format!("digest {digest}"), "only sha256 digests are"));
        }
        Ok(self.root.join(BLOBS).join(digest.digest()))
    }

    /// Gives the image the name; another image of that name loses it. Safe against other processes that tag.
    pub fn tag(&self, name: &str, descriptor: &Descriptor) -> Result<(), Error> {
        let mut descriptor = descriptor.clone();
        let mut annotations = descriptor.annotations().clone().unwrap_or_default();
        annotations.insert(REF_NAME.to_owned(), name.to_owned());
        descriptor.set_annotations(Some(annotations));
        let _lock = self.lock()?;
        let mut entries = self.entries()?;
        if entries.iter().any(|entry| entry.name.as_deref() == Some(name) && entry.descriptor == descriptor) {
            return Ok(());
        }
        entries.retain(|entry| entry.name.as_deref() != Some(name));
        entries.push(Tagged { name: Some(name.to_owned()), descriptor });
        self.write_entries(entries)
    }

    /// Takes the name away and says whether there was one. Blobs stay: another image may hold them.
    pub fn untag(&self, name: &str) -> Result<bool, Error> {
        let _lock = self.lock()?;
        let mut entries = self.entries()?;
        let before = entries.len();
        entries.retain(|entry| entry.name.as_deref() != Some(name));
        let found = entries.len() != before;
        if found {
            self.write_entries(entries)?;
        }
        Ok(found)
    }

    /// The descriptor of the image with that name.
    pub fn resolve(&self, name: &str) -> Result<Option<Descriptor>, Error> {
        let found = self.entries()?.into_iter().find(|entry| entry.name.as_deref() == Some(name));
        Ok(found.map(|entry| entry.descriptor))
    }

    /// As [`Store::resolve`]; without a name the layout must hold exactly one image.
    pub fn resolve_or_only(&self, name: Option<&str>) -> Result<Descriptor, Error> {
        let place = || self.root.display().to_string();
        let entries = self.entries()?;
        match name {
            Some(name) => entries
                .iter()
                .find(|entry| entry.name.as_deref() == Some(name))
                .map(|entry| entry.descriptor.clone())
                .ok_or_else(|| Error::NotFound {
                    what: format!("image {name:?}"),
                    place: format!("{} (it holds: {})", place(), names(&entries)),
                }),
            None => match entries.as_slice() {
                [only] => Ok(only.descriptor.clone()),
                _ => Err(Error::Invalid {
                    what: place(),
                    reason: format!(
                        "the layout holds {} images ({}): say which one with :TAG",
                        entries.len(),
                        names(&entries)
                    ),
                }),
            },
        }
    }

    /// The image with that name, its manifest and config read and checked.
    pub fn image(&self, name: &str) -> Result<Image, Error> {
        let descriptor = self.resolve(name)?.ok_or_else(|| Error::NotFound {
            what: format!("image {name}"),
            place: format!("the local store {}", self.root.display()),
        })?;
        Image::open(self, &descriptor)
    }

    /// Every image in the index, by name.
    pub fn list(&self) -> Result<Vec<Tagged>, Error> {
        let mut entries = self.entries()?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Takes the entries away of which `keep` says so, and gives them. Blobs stay.
    pub fn untag_all(&self, keep: impl Fn(&Tagged) -> bool) -> Result<Vec<Tagged>, Error> {
        let _lock = self.lock()?;
        let (kept, gone): (Vec<_>, Vec<_>) = self.entries()?.into_iter().partition(keep);
        if !gone.is_empty() {
            self.write_entries(kept)?;
        }
        Ok(gone)
    }

    /// What writers left behind that were killed, or that are at work.
    pub fn half_made(&self) -> Result<Vec<PathBuf>, Error> {
        let mut found = Vec::new();
        for (folder, prefix) in [(self.root.join(INCOMING), ""), (self.root.clone(), NEW_PREFIX)] {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries {
                let entry = entry.map_err(at(&folder))?;
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }

    fn entries(&self) -> Result<Vec<Tagged>, Error> {
        let path = self.root.join(INDEX_FILE);
        let file = File::open(&path).map_err(at(&path))?;
        let mut text = Vec::new();
        file.take(MAX_INDEX + 1).read_to_end(&mut text).map_err(at(&path))?;
        let what = path.display().to_string();
        if text.len() as u64 > MAX_INDEX {
            return Err(Error::corrupt(what, format!("it has more than {MAX_INDEX} bytes")));
        }
        let index: ImageIndex =
            serde_json::from_slice(&text).map_err(|error| Error::corrupt(what, error.to_string()))?;
        let entry = |descriptor: &Descriptor| Tagged {
            name: descriptor
                .annotations()
                .as_ref()
                .and_then(|map: &HashMap<_, _>| map.get(REF_NAME).cloned()),
            descriptor: descriptor.clone(),
        };
        Ok(index.manifests().iter().map(entry).collect())
    }

    fn write_entries(&self, mut entries: Vec<Tagged>) -> Result<(), Error> {
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut index = empty_index();
        index.set_manifests(entries.into_iter().map(|entry| entry.descriptor).collect());
        self.write_index(&index)
    }

    fn write_index(&self, index: &ImageIndex) -> Result<(), Error> {
        let path = self.root.join(INDEX_FILE);
        let text = canonical_json(index).map_err(|error| at(&path)(error.into()))?;
        self.replace(&path, &text)
    }

    /// Writes beside the target, syncs, renames: a reader sees the old file or the new one.
    fn replace(&self, path: &Path, contents: &[u8]) -> Result<(), Error> {
        let mut file =
            tempfile::Builder::new().prefix(NEW_PREFIX).tempfile_in(&self.root).map_err(at(path))?;
        let written = file.write_all(contents).and_then(|()| publish_mode(file.as_file(), self.durable));
        written.map_err(at(path))?;
        file.persist(path).map_err(|error| at(path)(error.error))?;
        if self.durable { sync_directory(&self.root) } else { Ok(()) }
    }

    /// One writer of `index.json` at a time. The lock is on the folder: a layout holds no foreign files.
    fn lock(&self) -> Result<File, Error> {
        let folder = File::open(&self.root).map_err(at(&self.root))?;
        folder.lock().map_err(at(&self.root))?;
        Ok(folder)
    }

    /// The folder for what is being written, with a lock that every writer shares: the sweep, which wants it alone, runs
    /// only when none is at work.
    fn incoming(&self) -> Result<(PathBuf, File), Error> {
        let incoming = self.root.join(INCOMING);
        fs::create_dir_all(&incoming).map_err(at(&incoming))?;
        let lock = File::open(&incoming).map_err(at(&incoming))?;
        lock.lock_shared().map_err(at(&incoming))?;
        Ok((incoming, lock))
    }

    fn sweep(&self) -> Result<(), Error> {
        let incoming = self.root.join(INCOMING);
        let folder = File::open(&incoming).map_err(at(&incoming))?;
        if folder.try_lock().is_err() {
            return Ok(());
        }
        for entry in fs::read_dir(&incoming).map_err(at(&incoming))? {
            let entry = entry.map_err(at(&incoming))?;
            let path = entry.path();
            let is_folder = entry.file_type().map_err(at(&path))?.is_dir();
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(at(&path))?;
        }
        Ok(())
    }
}

/// A temporary folder beside the store's blobs.
#[derive(Debug)]
pub struct Scratch {
    folder: tempfile::TempDir,
    _lock: File,
}

impl Scratch {
    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A blob being written; dropped without [`BlobWriter::finish`] it leaves nothing.
pub struct BlobWriter {
    store: Store,
    file: tempfile::NamedTempFile,
    hasher: Hasher,
    _lock: File,
}

impl BlobWriter {
    /// Syncs the bytes and puts them in their place. Gives their digest and number.
    pub fn finish(self) -> Result<(Digest, u64), Error> {
        let (digest, size) = self.hasher.finish();
        let path = self.store.blob_path(&digest)?;
        publish_mode(self.file.as_file(), self.store.durable).map_err(at(&path))?;
        self.file.persist(&path).map_err(|error| at(&path)(error.error))?;
        if self.store.durable {
            sync_directory(&self.store.root.join(BLOBS))?;
        }
        Ok((digest, size))
    }

    /// As [`BlobWriter::finish`], if the bytes are those that were promised; else nothing is left of them.
    pub fn finish_as(self, promised: &Descriptor) -> Result<(), Error> {
        let (digest, size) = self.hasher.clone().finish();
        if (&digest, size) != (promised.digest(), promised.size()) {
            let what = format!("blob {}", promised.digest());
            let reason = format!("expected {} bytes, got {size} with the digest {digest}", promised.size());
            return Err(Error::corrupt(what, reason));
        }
        self.finish().map(drop)
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Copies one image, its config and its layers, and gives the descriptor of its manifest. Of an index, only the image
/// for this machine's platform is copied. Every byte is checked on the way.
pub fn copy_image(from: &Store, descriptor: &Descriptor, to: &Store) -> Result<Descriptor, Error> {
    let image = Image::open(from, descriptor)?;
    let manifest = Descriptor::new(
        image.descriptor.media_type().clone(),
        image.descriptor.size(),
        image.descriptor.digest().clone(),
    );
    let blobs = image.manifest.layers().iter().chain([image.manifest.config(), &manifest]);
    for blob in blobs {
        if !to.has_blob(blob) {
            to.put_verified(blob, from.open_blob(blob)?)?;
        }
    }
    Ok(image.descriptor)
}

/// The text of an `index.json` that names one manifest.
pub(crate) fn index_of(manifest: &Descriptor, tag: &str) -> Result<Vec<u8>, serde_json::Error> {
    let mut manifest = manifest.clone();
    manifest.set_annotations(Some(HashMap::from([(REF_NAME.to_owned(), tag.to_owned())])));
    let mut index = empty_index();
    index.set_manifests(vec![manifest]);
    canonical_json(&index)
}

fn empty_index() -> ImageIndex {
    ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(Vec::new())
        .build()
        .expect("every required field is set")
}

fn names(entries: &[Tagged]) -> String {
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_deref().unwrap_or("<no name>")).collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

/// Temporary files are made 0600; an image is for whoever may reach its folder.
fn publish_mode(file: &File, sync: bool) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    if sync { file.sync_all() } else { Ok(()) }
}

fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(at(path))
}

/// `io::copy` moves 8 KiB at a time between types that it does not know.
fn copy(reader: &mut impl Read, writer: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BUFFER];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => writer.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path()).unwrap();
        (dir, store)
    }

    fn manifest(store: &Store, text: &str) -> Descriptor {
        store.put_blob(MediaType::ImageManifest, text.as_bytes()).unwrap()
    }

    #[test]
    fn names_come_and_go() {
        let (dir, store) = store();
        let (one, two) = (manifest(&store, "one"), manifest(&store, "two"));
        store.tag("a", &one).unwrap();
        store.tag("b", &one).unwrap();
        store.tag("a", &two).unwrap();
        let again = Store::open(dir.path()).unwrap();
        assert_eq!(again.resolve("a").unwrap().unwrap().digest(), two.digest());
        assert_eq!(again.resolve("b").unwrap().unwrap().digest(), one.digest());
        assert_eq!(again.list().unwrap().len(), 2);
        assert!(again.untag("b").unwrap());
        assert!(!again.untag("b").unwrap());
        assert_eq!(again.resolve("b").unwrap(), None);
        let error = again.resolve_or_only(Some("b")).unwrap_err().to_string();
        assert!(error.contains("it holds: a"), "{error}");
        assert_eq!(again.resolve_or_only(None).unwrap().digest(), two.digest());
    }

    #[test]
    fn concurrent_builds_lose_no_names() {
        let (dir, store) = store();
        let image = manifest(&store, "image");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (path, image) = (dir.path(), &image);
                scope.spawn(move || {
                    // Each opens the layout itself, as a process does: flock excludes by open file, not by process.
                    let store = Store::open_or_create(path).unwrap();
                    for index in 0..10 {
                        store.tag(&format!("{writer}-{index}"), image).unwrap();
                        store.put_blob(MediaType::ImageLayer, format!("{writer}{index}").as_bytes()).unwrap();
                    }
                });
            }
        });
        assert_eq!(store.list().unwrap().len(), 40);
    }

    #[test]
    fn a_corrupt_blob_is_refused_and_the_store_stays_whole() {
        let (dir, store) = store();
        let promised = Descriptor::new(MediaType::ImageLayer, 4, Hasher::digest_of(b"good"));
        let error = store.put_verified(&promised, &b"evil"[..]).unwrap_err();
        assert!(
            matches!(&error, Error::Corrupt { .. }) && error.to_string().contains("expected sha256:"),
            "{error}"
        );
        assert!(!store.has_blob(&promised));
        assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
        store.put_verified(&promised, &b"good"[..]).unwrap();

        fs::write(store.blob_path(promised.digest()).unwrap(), b"rots").unwrap();
        assert!(matches!(store.read_blob(&promised, 10), Err(Error::Corrupt { .. })));
        assert!(matches!(store.read_blob(&promised, 3), Err(Error::Corrupt { .. })));
        assert_eq!(store.list().unwrap().len(), 0);
    }

    #[test]
    fn what_an_aborted_writer_left_is_swept_but_not_a_live_one() {
        let (dir, store) = store();
        let leftover = dir.path().join(INCOMING).join("leftover");
        fs::write(&leftover, b"half").unwrap();
        fs::create_dir(dir.path().join(INCOMING).join("folder")).unwrap();
        let mut live = store.blob_writer().unwrap();
        live.write_all(b"live").unwrap();
        Store::open_or_create(dir.path()).unwrap();
        assert!(leftover.exists(), "nothing is swept while somebody writes");
        live.finish().unwrap();
        Store::open_or_create(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path().join(INCOMING)).unwrap().count(), 0);
    }

    #[test]
    fn damaged_layouts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Store::open(dir.path()), Err(Error::Invalid { .. })));
        let store = Store::open_or_create(dir.path()).unwrap();
        fs::write(dir.path().join(INDEX_FILE), b"{").unwrap();
        assert!(matches!(store.list(), Err(Error::Corrupt { .. })));
        let odd: Digest = "other:abc".to_owned().try_into().unwrap();
        assert!(matches!(store.blob_path(&odd), Err(Error::Unsupported { .. })));
    }
}
