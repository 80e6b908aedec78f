//! From entries to a compressed layer, in one pass.

use std::io::{self, BufWriter, Read, Write};

use oci_spec::image::{Descriptor, Digest};

use super::compression::Encoder;
use super::pax::Records;
use super::{Compression, Kind, LayerPath, Node, OPAQUE, WHITEOUT};
use crate::digest::Hasher;
use crate::{BlobWriter, Error, Store};

/// The largest number that an octal field of 8 bytes holds; more goes to the PAX header.
const MAX_OCTAL_8: u64 = 0o7_777_777;
/// The same for a field of 12 bytes.
const MAX_OCTAL_12: u64 = 0o77_777_777_777;
const NAME_FIELD: usize = 100;
const BUFFER: usize = 256 << 10;
const BLOCK: usize = 512;
/// As much as zstd puts into one of its blocks.
const PIECE: usize = 128 << 10;

/// Writes one layer into a store. The same entries in the same order give the same bytes.
pub struct LayerWriter {
    out: Encoder<BufWriter<BlobWriter>>,
    /// What the encoder gets next: deflate's output depends on where its input is cut, so it gets pieces of one size.
    piece: Vec<u8>,
    hasher: Hasher,
    compression: Compression,
}

/// A layer that is in the store.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WrittenLayer {
    /// The compressed blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
    /// Length of the uncompressed tar stream in bytes.
    pub uncompressed_size: u64,
}

impl LayerWriter {
    /// Starts a layer; dropped without [`LayerWriter::finish`] it leaves nothing.
    pub fn new(store: &Store, compression: Compression) -> Result<Self, Error> {
        let blob = BufWriter::with_capacity(BUFFER, store.blob_writer()?);
        let out = compression.encoder(blob).map_err(|error| Error::reading("layer", error))?;
        Ok(Self { out, piece: Vec::with_capacity(PIECE), hasher: Hasher::new(), compression })
    }

    /// Adds a node. `data` must give exactly the bytes of a file (of a sparse one those of its runs), and is not read for
    /// any other kind. Holes are written as zeros, which compression makes small and every reader understands. A name that
    /// begins with `.wh.` is refused, as readers would take it for a mark.
    pub fn append(&mut self, node: &Node, data: impl Read) -> Result<(), Error> {
        if node.path.split().is_some_and(|(_, name)| name.starts_with(WHITEOUT)) {
            return Err(Error::Invalid {
                what: node.path.to_string(),
                reason: "no image can hold a file whose name begins with .wh.: that is how layers mark what is gone"
                    .to_owned(),
            });
        }
        self.put_node(node, data)
    }

    fn put_node(&mut self, node: &Node, mut data: impl Read) -> Result<(), Error> {
        let what = node.path.to_string();
        let mut name = node.path.as_bytes().to_vec();
        if node.path.is_root() {
            name.push(b'.');
        }
        let (kind, size, link, device) = match &node.kind {
            Kind::Directory => {
                name.push(b'/');
                (tar::EntryType::Directory, 0, None, None)
            }
            Kind::File { size, .. } | Kind::Sparse { size, .. } => {
                (tar::EntryType::Regular, *size, None, None)
            }
            Kind::Symlink(target) => (tar::EntryType::Symlink, 0, Some(target.as_slice()), None),
            Kind::HardLink(target) => (tar::EntryType::Link, 0, Some(target.as_bytes()), None),
            Kind::CharDevice { major, minor } => (tar::EntryType::Char, 0, None, Some((*major, *minor))),
            Kind::BlockDevice { major, minor } => (tar::EntryType::Block, 0, None, Some((*major, *minor))),
            Kind::Fifo => (tar::EntryType::Fifo, 0, None, None),
        };
        let metadata = &node.metadata;
        if let Some(name) = metadata.xattrs.keys().find(|name| name.contains(&b'=')) {
            return Err(Error::unsupported(
                format!("extended attribute {:?} of {what}", String::from_utf8_lossy(name)),
                "a layer cannot hold a name with '='",
            ));
        }
        let mut pax = Records { xattrs: metadata.xattrs.clone(), ..Records::default() };
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(metadata.mode & 0o7777);
        pax.path = put_text(&mut header.as_old_mut().name, &name);
        pax.linkpath = link.and_then(|link| put_text(&mut header.as_old_mut().linkname, link));
        pax.uid = spill(u64::from(metadata.uid), MAX_OCTAL_8);
        header.set_uid(if pax.uid.is_some() { 0 } else { u64::from(metadata.uid) });
        pax.gid = spill(u64::from(metadata.gid), MAX_OCTAL_8);
        header.set_gid(if pax.gid.is_some() { 0 } else { u64::from(metadata.gid) });
        pax.size = spill(size, MAX_OCTAL_12);
        header.set_size(if pax.size.is_some() { 0 } else { size });
        let seconds = u64::try_from(metadata.mtime.seconds).ok().filter(|seconds| *seconds <= MAX_OCTAL_12);
        if seconds.is_none() || metadata.mtime.nanoseconds != 0 {
            pax.mtime = Some(metadata.mtime);
        }
        header.set_mtime(seconds.unwrap_or(0));
        if let Some((major, minor)) = device {
            let set = header.set_device_major(major).and_then(|()| header.set_device_minor(minor));
            set.map_err(|error| Error::reading(&what, error))?;
        }
        header.set_cksum();

        let io = |error| Error::reading(&what, error);
        let extended = pax.encode();
        if !extended.is_empty() {
            self.put_header(tar::EntryType::XHeader, b"PaxHeaders/entry", extended.len() as u64)
                .map_err(io)?;
            self.put(&extended).and_then(|()| self.pad(extended.len() as u64)).map_err(io)?;
        }
        self.put(header.as_bytes()).map_err(io)?;
        let mut end = 0;
        if let Kind::Sparse { runs, .. } = &node.kind {
            for run in runs {
                self.put_data(io::repeat(0), run.start.saturating_sub(end)).map_err(io)?;
                self.put_data(&mut data, run.length).map_err(io)?;
                end = run.start + run.length;
            }
            self.put_data(io::repeat(0), size.saturating_sub(end)).map_err(io)?;
        } else {
            self.put_data(data, size).map_err(io)?;
        }
        self.pad(size).map_err(io)
    }

