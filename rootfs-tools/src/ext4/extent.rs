//! Extents: which blocks of the disk hold a file, as a tree of 12-byte records rooted in the inode.

use super::checksum::Crc;
use super::{BLOCK_SIZE, high32, low16, low32, put};

/// A run of blocks that is contiguous on disk and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// First block in the file.
    pub(super) logical: u32,
    /// First block on disk.
    pub(super) start: u64,
    /// Number of blocks, at most [`MAX_LENGTH`].
    pub(super) length: u32,
}

/// The longest run that one record can name; greater lengths mark unwritten extents.
pub(super) const MAX_LENGTH: u32 = 32768;

/// `i_block`, where the root of the tree lives.
pub(super) const ROOT_SIZE: usize = 60;

const MAGIC: u16 = 0xf30a;
const HEADER_SIZE: usize = 12;
const RECORD_SIZE: usize = 12;
const ROOT_RECORDS: usize = (ROOT_SIZE - HEADER_SIZE) / RECORD_SIZE;
// Four bytes behind the last record hold the checksum.
const BLOCK_RECORDS: usize = (BLOCK_SIZE - HEADER_SIZE - 4) / RECORD_SIZE;
const _: () = assert!(ROOT_RECORDS == 4 && BLOCK_RECORDS == 340);

/// How many blocks the tree of a file with `extents` runs needs beside the inode.
pub(super) fn tree_blocks(extents: usize) -> usize {
    let mut total = 0;
    let mut records = extents;
    while records > ROOT_RECORDS {
        records = records.div_ceil(BLOCK_RECORDS);
        total += records;
    }
    total
}

/// An encoded tree.
pub(super) struct ExtentTree {
    /// The contents of `i_block`.
    pub(super) root: [u8; ROOT_SIZE],
    /// The contents of the blocks that were given, in their order.
    pub(super) blocks: Vec<Vec<u8>>,
}

/// Encodes the tree of `extents`, whose lower levels go to `blocks` ([`tree_blocks`] of them).
pub(super) fn encode(extents: &[Extent], blocks: &[u64], seed: Crc) -> ExtentTree {
    debug_assert_eq!(blocks.len(), tree_blocks(extents.len()));
    // Each record with the first logical block below it, which is what the level above needs.
    let mut records: Vec<(u32, [u8; RECORD_SIZE])> =
        extents.iter().map(|extent| (extent.logical, leaf_record(extent))).collect();
    let mut encoded = Vec::with_capacity(blocks.len());
    let mut places = blocks.iter();
    let mut depth = 0;
    while records.len() > ROOT_RECORDS {
        let mut above = Vec::with_capacity(records.len().div_ceil(BLOCK_RECORDS));
        for (chunk, &place) in records.chunks(BLOCK_RECORDS).zip(&mut places) {
            let mut block = vec![0; BLOCK_SIZE];
            node(&mut block, chunk, BLOCK_RECORDS, depth);
            let tail = HEADER_SIZE + BLOCK_RECORDS * RECORD_SIZE;
            let checksum = seed.update(&block[..tail]).value();
            put(&mut block, tail, checksum.to_le_bytes());
            encoded.push(block);
            above.push((chunk[0].0, index_record(chunk[0].0, place)));
        }
        records = above;
        depth += 1;
    }
    let mut root = [0; ROOT_SIZE];
    node(&mut root, &records, ROOT_RECORDS, depth);
    ExtentTree { root, blocks: encoded }
}

fn node(target: &mut [u8], records: &[(u32, [u8; RECORD_SIZE])], capacity: usize, depth: u16) {
    put(target, 0, MAGIC.to_le_bytes());
    put(target, 2, (records.len() as u16).to_le_bytes());
    put(target, 4, (capacity as u16).to_le_bytes());
    put(target, 6, depth.to_le_bytes());
    for (slot, (_, record)) in target[HEADER_SIZE..].chunks_exact_mut(RECORD_SIZE).zip(records) {
        slot.copy_from_slice(record);
    }
}

fn leaf_record(extent: &Extent) -> [u8; RECORD_SIZE] {
    let mut record = [0; RECORD_SIZE];
    put(&mut record, 0, extent.logical.to_le_bytes());
    put(&mut record, 4, (extent.length as u16).to_le_bytes());
    put(&mut record, 6, low16(high32(extent.start)).to_le_bytes());
    put(&mut record, 8, low32(extent.start).to_le_bytes());
    record
}

fn index_record(logical: u32, block: u64) -> [u8; RECORD_SIZE] {
    let mut record = [0; RECORD_SIZE];
    put(&mut record, 0, logical.to_le_bytes());
    put(&mut record, 4, low32(block).to_le_bytes());
    put(&mut record, 8, low16(high32(block)).to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_grow_by_levels() {
        for (extents, blocks) in [(0, 0), (4, 0), (5, 1), (340, 1), (341, 2), (1360, 4), (1361, 6), (2000, 7)]
        {
            assert_eq!(tree_blocks(extents), blocks, "{extents} extents");
        }
    }

    #[test]
    fn a_two_level_tree_reads_back() {
        let extents: Vec<Extent> =
            (0..1361).map(|n| Extent { logical: n, start: 1000 + 2 * u64::from(n), length: 1 }).collect();
        let places: Vec<u64> = (50..56).collect();
        let tree = encode(&extents, &places, Crc::START);
        assert_eq!(tree.blocks.len(), 6);
        assert_eq!(u16::from_le_bytes([tree.root[6], tree.root[7]]), 2, "depth");
        assert_eq!(u16::from_le_bytes([tree.root[2], tree.root[3]]), 1, "records in the root");
        // The root names the topmost block, which is the last one.
        assert_eq!(tree.root[16], 55);
        let leaf = &tree.blocks[1];
        assert_eq!(
            u32::from_le_bytes(leaf[12..16].try_into().unwrap()),
            340,
            "logical block of the second leaf"
        );
    }
}
