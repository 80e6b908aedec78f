//! An ext4 file system written front to back, without a mount, a device or a second look at the data.
//!
//! ```text
//! Tree ── Plan ──────────────────────────────► Writer ──► one ascending stream of blocks
//!         inode numbers, directory sizes,       superblock, descriptors, bitmaps, inode tables,
//!         a place for every block               directories, then file data in the layers' own order
//! ```
//!
//! Everything that ext4 keeps in front of the data (free counts, bitmaps and their checksums, extents) is known before
//! the first byte is written, because the plan needs sizes only. So the writer never seeks back, and whoever consumes
//! the stream can hash it on the way.
//!
//! The format is that of the kernel's Documentation/filesystems/ext4, as Linux 6.1 and e2fsprogs 1.47 read it:
//! 4096-byte blocks, 256-byte inodes, 64-byte group descriptors, `metadata_csum` everywhere, and room for the descriptors
//! of a larger file system. A journal is there when it was asked for: a root file system is mounted read-only, and a
//! scratch disk is thrown away after a crash.

mod bitmap;
mod checksum;
#[cfg(test)]
mod deep_directory;
mod device;
mod directory;
mod extent;
mod format;
mod geometry;
mod group;
mod grow;
#[cfg(test)]
mod grow_cut;
mod hash;
mod inode;
mod journal;
mod plan;
mod read;
mod resize;
mod steps;
mod superblock;
mod writer;
mod xattr;

pub(crate) use checksum::Identity;
pub use format::{Ext4, Size};
pub use grow::{GrowReport, grow};
pub(crate) use inode::clamp_time;
pub use journal::Journal;
pub(crate) use read::Findings;
pub use read::{Checksums, Contents, FileSystem, Finding, ImageData, MAX_FINDINGS, Superblock};
pub use superblock::MAX_LABEL;
pub(crate) use writer::write;
pub(crate) use xattr::is_stored as is_stored_xattr;

/// Bytes in a block. The guest's page size; other sizes have no user here.
pub(crate) const BLOCK_SIZE: usize = 4096;

/// Bytes in an inode: the size that holds nanoseconds, the extra epoch bits and small extended attributes.
const INODE_SIZE: usize = 256;

/// Bytes of an inode past the classic 128 that have a meaning (`i_extra_isize`), up to and with `i_projid`.
const EXTRA_ISIZE: usize = 32;

/// Inodes in a block of an inode table.
const INODES_PER_BLOCK: u32 = (BLOCK_SIZE / INODE_SIZE) as u32;

/// Blocks in a group: one bit for each in a bitmap of one block.
const BLOCKS_PER_GROUP: u64 = BLOCK_SIZE as u64 * 8;

/// Inodes in a group at the most: one bit for each in a bitmap of one block.
const MAX_INODES_PER_GROUP: u32 = BLOCK_SIZE as u32 * 8;

/// Groups whose bitmaps and inode tables sit together (2 to this power), as mke2fs does it.
const LOG_GROUPS_PER_FLEX: u8 = 4;

/// The root directory's inode.
const ROOT_INODE: u32 = 2;

/// The first inode that is not reserved; the ones before it are always marked as used.
const FIRST_INODE: u32 = 11;

/// The largest file system that is written: 16 TiB is far beyond any sandbox and keeps every block number in 32 bits.
pub(crate) const MAX_BYTES: u64 = 16 << 40;

/// Name of the directory that e2fsck expects in the root.
pub(crate) const LOST_FOUND: &[u8] = b"lost+found";

const _: () = assert!(BLOCK_SIZE.is_multiple_of(INODE_SIZE));
const _: () = assert!(superblock::SIZE == 1024 && group::DESCRIPTOR_SIZE == 64);
const _: () = assert!(MAX_BYTES / BLOCK_SIZE as u64 <= 1 << 32);

/// Stores `bytes` at `offset` of an on-disk structure.
fn put<const N: usize>(target: &mut [u8], offset: usize, bytes: [u8; N]) {
    target[offset..offset + N].copy_from_slice(&bytes);
}

/// The low half of a value whose halves ext4 keeps apart.
fn low16(value: u32) -> u16 {
    (value & 0xffff) as u16
}

/// The high half of a value whose halves ext4 keeps apart.
fn high16(value: u32) -> u16 {
    (value >> 16) as u16
}

/// The low half of a 64-bit value.
fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The high half of a 64-bit value.
fn high32(value: u64) -> u32 {
    (value >> 32) as u32
}
