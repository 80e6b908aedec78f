//! The resize inode: it owns the blocks behind the group descriptors, so that there is room for more of them when the file
//! system grows (Linux fs/ext4/resize.c, e2fsprogs lib/ext2fs/res_gdt.c).
//!
//! ```text
//! inode 7 ──► one doubly indirect block ──► each reserved block of group 0 ──► the same block of every copy
//!             slot n: descriptor block n     (itself the indirect block)        in groups 1, 3, 5, 7, 9, ..
//! ```

use super::geometry::has_superblock;
use super::{BLOCK_SIZE, BLOCKS_PER_GROUP, put};

/// The resize inode's number.
pub(super) const INODE: u32 = 7;

/// Block numbers in an indirect block, and so the most descriptor blocks that the inode can have room for.
pub(super) const SLOTS: u64 = BLOCK_SIZE as u64 / 4;

/// Slot of the doubly indirect block in `i_block`.
pub(super) const DOUBLY_INDIRECT: usize = 13;

/// The inode's length: all that the three kinds of blocks before the triply indirect one could name.
pub(super) const LENGTH: u64 = (SLOTS * SLOTS + SLOTS + 12) * BLOCK_SIZE as u64;

/// The doubly indirect block, with `descriptors` blocks of descriptors in use and `reserved` behind them.
pub(super) fn doubly_indirect(descriptors: u64, reserved: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK_SIZE];
    for slot in descriptors..descriptors + reserved {
        // The superblock is in block 0, the descriptors begin in block 1.
        put(&mut block, (slot % SLOTS) as usize * 4, (1 + slot as u32).to_le_bytes());
    }
    block
}

/// The reserved block of group 0 for descriptor block `slot`: its copies in a file system of `groups` groups.
pub(super) fn indirect(slot: u64, groups: u32) -> Vec<u8> {
    let mut block = vec![0; BLOCK_SIZE];
    for (index, group) in copies(groups).enumerate() {
        let copy = u64::from(group) * BLOCKS_PER_GROUP + 1 + slot;
        // Block numbers of a file system with this inode have 32 bits.
        put(&mut block, index * 4, (copy as u32).to_le_bytes());
    }
    block
}

/// The blocks that the inode owns, with its doubly indirect one.
pub(super) fn owned_blocks(reserved: u64, groups: u32) -> u64 {
    1 + reserved * (1 + copies(groups).count() as u64)
}

/// The groups but the first that have a copy of the superblock.
fn copies(groups: u32) -> impl Iterator<Item = u32> {
    (1..groups).filter(|&group| has_superblock(group))
}
