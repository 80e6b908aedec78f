//! A file system that becomes larger in its file, without a copy and without a mount.
//!
//! ```text
//! before   | group 0 | group 1 | part of 2 |
//! after    | group 0 | group 1 | group 2   | group 3 | .. | last group |
//!            descriptors: old, and behind them in the reserved blocks the new ones
//! ```
//!
//! Everything that could stand in the way is an error before the first write. What a crash costs depends on where it
//! happens, and is with the order of the writes ([`steps`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::Serialize;

use super::checksum::Crc;
use super::geometry::{MIN_LAST_GROUP, has_superblock};
use super::group::{BLOCK_UNINIT, INODE_UNINIT, INODE_ZEROED};
use super::steps::{self, Step, Writes};
use super::superblock::{PRIMARY_OFFSET, SIZE};
use super::{BLOCK_SIZE, BLOCKS_PER_GROUP, MAX_BYTES, high16, high32, low16, low32, put, resize};
use crate::Error;
use crate::error::at;

/// has_journal, ext_attr, resize_inode, dir_index, and what says nothing about places: dir_prealloc, imagic_inodes,
/// exclude_inode, fast_commit, stable_inodes, orphan_file.
const KNOWN_COMPATIBLE: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x80 | 0x400 | 0x800 | 0x1000;
const RESIZE_INODE: u32 = 0x10;
/// filetype, extent, 64bit, flex_bg, ea_inode, csum_seed, large_dir, inline_data, encrypt, casefold.
const KNOWN_INCOMPATIBLE: u32 =
    0x2 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000;
const NEEDS_RECOVERY: u32 = 0x4;
const WITH_64BIT: u32 = 0x80;
const CHECKSUM_SEED: u32 = 0x2000;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, quota, metadata_csum, project, verity.
const KNOWN_READ_ONLY: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x2000 | 0x8000;
const SPARSE_SUPER: u32 = 0x1;
const METADATA_CSUM: u32 = 0x400;
const STATE_CLEAN: u16 = 0x1;
const STATE_ERRORS: u16 = 0x2;

/// Bytes of a descriptor without the `64bit` feature.
const SMALL_DESCRIPTOR: usize = 32;

/// Bytes of an inode's checksum that are in its first 128.
const CLASSIC_INODE: usize = 128;

/// What [`grow()`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GrowReport {
    /// Bytes of the file system before.
    pub before: u64,
    /// Bytes of the file system now. A tail of the file too short for a group stays unused.
    pub after: u64,
    /// Block groups that were added.
    pub new_groups: u32,
}

/// Makes the ext4 in the file `path` larger: `bytes` (a multiple of 4096) in all.
///
/// It takes what this crate writes and what mke2fs makes with blocks of 4096 bytes and `metadata_csum`, clean and not
/// mounted. What it cannot grow it refuses, with the reason, before it has written anything. New groups have as many inodes
/// as the old ones: give an image that will grow a lot some room for files from the start.
pub fn grow(path: &Path, bytes: u64) -> Result<GrowReport, Error> {
    let refuse = |reason: String| Error::Invalid { what: path.display().to_string(), reason };
    let file = File::options().read(true).write(true).open(path).map_err(at(path))?;
    let metadata = file.metadata().map_err(at(path))?;
    if !metadata.is_file() {
        return Err(refuse("expected a file".to_owned()));
    }
    let old = Existing::read(&file, metadata.len()).map_err(|error| error.at(path))?;
    if bytes > MAX_BYTES || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
        return Err(refuse(format!(
            "the new size is {bytes} bytes, expected a multiple of {BLOCK_SIZE} of at most 16 TiB"
        )));
    }
    let before = old.blocks * BLOCK_SIZE as u64;
    if bytes < before {
        return Err(refuse(format!(
            "it has {before} bytes already, more than the {bytes} asked for: only growing is supported"
        )));
    }
    old.check_tail(&file, metadata.len()).map_err(|error| error.at(path))?;
    let change = old.plan(bytes / BLOCK_SIZE as u64).map_err(&refuse)?;
    let report = |blocks, new_groups| GrowReport { before, after: blocks * BLOCK_SIZE as u64, new_groups };
    let Some(change) = change else {
        if metadata.len() < bytes {
            file.set_len(bytes).map_err(at(path))?;
        }
        return Ok(report(old.blocks, 0));
    };
    let steps = change.steps(&file).map_err(|error| error.at(path))?;
    if metadata.len() < bytes {
        file.set_len(bytes).map_err(at(path))?;
    }
    steps::apply(&file, &steps).map_err(at(path))?;
    Ok(report(change.blocks, change.groups - old.groups()))
}

