//! The superblock: sizes, features and identity of a file system.

use serde::{Serialize, Serializer};

use super::bytes::{array, le16, le32, split};
use super::fault::{Fault, Finding, Findings, damage};
use crate::ext4::checksum::{Crc, Identity};
use crate::ext4::geometry::has_superblock;

/// Bytes in a superblock, and where the first one is.
pub(super) const SIZE: usize = 1024;

const MAGIC: u16 = 0xef53;
const CHECKSUM_AT: usize = 0x3fc;
const STATE_CLEAN: u16 = 1;
const STATE_ERRORS: u16 = 2;

/// More groups than 8 TiB of the smallest blocks have: what is kept for each of them stays below 100 MiB.
const MAX_GROUPS: u64 = 1 << 20;

pub(super) const HAS_JOURNAL: u32 = 0x4;
pub(super) const RESIZE_INODE: u32 = 0x10;
const SPARSE_SUPER2: u32 = 0x200;
pub(super) const ORPHAN_FILE: u32 = 0x1000;

pub(super) const FILETYPE: u32 = 0x2;
const RECOVER: u32 = 0x4;
const WIDE: u32 = 0x80;
const CSUM_SEED: u32 = 0x2000;
pub(super) const LARGE_DIR: u32 = 0x4000;

const SPARSE_SUPER: u32 = 0x1;
const GDT_CSUM: u32 = 0x10;
pub(super) const QUOTA: u32 = 0x100;
const METADATA_CSUM: u32 = 0x400;
pub(super) const PROJECT: u32 = 0x2000;
const ORPHAN_PRESENT: u32 = 0x1_0000;

/// A feature's bit, its name in e2fsprogs, and whether it is read.
type Features = &'static [(u32, &'static str, bool)];

const COMPATIBLE: Features = &[
    (0x1, "dir_prealloc", true),
    (0x2, "imagic_inodes", false),
    (HAS_JOURNAL, "has_journal", true),
    (0x8, "ext_attr", true),
    (RESIZE_INODE, "resize_inode", true),
    (0x20, "dir_index", true),
    (SPARSE_SUPER2, "sparse_super2", true),
    (0x400, "fast_commit", true),
    (0x800, "stable_inodes", true),
    (ORPHAN_FILE, "orphan_file", true),
];

const INCOMPATIBLE: Features = &[
    (0x1, "compression", false),
    (FILETYPE, "filetype", true),
    // Refused with a reason of its own.
    (RECOVER, "needs_recovery", true),
    (0x8, "journal_dev", false),
    (0x10, "meta_bg", false),
    (0x40, "extent", true),
    (WIDE, "64bit", true),
    (0x100, "mmp", false),
    (0x200, "flex_bg", true),
    (0x400, "ea_inode", false),
    (0x1000, "dirdata", false),
    (CSUM_SEED, "metadata_csum_seed", true),
    (LARGE_DIR, "large_dir", true),
    (0x8000, "inline_data", true),
    (0x1_0000, "encrypt", false),
    (0x2_0000, "casefold", false),
];

const READ_ONLY_COMPATIBLE: Features = &[
    (SPARSE_SUPER, "sparse_super", true),
    (0x2, "large_file", true),
    (0x4, "btree_dir", false),
    (0x8, "huge_file", true),
    (GDT_CSUM, "uninit_bg", true),
    (0x20, "dir_nlink", true),
    (0x40, "extra_isize", true),
    (0x80, "has_snapshot", false),
    (QUOTA, "quota", true),
    (0x200, "bigalloc", false),
    (METADATA_CSUM, "metadata_csum", true),
    (0x800, "replica", false),
    (0x1000, "read-only", true),
    (PROJECT, "project", true),
    (0x4000, "shared_blocks", false),
    (0x8000, "verity", false),
    (ORPHAN_PRESENT, "orphan_present", true),
];

/// Which checksums protect the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksums {
    /// None.
    None,
    /// CRC-16 of the group descriptors only (`uninit_bg`).
    Descriptors,
    /// CRC-32C of everything but file data (`metadata_csum`).
    Metadata,
}

