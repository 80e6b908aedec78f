//! Group descriptors, of 32 or 64 bytes.

use super::bytes::{le16, le32, split, split32};
use super::fault::{Fault, Findings};
use super::superblock::{Checksums, Superblock};
use crate::ext4::group::{BLOCK_UNINIT, INODE_UNINIT};

/// `struct ext4_group_desc`, as far as it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_blocks: u32,
    pub(super) free_inodes: u32,
    pub(super) used_directories: u32,
    pub(super) unused_inodes: u32,
    pub(super) block_bitmap_checksum: u32,
    pub(super) inode_bitmap_checksum: u32,
    /// Nothing but the file system's own structures is in use.
    pub(super) blocks_untouched: bool,
    /// No inode is in use, and the table was never written.
    pub(super) inodes_untouched: bool,
}

/// Bits of a bitmap's checksum that a descriptor has room for.
pub(super) fn checksum_mask(superblock: &Superblock) -> u32 {
    if superblock.descriptor_size >= 64 { !0 } else { 0xffff }
}

impl Group {
    /// The descriptor of group `number`.
    pub(super) fn parse(
        raw: &[u8],
        number: u32,
        superblock: &Superblock,
        check: bool,
        findings: &mut Findings,
    ) -> Result<Self, Fault> {
        if check {
            let expected = match superblock.checksums {
                Checksums::None => le16(raw, 0x1e),
                Checksums::Metadata => {
                    let seed = superblock.raw.seed.update(&number.to_le_bytes());
                    (seed.update(&raw[..0x1e]).update(&[0; 2]).update(&raw[0x20..]).value() & 0xffff) as u16
                }
                Checksums::Descriptors => {
                    let crc = crc16(crc16(!0, &superblock.uuid), &number.to_le_bytes());
                    crc16(crc16(crc, &raw[..0x1e]), &raw[0x20..])
                }
            };
            let place = format!("descriptor of group {number}");
            findings.checksum(place, expected.into(), le16(raw, 0x1e).into())?;
        }
        // Reading past a short descriptor gives zeros, which is what its upper halves mean.
        let wide = superblock.is_wide() && superblock.descriptor_size >= 64;
        let raw = if wide { raw } else { &raw[..raw.len().min(32)] };
        let flags = if superblock.has_uninitialised_groups() { le16(raw, 0x12) } else { 0 };
        Ok(Self {
            block_bitmap: split(raw, 0x0, 0x20),
            inode_bitmap: split(raw, 0x4, 0x24),
            inode_table: split(raw, 0x8, 0x28),
            free_blocks: split32(raw, 0xc, 0x2c),
            free_inodes: split32(raw, 0xe, 0x2e),
            used_directories: split32(raw, 0x10, 0x30),
            unused_inodes: if superblock.has_uninitialised_groups() { split32(raw, 0x1c, 0x32) } else { 0 },
            block_bitmap_checksum: split32(raw, 0x18, 0x38),
            inode_bitmap_checksum: split32(raw, 0x1a, 0x3a),
            blocks_untouched: flags & BLOCK_UNINIT != 0,
            inodes_untouched: flags & INODE_UNINIT != 0,
        })
    }

    /// Whether two descriptors name the same places. Copies of the others' counts are not kept up to date.
    pub(super) fn same_places(raw: &[u8], copy: &[u8]) -> bool {
        [0x0, 0x4, 0x8, 0x20, 0x24, 0x28].into_iter().all(|at| le32(raw, at) == le32(copy, at))
    }
}

/// lib/crc16.c of Linux: the polynomial 0x8005, reflected.
fn crc16(start: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(start, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xa001 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::crc16;

    #[test]
    fn crc16_is_the_arc_variant() {
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }
}
