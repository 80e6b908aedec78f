//! Where a file system's own structures sit: superblock copies, descriptors, bitmaps and inode tables.

use std::ops::Range;

use super::extent::{Extent, MAX_LENGTH};
use super::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, INODES_PER_BLOCK, LOG_GROUPS_PER_FLEX, MAX_BYTES, MAX_INODES_PER_GROUP,
    group::DESCRIPTOR_SIZE, resize,
};

/// A last group shorter than its own overhead and this many blocks is not worth having (mke2fs's rule).
pub(super) const MIN_LAST_GROUP: u64 = 50;

/// The places of one group's structures.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupPlaces {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
}

/// Sizes and places that follow from the number of blocks and of inodes alone.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    /// Blocks in the file system.
    pub(super) blocks: u64,
    /// Inodes in each group, a multiple of what fits a block.
    pub(super) inodes_per_group: u32,
    /// Blocks that the group descriptors take.
    pub(super) descriptor_blocks: u64,
    /// Blocks behind them that are kept free for more.
    pub(super) reserved_descriptor_blocks: u64,
    /// One for each group.
    pub(super) groups: Vec<GroupPlaces>,
    /// Every block of the structures above, in ascending disjoint runs.
    pub(super) reserved: Vec<Range<u64>>,
}

impl Geometry {
    /// The geometry of at most `blocks` blocks with at least `inodes` inodes; a tail too short for a group of its own is
    /// left out. `None` when the structures do not fit.
    pub(super) fn fit(blocks: u64, inodes: u64) -> Option<Self> {
        let mut blocks = blocks;
        while blocks > 0 {
            if let Some(geometry) = Self::exact(blocks, inodes) {
                return Some(geometry);
            }
            let tail = blocks % BLOCKS_PER_GROUP;
            if tail == 0 || blocks == tail {
                return None;
            }
            blocks -= tail;
        }
        None
    }

