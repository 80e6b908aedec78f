//! The seams of the library: what a tree is written in, where its data comes from, and where the bytes go.
//!
//! ```text
//!   Tree ──► Format::prepare ──► Prepared ──write──► Sink
//!            ext4, cpio            ▲
//!                                  │ bytes of files, in ascending order of their places
//!                              DataSource
//! ```

use std::path::Path;

use oci::Digest;
use serde::Serialize;

use crate::Error;
use crate::output::Output;
use crate::tree::{Place, Tree};

/// Where file data comes from.
///
/// Files are asked for in ascending order of the place of their first byte, each of them from its first byte to its last,
/// and no byte is asked for twice. So a source may be a stream that cannot go back.
pub trait DataSource {
    /// Fills `buffer` with what begins at `place`.
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error>;
}

/// A source of trees whose files are all empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoData;

impl DataSource for NoData {
    fn read(&mut self, _: Place, buffer: &mut [u8]) -> Result<(), Error> {
        buffer.fill(0);
        Ok(())
    }
}

/// Data in memory: the place `{ source, offset }` is byte `offset` of element `source`.
impl DataSource for &[&[u8]] {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        let start = usize::try_from(place.offset).ok();
        let found = start
            .and_then(|start| self.get(place.source as usize)?.get(start..start.checked_add(buffer.len())?));
        match found {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(Error::Invalid {
                what: format!("{} bytes at byte {} of source {}", buffer.len(), place.offset, place.source),
                reason: "a file of the tree names data that the source does not have".to_owned(),
            }),
        }
    }
}

/// Takes a file front to back.
pub trait Sink {
    /// Bytes so far.
    fn position(&self) -> u64;

    /// Room for the next bytes: at least one and at most `wanted`, which is not 0.
    fn room(&mut self, wanted: u64) -> Result<&mut [u8], Error>;

    /// Takes the first `count` bytes of the last [`Sink::room`] as written.
    fn advance(&mut self, count: usize);

    /// Zeros up to `position`, which is not before the last byte. Long runs of them should cost nothing.
    fn zeros_to(&mut self, position: u64) -> Result<(), Error>;

    /// Writes bytes.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len() as u64)?;
            let (now, later) = bytes.split_at(room.len());
            room.copy_from_slice(now);
            self.advance(now.len());
            bytes = later;
        }
        Ok(())
    }
}

/// A format that a [`Tree`] can be written in.
pub trait Format {
    /// Finds a place for everything, or says what the format cannot hold. What no file system of the format may be without
    /// (ext4's `lost+found`) is added to the tree.
    fn prepare<'a>(&self, tree: &'a mut Tree) -> Result<Box<dyn Prepared + 'a>, Error>;
}

/// A tree with a place for everything: all sizes are known before the first byte is written.
pub trait Prepared {
    /// Bytes that will be written.
    fn length(&self) -> u64;

    /// Files, directories, links and devices; names of one inode count once.
    fn entries(&self) -> u64;

    /// Bytes of file data, holes left out.
    fn data(&self) -> u64;

    /// Writes all of it; `progress` is told the number of bytes behind it.
    fn write(
        &self,
        source: &mut dyn DataSource,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error>;
}

/// What [`write_tree()`] made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WriteReport {
    /// Digest of the file.
    pub digest: Digest,
    /// Length of the file in bytes.
    pub size: u64,
    /// Files, directories, links and devices.
    pub entries: u64,
    /// Bytes of file data.
    pub data: u64,
}

/// Writes a tree to the file `output`, which appears only when it is whole and on disk.
///
/// ```
/// use rootfs_tools::{Attributes, Content, Ext4, FileData, Node, NodeId, Place, Size, Tree, write_tree};
///
/// let mut tree = Tree::new();
/// let etc = tree.add(Node {
///     attributes: Attributes { mode: 0o755, ..Attributes::default() },
///     content: Content::Directory(Default::default()),
/// });
/// tree.link(NodeId::ROOT, b"etc", etc, 0);
/// let hostname = tree.add(Node {
///     attributes: Attributes { mode: 0o644, uid: 1000, ..Attributes::default() },
///     content: Content::File { size: 4, data: FileData::Whole(Place { source: 0, offset: 0 }) },
/// });
/// tree.link(etc, b"hostname", hostname, 0);
/// // A second name of the same inode.
/// tree.link(NodeId::ROOT, b"name", hostname, 0);
///
/// let folder = tempfile::tempdir()?;
/// let format = Ext4::new(b"the UUID follows from this").size(Size::Exact(16 << 20)).label("example")?;
/// let mut source: &[&[u8]] = &[b"box\n"];
/// let report = write_tree(&mut tree, &format, &mut source, &folder.path().join("disk.ext4"))?;
/// assert_eq!(report.size, 16 << 20);
/// assert_eq!(report.entries, 4, "the root, lost+found, etc, hostname");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_tree(
    tree: &mut Tree,
    format: &dyn Format,
    source: &mut dyn DataSource,
    output: &Path,
) -> Result<WriteReport, Error> {
    let mut file = Output::create_hashed(output)?;
    let prepared = format.prepare(tree)?;
    prepared.write(source, &mut file, &mut |_| {})?;
    Ok(WriteReport {
        digest: file.publish_hashed()?,
        size: prepared.length(),
        entries: prepared.entries(),
        data: prepared.data(),
    })
}
