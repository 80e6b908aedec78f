//! Inodes of 128 bytes and more.

use super::FileSystem;
use super::bytes::{array, le16, le32, split32};
use super::fault::{Fault, Findings, damage};
use super::superblock::Checksums;
use crate::ext4::checksum::Crc;
use crate::ext4::extent::ROOT_SIZE;
use crate::ext4::inode::{
    TYPE_BLOCK_DEVICE, TYPE_CHAR_DEVICE, TYPE_DIRECTORY, TYPE_FIFO, TYPE_FILE, TYPE_SYMLINK,
};
use crate::tree::Timestamp;

const TYPE_MASK: u16 = 0xf000;
const TYPE_SOCKET: u16 = 0xc000;
const CLASSIC_SIZE: usize = 128;
/// Where `i_block` is.
pub(super) const BLOCK_AT: usize = 0x28;

const FLAG_INDEX: u32 = 0x1000;
const FLAG_HUGE_FILE: u32 = 0x4_0000;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;
/// compressed, encrypted, verity, value of an attribute, casefold.
const FLAGS_NOT_READ: u32 = 0x4 | 0x800 | 0x10_0000 | 0x20_0000 | 0x4000_0000;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileType {
    File,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

impl FileType {
    fn of(mode: u16) -> Option<Self> {
        Some(match mode & TYPE_MASK {
            TYPE_FILE => Self::File,
            TYPE_DIRECTORY => Self::Directory,
            TYPE_SYMLINK => Self::Symlink,
            TYPE_CHAR_DEVICE => Self::CharDevice,
            TYPE_BLOCK_DEVICE => Self::BlockDevice,
            TYPE_FIFO => Self::Fifo,
            TYPE_SOCKET => Self::Socket,
            _ => return None,
        })
    }

    /// As a directory entry has it.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }
}

/// An inode and its bytes.
pub(super) struct Inode {
    pub(super) number: u32,
    /// Where it is in the image.
    pub(super) offset: u64,
    pub(super) raw: Vec<u8>,
    pub(super) file_type: FileType,
    pub(super) size: u64,
    pub(super) links: u16,
    /// The seed of the checksums of what belongs to it.
    pub(super) seed: Crc,
    flags: u32,
}

impl FileSystem {
    /// Where inode `number` is in the image.
    pub(super) fn inode_offset(&self, number: u32) -> Option<u64> {
        let index = number.checked_sub(1).filter(|_| number <= self.superblock.inodes)?;
        let group = self.groups.get((index / self.superblock.inodes_per_group) as usize)?;
        let within = u64::from(index % self.superblock.inodes_per_group);
        Some(group.inode_table * self.block_size() + within * u64::from(self.superblock.inode_size))
    }

    /// Inode `number`.
    pub(super) fn inode(&self, number: u32, findings: &mut Findings) -> Result<Inode, Fault> {
        let Some(offset) = self.inode_offset(number) else {
            let expected = format!("1 to {}", self.superblock.inodes);
            return Err(damage("directory entry", "inode number", expected, number));
        };
        let mut raw = vec![0; self.superblock.inode_size.into()];
        self.read("inode table", offset, &mut raw)?;
        self.parse_inode(number, offset, raw, findings)
    }

    /// The inode in `raw`, which is `inode_size` bytes.
    pub(super) fn parse_inode(
        &self,
        number: u32,
        offset: u64,
        raw: Vec<u8>,
        findings: &mut Findings,
    ) -> Result<Inode, Fault> {
        let place = format!("inode {number}");
        let extra = usize::from(if raw.len() > CLASSIC_SIZE { le16(&raw, 0x80) } else { 0 });
        if CLASSIC_SIZE + extra > raw.len() || !extra.is_multiple_of(4) {
            let expected = format!("a multiple of 4 up to {}", raw.len() - CLASSIC_SIZE);
            return Err(damage(place, "size of its extra fields", expected, extra));
        }
        let generation = le32(&raw, 0x64);
        let seed = self.superblock.raw.seed.update(&number.to_le_bytes()).update(&generation.to_le_bytes());
        if self.check && self.superblock.checksums == Checksums::Metadata {
            let mut plain = raw.clone();
            plain[0x7c..0x7e].fill(0);
            let wide = extra >= 4;
            if wide {
                plain[0x82..0x84].fill(0);
            }
            let expected = seed.update(&plain).value();
            match wide {
                true => findings.checksum(&place, expected, split32(&raw, 0x7c, 0x82))?,
                false => findings.checksum(&place, expected & 0xffff, le16(&raw, 0x7c).into())?,
            }
        }
        let mode = le16(&raw, 0x0);
        let Some(file_type) = FileType::of(mode) else {
            return Err(damage(place, "mode", "one with a file type", format!("{mode:#o}")));
        };
        let flags = le32(&raw, 0x20);
        if flags & FLAGS_NOT_READ != 0 {
            let reason = format!(
                "flags {:#x} (compressed, encrypted, verity, casefold or attribute inode)",
                flags & FLAGS_NOT_READ
            );
            return Err(Fault::unsupported(place, reason));
        }
        let size = u64::from(le32(&raw, 0x4)) | u64::from(le32(&raw, 0x6c)) << 32;
        let links = le16(&raw, 0x1a);
        Ok(Inode { number, offset, raw, file_type, size, links, seed, flags })
    }
}

impl Inode {
    /// What it is called in findings.
    pub(super) fn place(&self) -> String {
        format!("inode {}", self.number)
    }

    pub(super) fn permissions(&self) -> u16 {
        le16(&self.raw, 0x0) & !TYPE_MASK
    }

    pub(super) fn uid(&self) -> u32 {
        split32(&self.raw, 0x2, 0x78)
    }

    pub(super) fn gid(&self) -> u32 {
        split32(&self.raw, 0x18, 0x7a)
    }

    pub(super) fn mtime(&self) -> Timestamp {
        const EXTRA_MTIME_END: usize = 0x8c;
        // The low word is signed; two bits count how often 2^32 is added to it.
        let low = i64::from(le32(&self.raw, 0x10) as i32);
        let extra = if self.fixed_size() >= EXTRA_MTIME_END { le32(&self.raw, 0x88) } else { 0 };
        Timestamp { seconds: low + (i64::from(extra & 3) << 32), nanoseconds: (extra >> 2).min(999_999_999) }
    }

    /// Bytes before the room for attributes.
    pub(super) fn fixed_size(&self) -> usize {
        match self.raw.len() {
            ..=CLASSIC_SIZE => CLASSIC_SIZE,
            _ => CLASSIC_SIZE + usize::from(le16(&self.raw, 0x80)),
        }
    }

    /// The block of extended attributes, or 0.
    pub(super) fn xattr_block(&self) -> u64 {
        u64::from(le32(&self.raw, 0x68)) | u64::from(le16(&self.raw, 0x76)) << 32
    }

    pub(super) fn root(&self) -> [u8; ROOT_SIZE] {
        array(&self.raw, BLOCK_AT)
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & FLAG_EXTENTS != 0
    }

    pub(super) fn has_inline_data(&self) -> bool {
        self.flags & FLAG_INLINE_DATA != 0
    }

    pub(super) fn is_indexed(&self) -> bool {
        self.flags & FLAG_INDEX != 0
    }

    /// Bytes of the disk that it says belong to it.
    pub(super) fn allocated(&self, block_size: u64) -> u64 {
        let count = u64::from(le32(&self.raw, 0x1c)) | u64::from(le16(&self.raw, 0x74)) << 32;
        count * if self.flags & FLAG_HUGE_FILE != 0 { block_size } else { 512 }
    }

    /// Whether the link's target is in the inode itself.
    pub(super) fn is_fast_symlink(&self, block_size: u64) -> bool {
        let attributes = if self.xattr_block() != 0 { block_size } else { 0 };
        !self.has_extents() && self.size < ROOT_SIZE as u64 && self.allocated(block_size) <= attributes
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> (u32, u32) {
        // include/linux/kdev_t.h: small numbers in the first word, others in the second.
        match (le32(&self.raw, BLOCK_AT), le32(&self.raw, BLOCK_AT + 4)) {
            (0, new) => ((new >> 8) & 0xfff, new & 0xff | (new >> 12) & 0xf_ff00),
            (old, _) => ((old >> 8) & 0xff, old & 0xff),
        }
    }
}