    /// The geometry of exactly `blocks` blocks.
    fn exact(blocks: u64, inodes: u64) -> Option<Self> {
        let count = u32::try_from(blocks.div_ceil(BLOCKS_PER_GROUP)).ok()?;
        let descriptor_blocks = (u64::from(count) * DESCRIPTOR_SIZE as u64).div_ceil(BLOCK_SIZE as u64);
        let reserved_descriptor_blocks = room_to_grow(blocks, descriptor_blocks);
        let copy_blocks = 1 + descriptor_blocks + reserved_descriptor_blocks;
        let inodes_per_group = inodes.div_ceil(count.into()).next_multiple_of(INODES_PER_BLOCK.into());
        let inodes_per_group = u32::try_from(inodes_per_group).ok().filter(|&n| n <= MAX_INODES_PER_GROUP)?;
        inodes_per_group.checked_mul(count)?;

        let last = u64::from(count - 1) * BLOCKS_PER_GROUP;
        let last_overhead = if has_superblock(count - 1) { copy_blocks } else { 0 };
        if count > 1 && blocks - last < last_overhead + MIN_LAST_GROUP {
            return None;
        }

        let mut geometry = Self {
            blocks,
            inodes_per_group,
            descriptor_blocks,
            reserved_descriptor_blocks,
            groups: Vec::new(),
            reserved: Vec::new(),
        };
        let mut reserved: Vec<Range<u64>> = (0..count)
            .filter(|&number| has_superblock(number))
            .map(|number| u64::from(number) * BLOCKS_PER_GROUP)
            .map(|start| start..start + copy_blocks)
            .collect();
        let table_blocks = geometry.inode_table_blocks();
        let mut first = 0;
        while first < count {
            let members = (count - first).min(1 << LOG_GROUPS_PER_FLEX);
            let mut cursor = u64::from(first) * BLOCKS_PER_GROUP;
            let mut take = |length: u64| {
                cursor = geometry.skip_copies(cursor, length);
                reserved.push(cursor..cursor + length);
                cursor += length;
                cursor - length
            };
            let block_bitmaps: Vec<u64> = (0..members).map(|_| take(1)).collect();
            let inode_bitmaps: Vec<u64> = (0..members).map(|_| take(1)).collect();
            let inode_tables: Vec<u64> = (0..members).map(|_| take(table_blocks)).collect();
            if cursor > blocks {
                return None;
            }
            geometry.groups.extend(block_bitmaps.into_iter().zip(inode_bitmaps).zip(inode_tables).map(
                |((block_bitmap, inode_bitmap), inode_table)| GroupPlaces {
                    block_bitmap,
                    inode_bitmap,
                    inode_table,
                },
            ));
            first += members;
        }
        reserved.sort_unstable_by_key(|run| run.start);
        for run in reserved {
            match geometry.reserved.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => geometry.reserved.push(run),
            }
        }
        Some(geometry)
    }

    /// Number of groups.
    pub(super) fn group_count(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Number of inodes.
    pub(super) fn inodes(&self) -> u32 {
        self.group_count() * self.inodes_per_group
    }

    /// Blocks in each group's inode table.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        (self.inodes_per_group / INODES_PER_BLOCK).into()
    }

    /// The blocks of group `number`.
    pub(super) fn group_blocks(&self, number: u32) -> Range<u64> {
        let start = u64::from(number) * BLOCKS_PER_GROUP;
        start..(start + BLOCKS_PER_GROUP).min(self.blocks)
    }

    /// Blocks at the start of group `number` that hold copies of the superblock and the descriptors.
    pub(super) fn copies(&self, number: u32) -> u64 {
        if has_superblock(number) { self.copy_blocks() } else { 0 }
    }

    /// Blocks of one copy of the superblock with the descriptors and the room for more.
    fn copy_blocks(&self) -> u64 {
        1 + self.descriptor_blocks + self.reserved_descriptor_blocks
    }

    /// The first place at or after `cursor` where `length` blocks cross no copy of the superblock.
    fn skip_copies(&self, cursor: u64, length: u64) -> u64 {
        let mut start = cursor;
        loop {
            let first = (start / BLOCKS_PER_GROUP) as u32;
            let last = ((start + length - 1) / BLOCKS_PER_GROUP) as u32;
            let blocking = (first..=last)
                .filter(|&number| has_superblock(number))
                .map(|number| u64::from(number) * BLOCKS_PER_GROUP)
                .find(|&copy| start < copy + self.copy_blocks() && start + length > copy);
            match blocking {
                Some(copy) => start = copy + self.copy_blocks(),
                None => return start,
            }
        }
    }
}

/// Descriptor blocks to reserve for growing to 16 times the size, and to 64 GiB at least, without moving anything.
fn room_to_grow(blocks: u64, descriptor_blocks: u64) -> u64 {
    const TIMES: u64 = 16;
    const AT_LEAST: u64 = (64 << 30) / BLOCK_SIZE as u64;
    const GROUPS_PER_BLOCK: u64 = (BLOCK_SIZE / DESCRIPTOR_SIZE) as u64;
    let largest = (blocks * TIMES).max(AT_LEAST).min(MAX_BYTES / BLOCK_SIZE as u64);
    let wanted = largest.div_ceil(BLOCKS_PER_GROUP * GROUPS_PER_BLOCK);
    wanted.min(resize::SLOTS).saturating_sub(descriptor_blocks)
}

/// `sparse_super`: groups 0, 1 and the powers of 3, 5 and 7 hold a superblock.
pub(super) fn has_superblock(number: u32) -> bool {
    let is_power = |base: u32| {
        let mut power = base;
        while power < number {
            power = power.saturating_mul(base);
        }
        power == number
    };
    number <= 1 || is_power(3) || is_power(5) || is_power(7)
}

/// Hands out the blocks between the reserved runs in ascending order, and goes on counting past the end.
pub(super) struct Allocator<'a> {
    geometry: &'a Geometry,
    /// The reserved run that comes next.
    next: usize,
    /// The first block that was not looked at yet.
    cursor: u64,
}

