//! The superblock.

use super::checksum::{Crc, Identity};
use super::extent::ROOT_SIZE;
use super::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, EXTRA_ISIZE, FIRST_INODE, INODE_SIZE, LOG_GROUPS_PER_FLEX, group, hash,
    high32, journal, low32, put,
};

/// Bytes in a superblock.
pub(super) const SIZE: usize = 1024;

/// Where the first superblock sits in block 0. Copies sit at the start of their block.
pub(super) const PRIMARY_OFFSET: usize = 1024;

/// The longest volume label in bytes.
pub const MAX_LABEL: usize = 16;

const MAGIC: u16 = 0xef53;
const STATE_CLEAN: u16 = 1;
const ERRORS_CONTINUE: u16 = 1;
const DYNAMIC_REVISION: u32 = 1;
const CHECKSUM_CRC32C: u8 = 1;
const FLAG_SIGNED_HASH: u32 = 0x1;
/// `user_xattr` and `acl`, as mke2fs sets them.
const DEFAULT_MOUNT_OPTIONS: u32 = 0x4 | 0x8;
/// -1: no check after any number of mounts.
const NO_MOUNT_LIMIT: u16 = 0xffff;

/// ext_attr, resize_inode, dir_index.
const COMPATIBLE: u32 = 0x8 | 0x10 | 0x20;
/// has_journal.
const COMPATIBLE_JOURNAL: u32 = 0x4;
/// large_dir: a third level of index in directories.
const INCOMPATIBLE_LARGE_DIR: u32 = 0x4000;
/// `s_jnl_backup_type`: the blocks of the journal's inode are in the superblock, too.
const JOURNAL_BACKUP_BLOCKS: u8 = 1;
/// filetype, extent, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// What differs from one of our file systems to the next in `struct ext4_super_block`.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) blocks: u64,
    pub(super) free_blocks: u64,
    pub(super) inodes: u32,
    pub(super) free_inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) identity: Identity,
    pub(super) label: [u8; MAX_LABEL],
    pub(super) reserved_descriptor_blocks: u16,
    pub(super) large_directories: bool,
    /// `i_block` and the length of the journal's inode.
    pub(super) journal: Option<([u8; ROOT_SIZE], u64)>,
}

impl Superblock {
    /// The copy that belongs to group `number`. Its times stay zero: the same contents give the same bytes.
    pub(super) fn encode(&self, number: u32) -> [u8; SIZE] {
        let mut raw = [0; SIZE];
        put(&mut raw, 0x00, self.inodes.to_le_bytes());
        put(&mut raw, 0x04, low32(self.blocks).to_le_bytes());
        put(&mut raw, 0x0c, low32(self.free_blocks).to_le_bytes());
        put(&mut raw, 0x10, self.free_inodes.to_le_bytes());
        let log_block_size = (BLOCK_SIZE / 1024).trailing_zeros();
        put(&mut raw, 0x18, log_block_size.to_le_bytes());
        put(&mut raw, 0x1c, log_block_size.to_le_bytes());
        put(&mut raw, 0x20, (BLOCKS_PER_GROUP as u32).to_le_bytes());
        put(&mut raw, 0x24, (BLOCKS_PER_GROUP as u32).to_le_bytes());
        put(&mut raw, 0x28, self.inodes_per_group.to_le_bytes());
        put(&mut raw, 0x36, NO_MOUNT_LIMIT.to_le_bytes());
        put(&mut raw, 0x38, MAGIC.to_le_bytes());
        put(&mut raw, 0x3a, STATE_CLEAN.to_le_bytes());
        put(&mut raw, 0x3c, ERRORS_CONTINUE.to_le_bytes());
        put(&mut raw, 0x4c, DYNAMIC_REVISION.to_le_bytes());
        put(&mut raw, 0x54, FIRST_INODE.to_le_bytes());
        put(&mut raw, 0x58, (INODE_SIZE as u16).to_le_bytes());
        // Only the first copies' numbers fit; the kernel and e2fsck do not read the others'.
        put(&mut raw, 0x5a, super::low16(number).to_le_bytes());
        let compatible = COMPATIBLE | if self.journal.is_some() { COMPATIBLE_JOURNAL } else { 0 };
        let incompatible = INCOMPATIBLE | if self.large_directories { INCOMPATIBLE_LARGE_DIR } else { 0 };
        put(&mut raw, 0x5c, compatible.to_le_bytes());
        put(&mut raw, 0x60, incompatible.to_le_bytes());
        put(&mut raw, 0x64, READ_ONLY_COMPATIBLE.to_le_bytes());
        put(&mut raw, 0x68, self.identity.uuid);
        put(&mut raw, 0x78, self.label);
        put(&mut raw, 0xce, self.reserved_descriptor_blocks.to_le_bytes());
        if let Some((blocks, length)) = self.journal {
            put(&mut raw, 0xe0, journal::INODE.to_le_bytes());
            raw[0xfd] = JOURNAL_BACKUP_BLOCKS;
            put(&mut raw, 0x10c, blocks);
            put(&mut raw, 0x10c + ROOT_SIZE, high32(length).to_le_bytes());
            put(&mut raw, 0x10c + ROOT_SIZE + 4, low32(length).to_le_bytes());
        }
        for (index, word) in self.identity.hash_seed.into_iter().enumerate() {
            put(&mut raw, 0xec + 4 * index, word.to_le_bytes());
        }
        raw[0xfc] = hash::HALF_MD4;
        put(&mut raw, 0xfe, (group::DESCRIPTOR_SIZE as u16).to_le_bytes());
        put(&mut raw, 0x100, DEFAULT_MOUNT_OPTIONS.to_le_bytes());
        put(&mut raw, 0x150, high32(self.blocks).to_le_bytes());
        put(&mut raw, 0x158, high32(self.free_blocks).to_le_bytes());
        put(&mut raw, 0x15c, (EXTRA_ISIZE as u16).to_le_bytes());
        put(&mut raw, 0x15e, (EXTRA_ISIZE as u16).to_le_bytes());
        put(&mut raw, 0x160, FLAG_SIGNED_HASH.to_le_bytes());
        raw[0x174] = LOG_GROUPS_PER_FLEX;
        raw[0x175] = CHECKSUM_CRC32C;
        let checksum = Crc::START.update(&raw[..0x3fc]).value();
        put(&mut raw, 0x3fc, checksum.to_le_bytes());
        raw
    }
}
