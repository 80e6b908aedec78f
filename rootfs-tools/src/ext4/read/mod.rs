//! Reading an ext4 file system, made by whomever, without a mount and without trust.
//!
//! ```text
//! FileSystem::open ── superblock, group descriptors
//!    │
//!    ├─ tree ──► walk from the root: inodes, extents, directories, attributes ──► Tree + ImageData
//!    │             strict: the first damage is an error                           (what the writer takes)
//!    └─ verify ─► the same walk, where damage is a finding and the walk goes on,
//!                 then bitmaps, counts, hash trees and copies against what it met
//! ```
//!
//! Nothing here is believed: a number is held against the size of the file before it is used, every block has one owner,
//! and a directory one parent, so that what is kept in memory is bounded by what the file holds and every walk ends.
//! The format is that of the kernel's Documentation/filesystems/ext4, as Linux 6.1 and e2fsprogs 1.47 write it.

mod bytes;
mod directory;
mod extent;
mod fault;
mod group;
mod hash_tree;
mod inode;
mod intervals;
mod name_hash;
mod superblock;
mod verify;
mod walk;
mod xattr;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

pub(crate) use fault::{Fault, Findings};
pub use fault::{Finding, MAX_FINDINGS};
pub use superblock::{Checksums, Superblock};
pub use walk::Contents;

use crate::Error;
use crate::error::at;
use crate::format::DataSource;
use crate::tree::Place;
use group::Group;

/// Bytes that can be read in any order.
trait Storage: Send + Sync {
    fn length(&self) -> u64;
    /// Fills `buffer` with what begins at `offset`; both are within the length.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

struct OnDisk {
    file: File,
    length: u64,
}

impl Storage for OnDisk {
    fn length(&self) -> u64 {
        self.length
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

impl Storage for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.get(from..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// An ext4 file system that is read from a file.
pub struct FileSystem {
    path: PathBuf,
    storage: Box<dyn Storage>,
    superblock: Superblock,
    groups: Vec<Group>,
    check: bool,
}

impl FileSystem {
    /// Opens the file system in a file or on a block device. Damage to the superblock or to a group descriptor is an
    /// error.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_reporting(path, &mut Findings::strict())
    }

    /// As [`FileSystem::open`]; damage that can be gone past is only reported.
    pub(crate) fn open_reporting(path: &Path, findings: &mut Findings) -> Result<Self, Error> {
        let file = File::open(path).map_err(at(path))?;
        let metadata = file.metadata().map_err(at(path))?;
        let length = if metadata.file_type().is_block_device() {
            io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(at(path))?
        } else if metadata.is_file() {
            metadata.len()
        } else {
            let reason = "expected a file or a block device with an ext4 in it".to_owned();
            return Err(Error::Invalid { what: path.display().to_string(), reason });
        };
        Self::load(path, Box::new(OnDisk { file, length }), true, findings)
    }

    /// Opens the file system in `bytes`, with no checksum looked at: a fuzzer reaches what is behind them.
    #[doc(hidden)]
    pub fn open_unchecked(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::load(Path::new("memory"), Box::new(bytes), false, &mut Findings::strict())
    }

    /// Opens the file system in `bytes`.
    pub fn open_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::load(Path::new("memory"), Box::new(bytes), true, &mut Findings::strict())
    }

    fn load(
        path: &Path,
        storage: Box<dyn Storage>,
        check: bool,
        findings: &mut Findings,
    ) -> Result<Self, Error> {
        let (superblock, groups) =
            read_head(&*storage, check, findings).map_err(|fault| explain(path, fault))?;
        Ok(Self { path: path.to_owned(), storage, superblock, groups, check })
    }

    /// What the superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The file that it is read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every entry, with its attributes; the data stays where it is and is read through [`ImageData`]. The first damage
    /// is an error.
    pub fn tree(&self) -> Result<Contents, Error> {
        walk::tree(self).map_err(|fault| self.explain(fault))
    }

    /// Checks everything but the data of files: what is wrong is in `findings`.
    pub(crate) fn check(&self, findings: &mut Findings) -> Result<Contents, Error> {
        verify::check(self, findings).map_err(|fault| self.explain(fault))
    }

    /// The data of files, by the places in the tree.
    pub fn data(&self) -> ImageData<'_> {
        ImageData(self)
    }