impl<'a> Allocator<'a> {
    pub(super) fn new(geometry: &'a Geometry) -> Self {
        Self { geometry, next: 0, cursor: 0 }
    }

    /// Appends places for the blocks `logical` of a file to `extents`, as few runs as the reserved ones allow.
    pub(super) fn allocate(&mut self, logical: Range<u64>, extents: &mut Vec<Extent>) {
        let mut at = logical.start;
        while at < logical.end {
            let end = self.free_run_end();
            let length = (logical.end - at).min(end - self.cursor).min(MAX_LENGTH.into());
            // Files have at most 16 TiB, so that their blocks have numbers of 32 bits.
            extents.push(Extent { logical: at as u32, start: self.cursor, length: length as u32 });
            self.cursor += length;
            at += length;
        }
    }

    /// Goes on at a multiple of `blocks`, if there is a free one before the end; the blocks that are passed over.
    pub(super) fn align(&mut self, blocks: u64) -> Option<Range<u64>> {
        let end = self.free_run_end();
        let start = self.cursor;
        let aligned = start.checked_next_multiple_of(blocks)?;
        (aligned > start && aligned < end.min(self.geometry.blocks)).then(|| {
            self.cursor = aligned;
            start..aligned
        })
    }

    /// One block.
    pub(super) fn allocate_block(&mut self) -> u64 {
        self.free_run_end();
        self.cursor += 1;
        self.cursor - 1
    }

    /// The first block behind everything that was handed out; beyond the last block when it did not fit.
    pub(super) fn end(&self) -> u64 {
        self.cursor
    }

    /// Moves to a free block; the end of its run.
    fn free_run_end(&mut self) -> u64 {
        while let Some(run) = self.geometry.reserved.get(self.next) {
            if self.cursor < run.start {
                return run.start;
            }
            self.cursor = run.end;
            self.next += 1;
        }
        u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_groups() {
        let with: Vec<u32> = (0..130).filter(|&number| has_superblock(number)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn structures_never_overlap_and_stay_inside() {
        for (blocks, inodes) in [
            (64, 16),
            (32768, 100),
            (32768 + 60, 5000),
            (600_000, 600_000),
            (16 << 20, 1 << 22),
            (17 * 32768 + 51, 100_000),
        ] {
            let geometry = Geometry::fit(blocks, inodes).unwrap();
            assert!(u64::from(geometry.inodes()) >= inodes);
            assert!(geometry.blocks <= blocks);
            for pair in geometry.reserved.windows(2) {
                assert!(pair[0].end < pair[1].start, "{blocks} blocks: {pair:?}");
            }
            assert!(geometry.reserved.last().unwrap().end <= geometry.blocks);
            let copies: u64 = (0..geometry.group_count()).map(|number| geometry.copies(number)).sum();
            let total: u64 = geometry.reserved.iter().map(|run| run.end - run.start).sum();
            let own = u64::from(geometry.group_count()) * (2 + geometry.inode_table_blocks());
            assert_eq!(total, copies + own, "{blocks} blocks");
        }
    }

    #[test]
    fn a_short_tail_is_left_out() {
        assert_eq!(Geometry::fit(32768 + 10, 100).unwrap().blocks, 32768);
        assert!(Geometry::fit(3, 100).is_none());
        assert!(Geometry::fit(32768, 40_000).is_none(), "more inodes than a group can have");
    }

    #[test]
    fn extents_avoid_reserved_blocks() {
        let geometry = Geometry::fit(40 * 32768, 1000).unwrap();
        let mut allocator = Allocator::new(&geometry);
        let mut extents = Vec::new();
        allocator.allocate(0..39 * 32768, &mut extents);
        assert_eq!(extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>(), 39 * 32768);
        for extent in &extents {
            let range = extent.start..extent.start + u64::from(extent.length);
            assert!(geometry.reserved.iter().all(|run| run.end <= range.start || range.end <= run.start));
        }
    }
}