/// What growing the file to `bytes` would write.
#[cfg(test)]
pub(super) fn steps_to(path: &Path, bytes: u64) -> Result<Vec<Step>, Error> {
    let refuse = |reason: String| Error::Invalid { what: path.display().to_string(), reason };
    let file = File::open(path).map_err(at(path))?;
    let old =
        Existing::read(&file, file.metadata().map_err(at(path))?.len()).map_err(|error| error.at(path))?;
    let change = old.plan(bytes / BLOCK_SIZE as u64).map_err(&refuse)?;
    let change = change.ok_or_else(|| refuse("it is not larger".to_owned()))?;
    change.steps(&file).map_err(|error| error.at(path))
}

/// Why it cannot be grown.
enum Refused {
    Io(io::Error),
    Reason(String),
}

impl Refused {
    fn at(self, path: &Path) -> Error {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => Error::Invalid {
                what: path.display().to_string(),
                reason: "the file ends inside the file system".to_owned(),
            },
            Self::Io(error) => at(path)(error),
            Self::Reason(reason) => Error::Invalid { what: path.display().to_string(), reason },
        }
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn reason(text: impl Into<String>) -> Refused {
    Refused::Reason(text.into())
}

fn word(raw: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([raw[offset], raw[offset + 1], raw[offset + 2], raw[offset + 3]])
}

fn half(raw: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([raw[offset], raw[offset + 1]])
}

fn block_at(file: &File, number: u64) -> io::Result<Vec<u8>> {
    let mut block = vec![0; BLOCK_SIZE];
    file.read_exact_at(&mut block, number * BLOCK_SIZE as u64)?;
    Ok(block)
}

/// A file system as it is.
struct Existing {
    superblock: Vec<u8>,
    /// All group descriptors, one behind the other.
    descriptors: Vec<u8>,
    descriptor_size: usize,
    blocks: u64,
    inodes_per_group: u32,
    inode_table_blocks: u64,
    inode_size: usize,
    reserved_descriptor_blocks: u64,
    seed: Crc,
}

impl Existing {
    fn read(file: &File, length: u64) -> Result<Self, Refused> {
        let mut raw = vec![0; SIZE];
        file.read_exact_at(&mut raw, PRIMARY_OFFSET as u64)?;
        if half(&raw, 0x38) != 0xef53 {
            return Err(reason("there is no ext4 file system in it (its magic number is missing)"));
        }
        let (compatible, incompatible, read_only) = (word(&raw, 0x5c), word(&raw, 0x60), word(&raw, 0x64));
        if incompatible & NEEDS_RECOVERY != 0 {
            return Err(reason("its journal must be replayed first: mount it, or run e2fsck"));
        }
        for (kind, features, known) in [
            ("compatible", compatible, KNOWN_COMPATIBLE),
            ("incompatible", incompatible, KNOWN_INCOMPATIBLE),
            ("read-only", read_only, KNOWN_READ_ONLY),
        ] {
            if features & !known != 0 {
                return Err(reason(format!(
                    "it has {kind} features that are not supported (bits {:#x})",
                    features & !known
                )));
            }
        }
        if read_only & METADATA_CSUM == 0 || read_only & SPARSE_SUPER == 0 {
            return Err(reason(
                "it has no metadata_csum or no sparse_super, which are needed to grow it here",
            ));
        }
        if word(&raw, 0x3fc) != Crc::START.update(&raw[..0x3fc]).value() {
            return Err(reason("its superblock's checksum is wrong: run e2fsck"));
        }
        let state = half(&raw, 0x3a);
        if state & STATE_CLEAN == 0 || state & STATE_ERRORS != 0 {
            return Err(reason("it is mounted, or was not unmounted cleanly: run e2fsck"));
        }
        let wide = incompatible & WITH_64BIT != 0;
        let descriptor_size = if wide { half(&raw, 0xfe).into() } else { SMALL_DESCRIPTOR };
        let inode_size = usize::from(half(&raw, 0x58));
        let inodes_per_group = word(&raw, 0x28);
        if word(&raw, 0x18) != 2
            || word(&raw, 0x14) != 0
            || u64::from(word(&raw, 0x20)) != BLOCKS_PER_GROUP
            || !matches!((wide, descriptor_size), (true, 64) | (false, SMALL_DESCRIPTOR))
        {
            return Err(reason(
                "it has no blocks of 4096 bytes, or groups of another size than 32768 of them",
            ));
        }
        if !(CLASSIC_INODE..=BLOCK_SIZE).contains(&inode_size)
            || !inode_size.is_power_of_two()
            || inodes_per_group == 0
            || u64::from(inodes_per_group) > BLOCKS_PER_GROUP
            || !inodes_per_group.is_multiple_of(8)
        {
            return Err(reason("its superblock is damaged (inodes): run e2fsck"));
        }
        let blocks = u64::from(word(&raw, 0x04)) | if wide { u64::from(word(&raw, 0x150)) << 32 } else { 0 };
        if blocks == 0 || blocks > length / BLOCK_SIZE as u64 {
            return Err(reason(format!(
                "it has {blocks} blocks, the file has room for {}",
                length / BLOCK_SIZE as u64
            )));
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        if u64::from(word(&raw, 0x00)) != groups * u64::from(inodes_per_group) {
            return Err(reason("its superblock is damaged (inode count): run e2fsck"));
        }
        let seed = match incompatible & CHECKSUM_SEED != 0 {
            true => Crc::resume(word(&raw, 0x270)),
            false => Crc::START.update(&raw[0x68..0x78]),
        };
        // Bounded by the file's length: 64 bytes for each 128 MiB.
        let mut descriptors = vec![0; groups as usize * descriptor_size];
        file.read_exact_at(&mut descriptors, BLOCK_SIZE as u64)?;
        let reserved = if compatible & RESIZE_INODE != 0 { half(&raw, 0xce) } else { 0 };
        let existing = Self {
            inode_table_blocks: (u64::from(inodes_per_group) * inode_size as u64).div_ceil(BLOCK_SIZE as u64),
            superblock: raw,
            descriptors,
            descriptor_size,
            blocks,
            inodes_per_group,
            inode_size,
            reserved_descriptor_blocks: reserved.into(),
            seed,
        };
        for group in 0..existing.groups() {
            let mut copy = existing.descriptor(group).to_vec();
            put(&mut copy, 0x1e, [0; 2]);
            if half(existing.descriptor(group), 0x1e) != existing.descriptor_checksum(group, &copy) {
                return Err(reason(format!("the checksum of group descriptor {group} is wrong: run e2fsck")));
            }
        }
        Ok(existing)
    }

    fn groups(&self) -> u32 {
        (self.blocks.div_ceil(BLOCKS_PER_GROUP)) as u32
    }

    fn descriptor(&self, group: u32) -> &[u8] {
        &self.descriptors[group as usize * self.descriptor_size..][..self.descriptor_size]
    }

    fn descriptor_checksum(&self, group: u32, zeroed: &[u8]) -> u16 {
        low16(self.seed.update(&group.to_le_bytes()).update(zeroed).value())
    }

    fn descriptor_blocks(&self, groups: u32) -> u64 {
        (u64::from(groups) * self.descriptor_size as u64).div_ceil(BLOCK_SIZE as u64)
    }

    fn has_resize_inode(&self) -> bool {
        word(&self.superblock, 0x5c) & RESIZE_INODE != 0
    }

    /// Bytes behind the file system would become part of it.
    fn check_tail(&self, file: &File, length: u64) -> Result<(), Refused> {
        let mut at = self.blocks * BLOCK_SIZE as u64;
        let mut buffer = vec![0; 1 << 20];
        while at < length {
            at = match seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                Err(error) => return Err(io::Error::from(error).into()),
            };
            let count = usize::try_from(length - at).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..count], at)?;
            if buffer[..count].iter().any(|byte| *byte != 0) {
                let end = self.blocks * BLOCK_SIZE as u64;
                return Err(reason(format!(
                    "the file holds other data behind the file system, which growing would overwrite: if it is not \
                     needed (a growth that was cut off leaves some), cut the file to {end} bytes"
                )));
            }
            at += count as u64;
        }
        Ok(())
    }

    /// What becomes of it with `asked` blocks; `None` when they are not enough for anything new.
    fn plan(&self, asked: u64) -> Result<Option<Change<'_>>, String> {
        let mut blocks = asked;
        let reached = (self.descriptor_blocks(self.groups()) + self.reserved_descriptor_blocks)
            * (BLOCK_SIZE / self.descriptor_size) as u64
            * BLOCKS_PER_GROUP;
        if blocks > reached {
            return Err(format!(
                "it has room for the descriptors of {} MiB at the most, {} MiB were asked for",
                (reached * BLOCK_SIZE as u64) >> 20,
                (asked * BLOCK_SIZE as u64).div_ceil(1 << 20)
            ));
        }
        let copies = 1 + self.descriptor_blocks(self.groups()) + self.reserved_descriptor_blocks;
        let overhead =
            |group: u32| (if has_superblock(group) { copies } else { 0 }) + 2 + self.inode_table_blocks;
        // The most that any group needs, so that all of them have room for their own structures.
        let tail = blocks % BLOCKS_PER_GROUP;
        let last = blocks.div_ceil(BLOCKS_PER_GROUP) as u32 - 1;
        if tail != 0 && last >= self.groups() && tail < overhead(last) + MIN_LAST_GROUP {
            blocks -= tail;
        }
        if blocks <= self.blocks {
            return Ok(None);
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP) as u32;
        if groups > self.groups() && copies + 2 + self.inode_table_blocks > BLOCKS_PER_GROUP {
            return Err("its inode tables leave no room in a group of their own".to_owned());
        }
        if u64::from(groups) * u64::from(self.inodes_per_group) > u32::MAX.into() {
            return Err(format!("with {groups} groups it would have more than 2^32 inodes"));
        }
        let last = self.groups() - 1;
        if half(self.descriptor(last), 0x12) & BLOCK_UNINIT != 0
            && !self.blocks.is_multiple_of(BLOCKS_PER_GROUP)
        {
            return Err(
                "the block bitmap of its last group is not initialised: run e2fsck or resize2fs".to_owned()
            );
        }
        Ok(Some(Change { old: self, blocks, groups }))
    }
}