    /// Checks everything but the data of files: what is wrong, bounded in number, and how much was wrong.
    #[doc(hidden)]
    pub fn check_all(&self) -> Result<(Vec<Finding>, u64), Error> {
        let mut findings = Findings::kept();
        self.check(&mut findings)?;
        Ok(findings.into_parts())
    }

    fn explain(&self, fault: Fault) -> Error {
        explain(&self.path, fault)
    }

    fn block_size(&self) -> u64 {
        self.superblock.block_size.into()
    }

    /// Reads bytes that may lie beyond the end only where the image is damaged.
    fn read(&self, place: &str, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.superblock.size() {
            let expected = format!("at most {}", self.superblock.size());
            return Err(fault::damage(place, "end of its bytes", expected, end));
        }
        self.storage.read(offset, buffer).map_err(Fault::Io)
    }

    /// Block `number`.
    fn block(&self, place: &str, number: u64) -> Result<Vec<u8>, Fault> {
        if !self.holds(number..number.saturating_add(1)) {
            let expected = format!("{} to {}", self.superblock.raw.first_block, self.superblock.blocks - 1);
            return Err(fault::damage(place, "block number", expected, number));
        }
        let mut block = vec![0; self.superblock.block_size as usize];
        self.read(place, number * self.block_size(), &mut block)?;
        Ok(block)
    }

    /// Whether the blocks are in the file system.
    fn holds(&self, blocks: std::ops::Range<u64>) -> bool {
        // Block 0 never belongs to a file, not even where groups begin with it.
        blocks.start >= self.superblock.raw.first_block.max(1)
            && blocks.start < blocks.end
            && blocks.end <= self.superblock.blocks
    }
}

/// The superblock and the descriptors.
fn read_head(
    storage: &dyn Storage,
    check: bool,
    findings: &mut Findings,
) -> Result<(Superblock, Vec<Group>), Fault> {
    let length = storage.length();
    let mut bytes = [0; superblock::SIZE];
    if length < 2 * superblock::SIZE as u64 {
        let reason = format!("it has {length} bytes, too few for a superblock: this is no ext4");
        return Err(Fault::unsupported("superblock", reason));
    }
    storage.read(superblock::SIZE as u64, &mut bytes).map_err(Fault::Io)?;
    let superblock = Superblock::parse(&bytes, length, check, findings)?;
    let size = usize::from(superblock.descriptor_size);
    let mut table = vec![0; superblock.groups() as usize * size];
    let offset = (superblock.raw.first_block + 1) * u64::from(superblock.block_size);
    if offset + table.len() as u64 > superblock.size() {
        let end = offset + table.len() as u64;
        let expected = format!("at most {}", superblock.size());
        return Err(fault::damage("group descriptors", "end of the table", expected, end));
    }
    storage.read(offset, &mut table).map_err(Fault::Io)?;
    let mut groups = Vec::with_capacity(superblock.groups() as usize);
    for (raw, number) in table.chunks_exact(size).zip(0..) {
        let group = Group::parse(raw, number, &superblock, check, findings)?;
        for (name, start, length) in [
            ("block bitmap", group.block_bitmap, 1),
            ("inode bitmap", group.inode_bitmap, 1),
            ("inode table", group.inode_table, superblock.inode_table_blocks()),
        ] {
            let end = start.saturating_add(length);
            if start <= superblock.raw.first_block || end > superblock.blocks {
                let place = format!("descriptor of group {number}");
                let expected = format!(
                    "after block 0 and at most {}",
                    superblock.blocks - length.min(superblock.blocks)
                );
                return Err(fault::damage(place, format!("block of the {name}"), expected, start));
            }
        }
        groups.push(group);
    }
    Ok((superblock, groups))
}

fn explain(path: &Path, fault: Fault) -> Error {
    match fault {
        Fault::Damage(finding) => Error::Damaged { path: path.to_owned(), finding },
        Fault::Unsupported { place, reason } => {
            Error::Unsupported { path: path.display().to_string(), reason: format!("{place}: {reason}") }
        }
        Fault::Io(error) => Error::Io { path: path.to_owned(), error },
    }
}

/// The data of the files of a file system.
#[derive(Clone, Copy)]
pub struct ImageData<'a>(&'a FileSystem);

impl ImageData<'_> {
    /// Fills `buffer` with what begins at `place`, in any order of places.
    pub fn read_at(&self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        self.0.read("data", place.offset, buffer).map_err(|fault| self.0.explain(fault))
    }
}

impl DataSource for ImageData<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        self.read_at(place, buffer)
    }
}