/// What the superblock says of a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Superblock {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks in the file system.
    pub blocks: u64,
    /// Blocks that are not in use.
    pub free_blocks: u64,
    /// Inodes in the file system.
    pub inodes: u32,
    /// Inodes that are not in use.
    pub free_inodes: u32,
    /// Blocks in a group.
    pub blocks_per_group: u32,
    /// Inodes in a group.
    pub inodes_per_group: u32,
    /// Bytes in an inode.
    pub inode_size: u16,
    /// Bytes in a group descriptor.
    pub descriptor_size: u16,
    /// `s_uuid`.
    #[serde(serialize_with = "uuid")]
    pub uuid: [u8; 16],
    /// The volume's label.
    pub label: String,
    /// Features by their names in e2fsprogs.
    pub features: Vec<&'static str>,
    /// Which checksums there are.
    pub checksums: Checksums,
    /// Whether it was unmounted cleanly and no error was found since.
    pub clean: bool,
    /// How often it was mounted read-write since the last check.
    pub mounts: u16,
    #[serde(skip)]
    pub(super) raw: Raw,
}

/// What only the reader needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) compatible: u32,
    pub(super) incompatible: u32,
    pub(super) read_only_compatible: u32,
    pub(super) first_block: u64,
    pub(super) first_inode: u32,
    pub(super) hash_seed: [u32; 4],
    pub(super) unsigned_hash: bool,
    pub(super) seed: Crc,
    pub(super) reserved_descriptor_blocks: u16,
    pub(super) backup_groups: [u32; 2],
    pub(super) journal_inode: u32,
    pub(super) quota_inodes: [u32; 3],
    pub(super) orphan_file_inode: u32,
    pub(super) last_orphan: u32,
    pub(super) state: u16,
}

impl Superblock {
    /// Reads the superblock of a file system in `length` bytes.
    pub(super) fn parse(
        bytes: &[u8],
        length: u64,
        check: bool,
        findings: &mut Findings,
    ) -> Result<Self, Fault> {
        const PLACE: &str = "superblock";
        let magic = le16(bytes, 0x38);
        if magic != MAGIC {
            return Err(Fault::unsupported(
                PLACE,
                format!("expected ext4's magic number {MAGIC:#x}, got {magic:#x}: this is no ext4"),
            ));
        }
        let revision = le32(bytes, 0x4c);
        if revision > 1 {
            return Err(Fault::unsupported(PLACE, format!("its revision is {revision}, known are 0 and 1")));
        }
        let (compatible, incompatible, read_only_compatible) =
            (le32(bytes, 0x5c), le32(bytes, 0x60), le32(bytes, 0x64));
        let mut features = Vec::new();
        for (word, table, kind) in [
            (compatible, COMPATIBLE, "compatible"),
            (incompatible, INCOMPATIBLE, "incompatible"),
            (read_only_compatible, READ_ONLY_COMPATIBLE, "read-only compatible"),
        ] {
            features.extend(known(word, table, kind)?);
        }
        let checksums = match read_only_compatible {
            ro if ro & METADATA_CSUM != 0 => Checksums::Metadata,
            ro if ro & GDT_CSUM != 0 => Checksums::Descriptors,
            _ => Checksums::None,
        };
        if checksums == Checksums::Metadata {
            if bytes[0x175] != 1 {
                let kind = bytes[0x175];
                return Err(Fault::unsupported(PLACE, format!("checksum type {kind}, known is 1 (crc32c)")));
            }
            if check {
                let expected = Crc::START.update(&bytes[..CHECKSUM_AT]).value();
                findings.checksum(PLACE, expected, le32(bytes, CHECKSUM_AT))?;
            }
        }
        if incompatible & RECOVER != 0 {
            return Err(Fault::unsupported(
                PLACE,
                "its journal holds changes that are not in place yet (needs_recovery): mount and unmount it, or run e2fsck, first",
            ));
        }

        let log_block_size = le32(bytes, 0x18);
        if log_block_size > 6 {
            return Err(damage(PLACE, "logarithm of the block size", "0 to 6", log_block_size));
        }
        let block_size = 1024u32 << log_block_size;
        let wide = incompatible & WIDE != 0;
        let number = |low, high| if wide { split(bytes, low, high) } else { le32(bytes, low).into() };
        let descriptor_size = if wide { le16(bytes, 0xfe) } else { 32 };
        if !(descriptor_size.is_power_of_two() && (32..=1024).contains(&descriptor_size)) {
            return Err(damage(PLACE, "descriptor size", "a power of two from 32 to 1024", descriptor_size));
        }
        let (inode_size, first_inode) = match revision {
            0 => (128, 11),
            _ => (le16(bytes, 0x58), le32(bytes, 0x54)),
        };
        if !(inode_size.is_power_of_two() && inode_size >= 128 && u32::from(inode_size) <= block_size) {
            let expected = format!("a power of two from 128 to {block_size}");
            return Err(damage(PLACE, "inode size", expected, inode_size));
        }
        let mut quota_inodes = [le32(bytes, 0x240), le32(bytes, 0x244), le32(bytes, 0x26c)];
        if read_only_compatible & QUOTA == 0 {
            quota_inodes = [0; 3];
        } else if read_only_compatible & PROJECT == 0 {
            quota_inodes[2] = 0;
        }
        let uuid: [u8; 16] = array(bytes, 0x68);
        let state = le16(bytes, 0x3a);
        let label: [u8; 16] = array(bytes, 0x78);
        let label = label.split(|&byte| byte == 0).next().unwrap_or_default();
        let raw = Raw {
            compatible,
            incompatible,
            read_only_compatible,
            first_block: le32(bytes, 0x14).into(),
            first_inode,
            hash_seed: [0xec, 0xf0, 0xf4, 0xf8].map(|at| le32(bytes, at)),
            unsigned_hash: le32(bytes, 0x160) & 2 != 0,
            seed: match incompatible & CSUM_SEED {
                0 => Crc::START.update(&uuid),
                _ => Crc::resume(le32(bytes, 0x270)),
            },
            reserved_descriptor_blocks: le16(bytes, 0xce),
            backup_groups: [le32(bytes, 0x24c), le32(bytes, 0x250)],
            journal_inode: le32(bytes, 0xe0),
            quota_inodes,
            orphan_file_inode: le32(bytes, 0x280),
            last_orphan: le32(bytes, 0xe8),
            state,
        };
        let superblock = Self {
            block_size,
            blocks: number(0x4, 0x150),
            free_blocks: number(0xc, 0x158),
            inodes: le32(bytes, 0x0),
            free_inodes: le32(bytes, 0x10),
            blocks_per_group: le32(bytes, 0x20),
            inodes_per_group: le32(bytes, 0x28),
            inode_size,
            descriptor_size,
            uuid,
            label: String::from_utf8_lossy(label).into_owned(),
            features,
            checksums,
            clean: state & (STATE_CLEAN | STATE_ERRORS) == STATE_CLEAN && raw.last_orphan == 0,
            mounts: le16(bytes, 0x34),
            raw,
        };
        superblock.check_geometry(length)?;
        Ok(superblock)
    }

