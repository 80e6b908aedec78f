//! Which blocks hold a file: trees of extents, and the block lists of older file systems.

use super::FileSystem;
use super::bytes::{le16, le32};
use super::fault::{Fault, Findings, damage};
use super::inode::{BLOCK_AT, Inode};
use super::superblock::Checksums;

const MAGIC: u16 = 0xf30a;
const RECORD: usize = 12;
/// Linux never makes deeper trees: with five levels every 32-bit block number is reached.
const MAX_DEPTH: u16 = 5;
/// Longer lengths mark extents that were never written and read as zeros.
const MAX_LENGTH: u32 = 32768;
/// Direct blocks in `i_block`, before the single, double and triple indirect ones.
const DIRECT: usize = 12;

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    /// First block in the file.
    pub(super) logical: u64,
    /// First block on the disk.
    pub(super) start: u64,
    pub(super) length: u64,
    /// Whether it was written; if not, it reads as zeros.
    pub(super) written: bool,
}

/// The blocks of an inode.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// Ascending in the file, and disjoint there.
    pub(super) runs: Vec<Mapped>,
    /// Blocks of the tree or of the lists.
    pub(super) nodes: Vec<u64>,
}

impl Blocks {
    /// Blocks on the disk.
    pub(super) fn count(&self) -> u64 {
        self.nodes.len() as u64 + self.runs.iter().map(|run| run.length).sum::<u64>()
    }

    fn push(&mut self, run: Mapped, place: &str) -> Result<(), Fault> {
        let end = self.runs.last().map_or(0, |last| last.logical + last.length);
        if run.logical < end {
            return Err(damage(place, "first block of an extent", format!("at least {end}"), run.logical));
        }
        match self.runs.last_mut() {
            Some(last)
                if run.logical == end
                    && last.start + last.length == run.start
                    && last.written == run.written =>
            {
                last.length += run.length;
            }
            _ => self.runs.push(run),
        }
        Ok(())
    }
}

/// Takes the blocks that hold metadata, so that none is met twice: this is what ends every walk.
pub(super) type Claim<'a> = &'a mut dyn FnMut(u64) -> Result<(), Fault>;

impl FileSystem {
    /// The blocks of a file, directory or link. `claim` refuses a node that something else has already.
    pub(super) fn blocks_of(
        &self,
        inode: &Inode,
        claim: Claim<'_>,
        findings: &mut Findings,
    ) -> Result<Blocks, Fault> {
        let mut blocks = Blocks::default();
        let place = inode.place();
        if inode.has_extents() {
            let root = inode.root();
            let depth = le16(&root, 6);
            if depth > MAX_DEPTH {
                return Err(damage(place, "depth of the extent tree", format!("at most {MAX_DEPTH}"), depth));
            }
            let mut reading =
                Reading { fs: self, inode, place: &place, claim, findings, blocks: &mut blocks };
            reading.extent_node(&root, depth, 0, root.len())?;
        } else {
            let pointers = &inode.raw[BLOCK_AT..BLOCK_AT + 60];
            let mut reading =
                Reading { fs: self, inode, place: &place, claim, findings, blocks: &mut blocks };
            let mut logical = 0;
            for (index, pointer) in pointers.chunks_exact(4).enumerate() {
                let level = index.saturating_sub(DIRECT - 1) as u32;
                reading.indirect(le32(pointer, 0).into(), level, &mut logical)?;
            }
        }
        Ok(blocks)
    }
}

struct Reading<'a> {
    fs: &'a FileSystem,
    inode: &'a Inode,
    place: &'a str,
    claim: Claim<'a>,
    findings: &'a mut Findings,
    blocks: &'a mut Blocks,
}

impl Reading<'_> {
    /// A node of the tree of extents, in the inode or in a block of `room` bytes.
    fn extent_node(&mut self, node: &[u8], depth: u16, first: u64, room: usize) -> Result<(), Fault> {
        let place = self.place;
        let (magic, count, capacity) = (le16(node, 0), le16(node, 2), le16(node, 4));
        if magic != MAGIC {
            return Err(damage(
                place,
                "magic number of an extent node",
                format!("{MAGIC:#x}"),
                format!("{magic:#x}"),
            ));
        }
        let most = room / RECORD - 1;
        if usize::from(capacity) > most || count > capacity {
            let got = format!("{count} of {capacity}");
            return Err(damage(place, "records of an extent node", format!("at most {most}"), got));
        }
        if le16(node, 6) != depth {
            return Err(damage(place, "depth of an extent node", depth, le16(node, 6)));
        }
        if depth > 0 && count == 0 {
            return Err(damage(place, "records of an inner extent node", "at least 1", 0));
        }
        let mut previous = None;
        for record in node[RECORD..].chunks_exact(RECORD).take(count.into()) {
            let logical = u64::from(le32(record, 0));
            if logical < first || previous.is_some_and(|previous| logical <= previous) {
                let expected = format!("at least {}", previous.map_or(first, |previous| previous + 1));
                return Err(damage(place, "first block of an extent", expected, logical));
            }
            previous = Some(logical);
            if depth > 0 {
                let child = u64::from(le32(record, 4)) | u64::from(le16(record, 8)) << 32;
                (self.claim)(child)?;
                let block = self.fs.block(place, child)?;
                self.blocks.nodes.push(child);
                self.check(&block, child)?;
                self.extent_node(&block, depth - 1, logical, block.len())?;
            } else {
                let length = u32::from(le16(record, 4));
                let written = length <= MAX_LENGTH;
                let length = u64::from(if written { length } else { length - MAX_LENGTH });
                let start = u64::from(le32(record, 8)) | u64::from(le16(record, 6)) << 32;
                if length == 0 || logical + length > 1 << 32 || !self.fs.holds(start..start + length) {
                    let expected = format!("within the {} blocks that there are", self.fs.superblock.blocks);
                    return Err(damage(place, "extent", expected, format!("{length} blocks at {start}")));
                }
                self.blocks.push(Mapped { logical, start, length, written }, place)?;
            }
        }
        Ok(())
    }

    fn check(&mut self, block: &[u8], number: u64) -> Result<(), Fault> {
        if !self.fs.check || self.fs.superblock.checksums != Checksums::Metadata {
            return Ok(());
        }
        let tail = RECORD + usize::from(le16(block, 4)) * RECORD;
        // A capacity that leaves no room for it is reported where the node is read.
        let Some(covered) = block.get(..tail).filter(|_| tail + 4 <= block.len()) else { return Ok(()) };
        let expected = self.inode.seed.update(covered).value();
        self.findings.checksum(format!("{}, extent block {number}", self.place), expected, le32(block, tail))
    }

    /// A pointer of `level` steps of indirection; `logical` is the first block in the file behind it.
    fn indirect(&mut self, pointer: u64, level: u32, logical: &mut u64) -> Result<(), Fault> {
        let per_block = self.fs.block_size() / 4;
        if pointer == 0 {
            *logical += per_block.pow(level);
            return Ok(());
        }
        if level == 0 {
            if !self.fs.holds(pointer..pointer + 1) {
                let expected = format!("below {}", self.fs.superblock.blocks);
                return Err(damage(self.place, "block number", expected, pointer));
            }
            let run = Mapped { logical: *logical, start: pointer, length: 1, written: true };
            *logical += 1;
            return self.blocks.push(run, self.place);
        }
        (self.claim)(pointer)?;
        let block = self.fs.block(self.place, pointer)?;
        self.blocks.nodes.push(pointer);
        for pointer in block.chunks_exact(4) {
            self.indirect(le32(pointer, 0).into(), level - 1, logical)?;
        }
        Ok(())
    }
}
