//! Inodes.

use oci::layer::Timestamp;

use super::checksum::Identity;
use super::extent::ROOT_SIZE;
use super::xattr::INLINE_SIZE;
use super::{BLOCK_SIZE, EXTRA_ISIZE, INODE_SIZE, high16, high32, low16, low32, put};

/// `i_mode`'s file types.
pub(super) const TYPE_FIFO: u16 = 0x1000;
pub(super) const TYPE_CHAR_DEVICE: u16 = 0x2000;
pub(super) const TYPE_DIRECTORY: u16 = 0x4000;
pub(super) const TYPE_BLOCK_DEVICE: u16 = 0x6000;
pub(super) const TYPE_FILE: u16 = 0x8000;
pub(super) const TYPE_SYMLINK: u16 = 0xa000;

/// The directory has a hash index.
pub(super) const FLAG_INDEX: u32 = 0x1000;
/// `i_block` is the root of an extent tree.
pub(super) const FLAG_EXTENTS: u32 = 0x8_0000;

/// The most names of a file. Directories with more subdirectories say 1, which means "not counted" (`dir_nlink`).
pub(super) const MAX_LINKS: u32 = 65_000;

/// `struct ext4_inode` as far as it is not constant.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    /// File type and permissions.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u16,
    /// Length in bytes.
    pub(super) size: u64,
    pub(super) mtime: Timestamp,
    /// Blocks of the disk that belong to it, with extent and attribute blocks.
    pub(super) blocks: u64,
    pub(super) flags: u32,
    pub(super) block: [u8; ROOT_SIZE],
    /// Block of extended attributes, or 0.
    pub(super) xattr_block: u64,
    pub(super) xattr_inline: [u8; INLINE_SIZE],
}

impl Inode {
    /// Inode `number` as it is on disk.
    pub(super) fn encode(&self, number: u32, identity: &Identity) -> [u8; INODE_SIZE] {
        let mut raw = [0; INODE_SIZE];
        // All four times are the one that a layer has; so the same image gives the same bytes.
        let (seconds, extra) = encode_time(self.mtime);
        put(&mut raw, 0x00, self.mode.to_le_bytes());
        put(&mut raw, 0x02, low16(self.uid).to_le_bytes());
        put(&mut raw, 0x04, low32(self.size).to_le_bytes());
        put(&mut raw, 0x08, seconds.to_le_bytes());
        put(&mut raw, 0x0c, seconds.to_le_bytes());
        put(&mut raw, 0x10, seconds.to_le_bytes());
        put(&mut raw, 0x18, low16(self.gid).to_le_bytes());
        put(&mut raw, 0x1a, self.links.to_le_bytes());
        // Counted in sectors of 512 bytes, in 48 bits (`huge_file`).
        let sectors = self.blocks * (BLOCK_SIZE as u64 / 512);
        put(&mut raw, 0x1c, low32(sectors).to_le_bytes());
        put(&mut raw, 0x20, self.flags.to_le_bytes());
        put(&mut raw, 0x28, self.block);
        put(&mut raw, 0x68, low32(self.xattr_block).to_le_bytes());
        put(&mut raw, 0x6c, high32(self.size).to_le_bytes());
        put(&mut raw, 0x74, low16(high32(sectors)).to_le_bytes());
        put(&mut raw, 0x76, low16(high32(self.xattr_block)).to_le_bytes());
        put(&mut raw, 0x78, high16(self.uid).to_le_bytes());
        put(&mut raw, 0x7a, high16(self.gid).to_le_bytes());
        put(&mut raw, 0x80, (EXTRA_ISIZE as u16).to_le_bytes());
        put(&mut raw, 0x84, extra.to_le_bytes());
        put(&mut raw, 0x88, extra.to_le_bytes());
        put(&mut raw, 0x8c, extra.to_le_bytes());
        put(&mut raw, 0x90, seconds.to_le_bytes());
        put(&mut raw, 0x94, extra.to_le_bytes());
        put(&mut raw, 128 + EXTRA_ISIZE, self.xattr_inline);
        let checksum = identity.inode_seed(number).update(&raw).value();
        put(&mut raw, 0x7c, low16(checksum).to_le_bytes());
        put(&mut raw, 0x82, high16(checksum).to_le_bytes());
        raw
    }
}

/// The time that ext4 stores for `time`.
pub(crate) fn clamp_time(time: Timestamp) -> Timestamp {
    let (low, extra) = encode_time(time);
    let seconds = i64::from(low as i32) + (i64::from(extra & 3) << 32);
    Timestamp { seconds, nanoseconds: extra >> 2 }
}

/// 34 bits of seconds from 1901 to 2446, as a signed word and two more bits, with the nanoseconds beside them. Times
/// outside become the nearest one that ext4 can hold, which is what the kernel does.
fn encode_time(time: Timestamp) -> (u32, u32) {
    const EARLIEST: i64 = -(1 << 31);
    const LATEST: i64 = (1 << 34) + EARLIEST - 1;
    let clamped = time.seconds.clamp(EARLIEST, LATEST);
    let nanoseconds = if clamped == time.seconds { time.nanoseconds } else { 0 };
    // The low word is read as signed; the epoch counts how often 2^32 must be added to it.
    let epoch = (clamped - EARLIEST) >> 32;
    ((clamped & 0xffff_ffff) as u32, nanoseconds << 2 | epoch as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_from_1901_to_2446() {
        let encode = |seconds, nanoseconds| encode_time(Timestamp { seconds, nanoseconds });
        assert_eq!(encode(0, 1), (0, 4));
        assert_eq!(encode(-1, 999_999_999), (0xffff_ffff, 999_999_999 << 2));
        assert_eq!(encode(0x7fff_ffff, 0), (0x7fff_ffff, 0));
        assert_eq!(encode(0x8000_0000, 0), (0x8000_0000, 1));
        assert_eq!(encode(0x1_0000_0000, 0), (0, 1));
        assert_eq!(encode(0x3_7fff_ffff, 0), (0x7fff_ffff, 3));
        assert_eq!(encode(i64::MAX, 5), (0x7fff_ffff, 3));
        assert_eq!(encode(i64::MIN, 5), (0x8000_0000, 0));
    }
}