    /// That the numbers fit each other and the file; everything after this may compute with them.
    fn check_geometry(&self, length: u64) -> Result<(), Fault> {
        const PLACE: &str = "superblock";
        let most_bits = self.block_size * 8;
        let first_block = u64::from(self.block_size == 1024);
        if self.raw.first_block != first_block {
            return Err(damage(PLACE, "first data block", first_block, self.raw.first_block));
        }
        let room = length / u64::from(self.block_size);
        if self.blocks <= first_block || self.blocks > room {
            let expected = format!("at most {room}, which the file has");
            return Err(damage(PLACE, "number of blocks", expected, self.blocks));
        }
        let per_group = self.blocks_per_group;
        if per_group == 0 || per_group > most_bits || !per_group.is_multiple_of(8) {
            let expected = format!("a multiple of 8 up to {most_bits}");
            return Err(damage(PLACE, "blocks per group", expected, per_group));
        }
        let per_group = self.inodes_per_group;
        if per_group == 0 || per_group > most_bits || !per_group.is_multiple_of(8) {
            let expected = format!("a multiple of 8 up to {most_bits}");
            return Err(damage(PLACE, "inodes per group", expected, per_group));
        }
        let groups = (self.blocks - first_block).div_ceil(self.blocks_per_group.into());
        if groups > MAX_GROUPS {
            return Err(damage(PLACE, "number of groups", format!("at most {MAX_GROUPS}"), groups));
        }
        let inodes = groups * u64::from(self.inodes_per_group);
        if inodes != u64::from(self.inodes) {
            let expected = format!("{inodes} ({groups} groups of {})", self.inodes_per_group);
            return Err(damage(PLACE, "number of inodes", expected, self.inodes));
        }
        if self.raw.first_inode < 11 || self.raw.first_inode > self.inodes {
            return Err(damage(
                PLACE,
                "first inode",
                "11 or a later one that there is",
                self.raw.first_inode,
            ));
        }
        Ok(())
    }