    /// Says that what the lower layers have at the path is gone.
    pub fn append_whiteout(&mut self, path: &LayerPath) -> Result<(), Error> {
        let Some((parent, name)) = path.split() else {
            return Err(Error::Invalid {
                what: "whiteout".to_owned(),
                reason: "the root directory cannot be removed".to_owned(),
            });
        };
        self.append_marker(&parent, &[WHITEOUT, name].concat())
    }

    /// Says that the directory shows nothing of the lower layers.
    pub fn append_opaque(&mut self, directory: &LayerPath) -> Result<(), Error> {
        self.append_marker(directory, OPAQUE)
    }

    /// Ends the tar stream, syncs the blob and puts it in its place.
    pub fn finish(mut self) -> Result<WrittenLayer, Error> {
        let io = |error| Error::reading("layer", error);
        self.put(&[0; 2 * BLOCK]).map_err(io)?;
        self.out.write_all(&self.piece).map_err(io)?;
        let blob = self.out.finish().and_then(|out| out.into_inner().map_err(io::IntoInnerError::into_error));
        let (digest, size) = blob.map_err(io)?.finish()?;
        let (diff_id, uncompressed_size) = self.hasher.finish();
        let descriptor = Descriptor::new(self.compression.media_type(), size, digest);
        Ok(WrittenLayer { descriptor, diff_id, uncompressed_size })
    }

    fn append_marker(&mut self, parent: &LayerPath, name: &[u8]) -> Result<(), Error> {
        let path = parent.join(name)?;
        let node = Node { path, metadata: Default::default(), kind: Kind::File { size: 0, offset: 0 } };
        self.put_node(&node, io::empty())
    }

    fn put_header(&mut self, kind: tar::EntryType, name: &[u8], size: u64) -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.put(header.as_bytes())
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        while let Some((now, later)) = bytes.split_at_checked(PIECE - self.piece.len()) {
            self.piece.extend_from_slice(now);
            self.out.write_all(&self.piece)?;
            self.piece.clear();
            bytes = later;
        }
        self.piece.extend_from_slice(bytes);
        Ok(())
    }

    fn put_data(&mut self, data: impl Read, size: u64) -> io::Result<()> {
        let mut data = data.take(size);
        let mut buffer = vec![0; BUFFER.min(usize::try_from(size).unwrap_or(BUFFER))];
        let mut written = 0;
        while written < size {
            match data.read(&mut buffer) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!(
                            "the file has {written} bytes, {size} expected: it changed while it was read"
                        ),
                    ));
                }
                Ok(count) => {
                    self.put(&buffer[..count])?;
                    written += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let over = (size % BLOCK as u64) as usize;
        if over == 0 { Ok(()) } else { self.put(&[0; BLOCK][over..]) }
    }
}

/// Puts the text into the field; what does not fit, or not everybody decodes alike, is for the PAX header.
fn put_text(field: &mut [u8; NAME_FIELD], text: &[u8]) -> Option<Vec<u8>> {
    let fits = text.len() < field.len();
    let shown = &text[..text.len().min(field.len() - 1)];
    field[..shown.len()].copy_from_slice(shown);
    (!fits || !text.is_ascii()).then(|| text.to_vec())
}

