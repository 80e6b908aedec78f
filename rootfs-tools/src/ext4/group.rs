//! Group descriptors.

use super::checksum::Identity;
use super::{high16, high32, low16, low32, put};

/// Bytes in a descriptor with the `64bit` feature.
pub(super) const DESCRIPTOR_SIZE: usize = 64;

/// The inode bitmap and table of the group were never written: nothing in it is in use.
pub(super) const INODE_UNINIT: u16 = 0x1;
/// The block bitmap was never written: only the group's own copies of the superblock and descriptors are in use.
pub(super) const BLOCK_UNINIT: u16 = 0x2;
/// The unused part of the inode table reads as zeros, so the kernel need not write it.
pub(super) const INODE_ZEROED: u16 = 0x4;

/// `struct ext4_group_desc`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupDescriptor {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) used_directories: u32,
    pub(super) flags: u16,
    pub(super) block_bitmap_checksum: u32,
    pub(super) inode_bitmap_checksum: u32,
    pub(super) unused_inodes: u32,
}

impl GroupDescriptor {
    /// The descriptor of group `number` as it is on disk.
    pub(super) fn encode(&self, number: u32, identity: &Identity) -> [u8; DESCRIPTOR_SIZE] {
        let mut raw = [0; DESCRIPTOR_SIZE];
        put(&mut raw, 0x00, low32(self.block_bitmap).to_le_bytes());
        put(&mut raw, 0x04, low32(self.inode_bitmap).to_le_bytes());
        put(&mut raw, 0x08, low32(self.inode_table).to_le_bytes());
        put(&mut raw, 0x0c, low16(self.free_blocks).to_le_bytes());
        put(&mut raw, 0x0e, low16(self.free_inodes).to_le_bytes());
        put(&mut raw, 0x10, low16(self.used_directories).to_le_bytes());
        put(&mut raw, 0x12, self.flags.to_le_bytes());
        put(&mut raw, 0x18, low16(self.block_bitmap_checksum).to_le_bytes());
        put(&mut raw, 0x1a, low16(self.inode_bitmap_checksum).to_le_bytes());
        put(&mut raw, 0x1c, low16(self.unused_inodes).to_le_bytes());
        put(&mut raw, 0x20, high32(self.block_bitmap).to_le_bytes());
        put(&mut raw, 0x24, high32(self.inode_bitmap).to_le_bytes());
        put(&mut raw, 0x28, high32(self.inode_table).to_le_bytes());
        put(&mut raw, 0x2c, high16(self.free_blocks).to_le_bytes());
        put(&mut raw, 0x2e, high16(self.free_inodes).to_le_bytes());
        put(&mut raw, 0x30, high16(self.used_directories).to_le_bytes());
        put(&mut raw, 0x32, high16(self.unused_inodes).to_le_bytes());
        put(&mut raw, 0x38, high16(self.block_bitmap_checksum).to_le_bytes());
        put(&mut raw, 0x3a, high16(self.inode_bitmap_checksum).to_le_bytes());
        let checksum = identity.seed().update(&number.to_le_bytes()).update(&raw).value();
        put(&mut raw, 0x1e, low16(checksum).to_le_bytes());
        raw
    }
}
