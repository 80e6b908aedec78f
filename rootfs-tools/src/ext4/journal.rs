//! The internal journal (Linux fs/jbd2, include/linux/jbd2.h): empty, as mke2fs 1.47 makes it. The kernel adds the
//! checksums of its records when it mounts it for the first time.

use super::{BLOCK_SIZE, put};

/// Whether a file system has a journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Journal {
    /// None: what is mounted read-only, or thrown away after a crash, needs none.
    #[default]
    None,
    /// One of the size that mke2fs chooses: 4 MiB to 1 GiB, as the file system is large.
    Auto,
    /// One of so many bytes: a multiple of 4096, 4 MiB to 40,000 MiB.
    Size(u64),
}

/// The journal's inode.
pub(super) const INODE: u32 = 8;

/// The kernel refuses smaller ones (`JBD2_MIN_JOURNAL_BLOCKS`).
pub(super) const MIN_BLOCKS: u32 = 1024;

/// mke2fs makes no larger ones.
pub(super) const MAX_BLOCKS: u32 = 10_240_000;

const MAGIC: u32 = 0xc03b_3998;
/// `JBD2_SUPERBLOCK_V2`.
const SUPERBLOCK_V2: u32 = 4;

/// The size that mke2fs chooses for a file system of `blocks` blocks (e2fsprogs, `ext2fs_default_journal_size`).
pub(super) fn default_blocks(blocks: u64) -> u32 {
    let steps = [
        (1 << 15, MIN_BLOCKS),
        (1 << 18, 4096),
        (1 << 19, 8192),
        (1 << 22, 16_384),
        (1 << 23, 32_768),
        (1 << 24, 65_536),
        (1 << 25, 131_072),
    ];
    steps.into_iter().find(|(below, _)| blocks < *below).map_or(262_144, |(_, size)| size)
}

/// The first block of an empty journal of `blocks` blocks; the others are zeros. All numbers are big-endian.
pub(super) fn superblock(blocks: u32, uuid: &[u8; 16]) -> Vec<u8> {
    let mut raw = vec![0; BLOCK_SIZE];
    put(&mut raw, 0x00, MAGIC.to_be_bytes());
    put(&mut raw, 0x04, SUPERBLOCK_V2.to_be_bytes());
    put(&mut raw, 0x0c, (BLOCK_SIZE as u32).to_be_bytes());
    put(&mut raw, 0x10, blocks.to_be_bytes());
    // The first block of the log, and the first transaction that will be in it.
    put(&mut raw, 0x14, 1u32.to_be_bytes());
    put(&mut raw, 0x18, 1u32.to_be_bytes());
    put(&mut raw, 0x30, *uuid);
    // One file system uses it.
    put(&mut raw, 0x40, 1u32.to_be_bytes());
    raw
}