/// A larger size that fits.
struct Change<'a> {
    old: &'a Existing,
    blocks: u64,
    groups: u32,
}

impl Change<'_> {
    /// Everything that is to be written, in its order.
    fn steps(&self, file: &File) -> Result<Vec<Step>, Refused> {
        let old = self.old;
        let mut writes = Writes::default();
        let mut descriptors = old.descriptors.clone();
        let mut free = self.extend_last_group(file, &mut descriptors, &mut writes)?;
        for group in old.groups()..self.groups {
            let (descriptor, free_here) = self.new_group(group, &mut writes);
            descriptors.extend_from_slice(&descriptor);
            free += free_here;
        }
        let superblock = self.superblock(free)?;
        let mut table = descriptors;
        table.resize(table.len().next_multiple_of(BLOCK_SIZE), 0);
        for group in (0..self.groups).filter(|&group| has_superblock(group)) {
            let start = u64::from(group) * BLOCKS_PER_GROUP;
            if group == 0 {
                self.first_table(&table, &mut writes);
            } else {
                let list = if group < old.groups() { &mut writes.copies } else { &mut writes.new };
                list.push((start + 1, table.clone()));
                let mut copy = superblock.clone();
                put(&mut copy, 0x5a, low16(group).to_le_bytes());
                seal_superblock(&mut copy);
                let mut block = vec![0; BLOCK_SIZE];
                block[..SIZE].copy_from_slice(&copy);
                list.push((start, block));
            }
        }
        if old.has_resize_inode() {
            self.resize_inode(file, &mut writes)?;
        }
        writes.before = old.superblock.clone();
        writes.after = superblock;
        Ok(writes.steps(seal_superblock))
    }

    /// The descriptors that everybody reads. Behind those in use there is nothing until the superblock says so; a changed
    /// one, and a block that the resize inode owned, are another matter.
    fn first_table(&self, table: &[u8], writes: &mut Writes) {
        let same = table.starts_with(&self.old.descriptors);
        let in_use = self.old.descriptor_blocks(self.old.groups()) as usize;
        for (index, block) in table.chunks(BLOCK_SIZE).enumerate() {
            let list = if same && index < in_use { &mut writes.new } else { &mut writes.changed };
            list.push((1 + index as u64, block.to_vec()));
        }
    }

    /// The last group's bitmap says of the blocks behind the end that they are in use. Blocks that become free.
    fn extend_last_group(
        &self,
        file: &File,
        descriptors: &mut [u8],
        writes: &mut Writes,
    ) -> Result<u64, Refused> {
        let old = self.old;
        let group = old.groups() - 1;
        let start = u64::from(group) * BLOCKS_PER_GROUP;
        let (from, to) = (old.blocks - start, (self.blocks - start).min(BLOCKS_PER_GROUP));
        if from == to {
            return Ok(0);
        }
        let size = old.descriptor_size;
        let descriptor = &mut descriptors[group as usize * size..][..size];
        let place =
            u64::from(word(descriptor, 0x00)) | wide(descriptor, |raw| u64::from(word(raw, 0x20)) << 32);
        if place == 0 || place >= old.blocks {
            return Err(reason("the descriptor of its last group is damaged: run e2fsck"));
        }
        let mut bitmap = block_at(file, place)?;
        let checksum = |bitmap: &[u8]| old.seed.update(bitmap).value();
        let stored = u32::from(half(descriptor, 0x18))
            | wide(descriptor, |raw| u64::from(half(raw, 0x38)) << 16) as u32;
        let mask = if size > SMALL_DESCRIPTOR { u32::MAX } else { 0xffff };
        if checksum(&bitmap) & mask != stored {
            return Err(reason("the checksum of its last block bitmap is wrong: run e2fsck"));
        }
        for bit in from as usize..to as usize {
            bitmap[bit / 8] &= !(1 << (bit % 8));
        }
        let freed = to - from;
        let free = u32::from(half(descriptor, 0x0c))
            | wide(descriptor, |raw| u64::from(half(raw, 0x2c)) << 16) as u32;
        set_halves(descriptor, 0x0c, 0x2c, free.saturating_add(freed as u32));
        set_halves(descriptor, 0x18, 0x38, checksum(&bitmap));
        self.seal_descriptor(group, descriptor);
        writes.changed.push((place, bitmap));
        Ok(freed)
    }

    /// The descriptor of a group that is new, and how many blocks of it are free. Its structures are at its beginning;
    /// only the last group has a bitmap on disk, the others' follow from the descriptor.
    fn new_group(&self, group: u32, writes: &mut Writes) -> (Vec<u8>, u64) {
        let old = self.old;
        let start = u64::from(group) * BLOCKS_PER_GROUP;
        let length = (self.blocks - start).min(BLOCKS_PER_GROUP);
        let copies = if has_superblock(group) {
            1 + old.descriptor_blocks(old.groups()) + old.reserved_descriptor_blocks
        } else {
            0
        };
        let block_bitmap = start + copies;
        let used = copies + 2 + old.inode_table_blocks;
        let mut raw = vec![0; old.descriptor_size];
        set_words(&mut raw, 0x00, 0x20, block_bitmap);
        set_words(&mut raw, 0x04, 0x24, block_bitmap + 1);
        set_words(&mut raw, 0x08, 0x28, block_bitmap + 2);
        set_halves(&mut raw, 0x0c, 0x2c, (length - used) as u32);
        set_halves(&mut raw, 0x0e, 0x2e, old.inodes_per_group);
        set_halves(&mut raw, 0x1c, 0x32, old.inodes_per_group);
        let mut flags = INODE_UNINIT | INODE_ZEROED;
        if group + 1 < self.groups {
            flags |= BLOCK_UNINIT;
        } else {
            let mut bitmap = super::bitmap::Bitmap::new();
            bitmap.mark(0..used as usize);
            bitmap.mark(length as usize..BLOCKS_PER_GROUP as usize);
            set_halves(&mut raw, 0x18, 0x38, old.seed.update(bitmap.bytes()).value());
            writes.new.push((block_bitmap, bitmap.bytes().to_vec()));
        }
        put(&mut raw, 0x12, flags.to_le_bytes());
        self.seal_descriptor(group, &mut raw);
        (raw, length - used)
    }

    fn seal_descriptor(&self, group: u32, raw: &mut [u8]) {
        put(raw, 0x1e, [0; 2]);
        let checksum = self.old.descriptor_checksum(group, raw);
        put(raw, 0x1e, checksum.to_le_bytes());
    }

    /// Descriptor blocks that were reserved and now are in use.
    fn taken(&self) -> u64 {
        self.old.descriptor_blocks(self.groups) - self.old.descriptor_blocks(self.old.groups())
    }

    fn superblock(&self, freed: u64) -> Result<Vec<u8>, Refused> {
        let old = self.old;
        let mut raw = old.superblock.clone();
        let is_wide = old.descriptor_size > SMALL_DESCRIPTOR;
        let free = u64::from(word(&raw, 0x0c)) | if is_wide { u64::from(word(&raw, 0x158)) << 32 } else { 0 };
        let free = free.checked_add(freed).filter(|free| *free <= self.blocks);
        let inodes = old.inodes_per_group * self.groups;
        let free_inodes = word(&raw, 0x10).checked_add(inodes - word(&raw, 0x00));
        let (Some(free), Some(free_inodes)) = (free, free_inodes.filter(|free| *free <= inodes)) else {
            return Err(reason(
                "its superblock counts more free blocks or inodes than there are: run e2fsck",
            ));
        };
        put(&mut raw, 0x00, inodes.to_le_bytes());
        put(&mut raw, 0x04, low32(self.blocks).to_le_bytes());
        put(&mut raw, 0x0c, low32(free).to_le_bytes());
        put(&mut raw, 0x10, free_inodes.to_le_bytes());
        if is_wide {
            put(&mut raw, 0x150, high32(self.blocks).to_le_bytes());
            put(&mut raw, 0x158, high32(free).to_le_bytes());
        }
        if old.has_resize_inode() {
            let left = old.reserved_descriptor_blocks - self.taken();
            put(&mut raw, 0xce, (left as u16).to_le_bytes());
        }
        // `s_overhead_clusters`: 0 makes the kernel count again.
        put(&mut raw, 0x248, [0; 4]);
        seal_superblock(&mut raw);
        Ok(raw)
    }

    /// The resize inode loses the blocks that hold descriptors now, and its others get copies in the new groups.
    fn resize_inode(&self, file: &File, writes: &mut Writes) -> Result<(), Refused> {
        let old = self.old;
        let table = u64::from(word(old.descriptor(0), 0x08))
            | wide(old.descriptor(0), |raw| u64::from(word(raw, 0x28)) << 32);
        let at = u64::from(resize::INODE - 1) * old.inode_size as u64;
        let place = table + at / BLOCK_SIZE as u64;
        if table == 0 || place >= old.blocks {
            return Err(reason("its first group descriptor is damaged: run e2fsck"));
        }
        let mut block = block_at(file, place)?;
        let inode = &mut block[at as usize % BLOCK_SIZE..][..old.inode_size];
        let map = u64::from(word(inode, 0x28 + resize::DOUBLY_INDIRECT * 4));
        let first = old.descriptor_blocks(old.groups());
        let reserved = old.reserved_descriptor_blocks;
        if map == 0 || map >= old.blocks {
            return Err(reason("its resize inode is damaged: run e2fsck"));
        }
        if block_at(file, map)? != resize::doubly_indirect(first, reserved) {
            return Err(reason("its resize inode is not as mke2fs makes it: run e2fsck, or use resize2fs"));
        }
        let taken = self.taken();
        if taken == 0 && (old.groups()..self.groups).all(|group| !has_superblock(group)) {
            return Ok(());
        }
        for slot in first + taken..first + reserved {
            writes.changed.push((1 + slot, resize::indirect(slot, self.groups)));
        }
        if taken > 0 {
            writes.changed.push((map, resize::doubly_indirect(first + taken, reserved - taken)));
        }
        let sectors = resize::owned_blocks(reserved - taken, self.groups) * (BLOCK_SIZE as u64 / 512);
        put(inode, 0x1c, low32(sectors).to_le_bytes());
        put(inode, 0x74, low16(high32(sectors)).to_le_bytes());
        let generation = word(inode, 0x64);
        let extra = old.inode_size > CLASSIC_INODE && half(inode, 0x80) >= 4;
        put(inode, 0x7c, [0; 2]);
        if extra {
            put(inode, 0x82, [0; 2]);
        }
        let seed = old.seed.update(&resize::INODE.to_le_bytes()).update(&generation.to_le_bytes());
        let checksum = seed.update(inode).value();
        put(inode, 0x7c, low16(checksum).to_le_bytes());
        if extra {
            put(inode, 0x82, high16(checksum).to_le_bytes());
        }
        writes.changed.push((place, block));
        Ok(())
    }
}

fn seal_superblock(raw: &mut [u8]) {
    let checksum = Crc::START.update(&raw[..0x3fc]).value();
    put(raw, 0x3fc, checksum.to_le_bytes());
}

/// The part of a descriptor's field that only large descriptors have.
fn wide(raw: &[u8], part: impl Fn(&[u8]) -> u64) -> u64 {
    if raw.len() > SMALL_DESCRIPTOR { part(raw) } else { 0 }
}

fn set_words(raw: &mut [u8], low: usize, high: usize, value: u64) {
    put(raw, low, low32(value).to_le_bytes());
    if raw.len() > SMALL_DESCRIPTOR {
        put(raw, high, high32(value).to_le_bytes());
    }
}

fn set_halves(raw: &mut [u8], low: usize, high: usize, value: u32) {
    put(raw, low, low16(value).to_le_bytes());
    if raw.len() > SMALL_DESCRIPTOR {
        put(raw, high, high16(value).to_le_bytes());
    }
}
