//! Layers: tar streams of changes to a tree (OCI image-spec 1.1, `layer.md`).
//!
//! [`LayerReader`] turns a tar stream into [`Change`]s with checked paths; [`LayerWriter`] does the reverse, and
//! [`write_upper`] feeds it from an overlay's upper directory.

mod compression;
mod path;
mod pax;
mod read;
mod sparse;
mod upper;
mod write;

use std::collections::BTreeMap;

pub use compression::Compression;
pub use path::{LayerPath, MAX_COMPONENT, MAX_PATH};
pub use pax::{MAX_PAX_HEADER, MAX_XATTR_VALUE, MAX_XATTRS};
pub use read::{LayerReader, MAX_ENTRIES};
pub use upper::{OWNER_ATTRIBUTE, UpperAttributes, UpperRoot, parse_owner, write_upper};
pub use write::{LayerWriter, WrittenLayer};

/// The prefix of a name that says that the lower layers' entry of that name is gone. No layer can hold a file of such a name.
pub const WHITEOUT: &[u8] = b".wh.";
/// The name that hides everything that lower layers have in its directory.
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";

/// What one entry of a layer does to the tree below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The entry of the lower layers is gone, with everything under it.
    Whiteout(LayerPath),
    /// The directory shows nothing of the lower layers. It applies to them only, wherever in this layer it stands.
    Opaque(LayerPath),
    /// The entry is added, or replaces the one that was there. A directory over a directory keeps its children.
    Node(Node),
}

/// A file of any type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where it is. The empty path is the root directory itself.
    pub path: LayerPath,
    /// Owner, mode, time and extended attributes. For a hard link, those of the entry; its target has its own.
    pub metadata: Metadata,
    /// Its type, with what belongs to it.
    pub kind: Kind,
}

/// What every inode has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the contents.
    pub mtime: Timestamp,
    /// Extended attributes by full name, as `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A time, as seconds since 1970 and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// Bytes of a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRun {
    /// Where they begin in the file.
    pub start: u64,
    /// How many there are.
    pub length: u64,
    /// Where they begin in the uncompressed stream.
    pub offset: u64,
}

/// The type of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Where its data begins in the uncompressed stream.
        offset: u64,
    },
    /// A regular file with holes.
    Sparse {
        /// Its length in bytes.
        size: u64,
        /// The parts that are data, ascending, none empty, with holes between them. The rest is zeros.
        runs: Box<[DataRun]>,
    },
    /// A symbolic link; the target is any text without NUL and is never followed here.
    Symlink(Vec<u8>),
    /// Another name of the node at that path.
    HardLink(LayerPath),
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}