fn spill(value: u64, limit: u64) -> Option<u64> {
    (value > limit).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Change, LayerReader, Metadata, Timestamp};

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("images")).unwrap();
        (dir, store)
    }

    fn nodes() -> Vec<Node> {
        let path = |text: &[u8]| LayerPath::parse(text).unwrap();
        let metadata = Metadata {
            mode: 0o4755,
            uid: 3_000_000,
            gid: 5,
            mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 123_456_789 },
            xattrs: [(b"security.capability".to_vec(), vec![1, 0, b'\n'])].into(),
        };
        let node = |path: LayerPath, kind| Node { path, metadata: metadata.clone(), kind };
        let long = "deep/".repeat(40);
        let old = Metadata { mtime: Timestamp { seconds: -5, nanoseconds: 5 }, ..Metadata::default() };
        vec![
            node(LayerPath::default(), Kind::Directory),
            node(path(b"dir"), Kind::Directory),
            node(path(b"dir/caf\xc3\xa9"), Kind::File { size: 5, offset: 0 }),
            node(path(b"dir/\xff"), Kind::HardLink(path("dir/café".as_bytes()))),
            node(path(long.as_bytes()), Kind::Directory),
            node(path(b"link"), Kind::Symlink(long.into_bytes())),
            node(path(b"null"), Kind::CharDevice { major: 1, minor: 3 }),
            node(path(b"disk"), Kind::BlockDevice { major: 259, minor: 70_000 }),
            node(path(b"pipe"), Kind::Fifo),
            Node { path: path(b"old"), metadata: old, kind: Kind::File { size: 0, offset: 0 } },
        ]
    }

    /// Gives its bytes in pieces of that size.
    struct InPieces<'a>(&'a [u8], usize);

    impl Read for InPieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            let (now, later) = self.0.split_at(count);
            buffer[..count].copy_from_slice(now);
            self.0 = later;
            Ok(count)
        }
    }

    #[test]
    fn the_bytes_do_not_depend_on_how_a_file_is_read() {
        let (_dir, store) = store();
        // Neither random nor all the same.
        let text: Vec<u8> =
            (0..600_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8 & 0x1f | (n >> 13) as u8).collect();
        let path = LayerPath::parse(b"file").unwrap();
        let kind = Kind::File { size: text.len() as u64, offset: 0 };
        let node = Node { path, metadata: Metadata::default(), kind };
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let digest = |size: usize| {
                let mut writer = LayerWriter::new(&store, compression).unwrap();
                writer.append(&node, InPieces(&text, size)).unwrap();
                writer.finish().unwrap()
            };
            let whole = digest(usize::MAX);
            for size in [1000, 4096, 65_537] {
                assert_eq!(digest(size), whole, "{compression:?} in pieces of {size}");
            }
        }
    }

    fn write(store: &Store, compression: Compression) -> WrittenLayer {
        let mut writer = LayerWriter::new(store, compression).unwrap();
        for node in nodes() {
            writer.append(&node, &b"hello"[..]).unwrap();
        }
        writer.append_whiteout(&LayerPath::parse(b"dir/gone").unwrap()).unwrap();
        writer.append_opaque(&LayerPath::parse(b"dir").unwrap()).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (_dir, store) = store();
        let mut diff_ids = Vec::new();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let written = write(&store, compression);
            assert_eq!(written, write(&store, compression), "a layer is reproducible");
            diff_ids.push(written.diff_id.clone());
            let blob = store.open_blob(&written.descriptor).unwrap();
            let mut reader = LayerReader::new(compression.decoder(blob).unwrap());
            for expected in nodes() {
                let Some(Change::Node(mut node)) = reader.next_change().unwrap() else {
                    panic!("a node is missing")
                };
                if let Kind::File { size, offset } = &mut node.kind {
                    let mut data = vec![0; *size as usize];
                    reader.read_exact(&mut data).unwrap();
                    assert_eq!(data, b"hello"[..data.len()]);
                    *offset = 0;
                }
                assert_eq!(node, expected);
            }
            let gone = LayerPath::parse(b"dir/gone").unwrap();
            assert_eq!(reader.next_change().unwrap(), Some(Change::Whiteout(gone)));
            let opaque = LayerPath::parse(b"dir").unwrap();
            assert_eq!(reader.next_change().unwrap(), Some(Change::Opaque(opaque)));
            assert_eq!(reader.next_change().unwrap(), None);
        }
        assert!(
            diff_ids.iter().all(|id| *id == diff_ids[0]),
            "the diff_id does not depend on the compression"
        );
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let (_dir, store) = store();
        let mut writer = LayerWriter::new(&store, Compression::Zstd).unwrap();
        let node = &nodes()[2];
        let error = writer.append(node, &b"hell"[..]).unwrap_err().to_string();
        assert!(error.contains("has 4 bytes, 5 expected"), "{error}");
    }
}