    /// What a copy of the superblock must share with the first one. Counts and states are not kept up to date in copies.
    pub(super) fn check_copy(
        &self,
        bytes: &[u8],
        group: u32,
        check: bool,
        findings: &mut Findings,
    ) -> Result<(), Fault> {
        let place = format!("superblock copy in group {group}");
        findings.expect(&place, "magic number", MAGIC, le16(bytes, 0x38))?;
        if check && self.checksums == Checksums::Metadata {
            let expected = Crc::START.update(&bytes[..CHECKSUM_AT]).value();
            findings.checksum(&place, expected, le32(bytes, CHECKSUM_AT))?;
        }
        // The kernel and tune2fs set some features in the first superblock only.
        const SET_LATER: [u32; 3] = [0x8, RECOVER | 0x40 | LARGE_DIR, 0x2 | 0x20 | ORPHAN_PRESENT];
        let Raw { compatible, incompatible, read_only_compatible, .. } = self.raw;
        for ((at, word), later) in [(0x5c, compatible), (0x60, incompatible), (0x64, read_only_compatible)]
            .into_iter()
            .zip(SET_LATER)
        {
            let (expected, got) = (word & !later, le32(bytes, at) & !later);
            if expected != got {
                let what = format!("feature word at {at:#x}");
                findings.report(Finding::new(&place, what, format!("{expected:#x}"), format!("{got:#x}")))?;
            }
        }
        let blocks = if self.is_wide() { split(bytes, 0x4, 0x150) } else { le32(bytes, 0x4).into() };
        findings.expect(&place, "number of blocks", self.blocks, blocks)?;
        findings.expect(&place, "number of inodes", self.inodes, le32(bytes, 0))?;
        findings.expect(
            &place,
            "logarithm of the block size",
            self.block_size.trailing_zeros() - 10,
            le32(bytes, 0x18),
        )?;
        findings.expect(&place, "blocks per group", self.blocks_per_group, le32(bytes, 0x20))?;
        findings.expect(&place, "inodes per group", self.inodes_per_group, le32(bytes, 0x28))?;
        let uuid: [u8; 16] = array(bytes, 0x68);
        if uuid != self.uuid {
            findings.report(Finding::new(&place, "UUID", show_uuid(&self.uuid), show_uuid(&uuid)))?;
        }
        Ok(())
    }

    /// Number of groups.
    pub(super) fn groups(&self) -> u32 {
        // check_geometry bounds it far below 2^32.
        (self.blocks - self.raw.first_block).div_ceil(self.blocks_per_group.into()) as u32
    }

    /// The blocks of a group.
    pub(super) fn group_blocks(&self, group: u32) -> std::ops::Range<u64> {
        let start = self.raw.first_block + u64::from(group) * u64::from(self.blocks_per_group);
        start..(start + u64::from(self.blocks_per_group)).min(self.blocks)
    }

    /// Whether the group begins with a copy of the superblock and of the descriptors.
    pub(super) fn has_copies(&self, group: u32) -> bool {
        if self.raw.compatible & SPARSE_SUPER2 != 0 {
            group == 0 || self.raw.backup_groups.contains(&group)
        } else {
            self.raw.read_only_compatible & SPARSE_SUPER == 0 || has_superblock(group)
        }
    }

    /// Blocks that the group descriptors take.
    pub(super) fn descriptor_blocks(&self) -> u64 {
        (u64::from(self.groups()) * u64::from(self.descriptor_size)).div_ceil(self.block_size.into())
    }

    /// Blocks that a group's inode table takes.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_size)).div_ceil(self.block_size.into())
    }

    /// Whether block numbers have 64 bits.
    pub(super) fn is_wide(&self) -> bool {
        self.raw.incompatible & WIDE != 0
    }

    /// Whether group descriptors say which parts were never written.
    pub(super) fn has_uninitialised_groups(&self) -> bool {
        self.checksums != Checksums::None
    }

    /// UUID and hash seed.
    pub(crate) fn identity(&self) -> Identity {
        Identity { uuid: self.uuid, hash_seed: self.raw.hash_seed }
    }

    /// Bytes of the file system.
    pub fn size(&self) -> u64 {
        self.blocks * u64::from(self.block_size)
    }

    /// The UUID as it is written.
    pub fn uuid_text(&self) -> String {
        show_uuid(&self.uuid)
    }
}

/// The names of the features in `word`.
fn known(word: u32, table: Features, kind: &str) -> Result<Vec<&'static str>, Fault> {
    let mut names = Vec::new();
    for bit in (0..32).map(|shift| 1u32 << shift).filter(|bit| word & bit != 0) {
        match table.iter().find(|(known, ..)| *known == bit) {
            Some((_, name, true)) => names.push(*name),
            Some((_, name, false)) => {
                return Err(Fault::unsupported("superblock", format!("the feature {name} is not read here")));
            }
            None => {
                let reason = format!("the {kind} feature {bit:#x} is not known");
                return Err(Fault::unsupported("superblock", reason));
            }
        }
    }
    Ok(names)
}

fn show_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn uuid<S: Serializer>(uuid: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show_uuid(uuid))
}
