//! Directory blocks: one linear block, or a hash tree over as many as it takes.

use super::checksum::Identity;
use super::{BLOCK_SIZE, hash, put};

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirEntry<'a> {
    pub(super) name: &'a [u8],
    pub(super) inode: u32,
    pub(super) file_type: u8,
}

/// `file_type` of a directory.
pub(super) const TYPE_DIRECTORY: u8 = 2;

const ENTRY_HEADER: usize = 8;
/// The checksum at a leaf's end dresses up as an entry without an inode.
const TAIL_SIZE: usize = 12;
const TAIL_TYPE: u8 = 0xde;
const LEAF_ROOM: usize = BLOCK_SIZE - TAIL_SIZE;
/// `.` and `..`.
const DOTS_SIZE: usize = 24;
/// Bytes of the tree's root before its records: the dots and `struct dx_root_info`.
const ROOT_HEADER: usize = DOTS_SIZE + 8;
/// Bytes of an inner node before its records: an entry that spans the block.
const NODE_HEADER: usize = 8;
const INDEX_RECORD: usize = 8;
/// A reserved word and the checksum, behind the room for records.
const INDEX_TAIL: usize = 8;
const ROOT_RECORDS: usize = (BLOCK_SIZE - ROOT_HEADER - INDEX_TAIL) / INDEX_RECORD;
const NODE_RECORDS: usize = (BLOCK_SIZE - NODE_HEADER - INDEX_TAIL) / INDEX_RECORD;
const _: () = assert!(ROOT_RECORDS == 507 && NODE_RECORDS == 510);

/// Index records that are used of a block. The room for more (the limits on disk) stays what the block's size makes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FanOut {
    root: usize,
    node: usize,
}

impl FanOut {
    /// As many as there is room for: the fewest blocks and levels.
    pub(super) const FULL: Self = Self { root: ROOT_RECORDS, node: NODE_RECORDS };

    /// Only so many, so that a small directory has as many levels as a huge one.
    #[cfg(test)]
    pub(super) fn at_most(records: usize) -> Self {
        Self { root: records.min(ROOT_RECORDS), node: records.min(NODE_RECORDS) }
    }

    /// Leaves that two levels of index reach.
    fn two_levels(self) -> usize {
        self.root * self.node
    }

    /// Leaves that three levels of index reach, and there are no more.
    fn three_levels(self) -> usize {
        self.two_levels() * self.node
    }

    /// Blocks of index between the root and the leaves, on all levels.
    fn inner_nodes(self, leaves: usize) -> usize {
        let (mut total, mut records) = (0, leaves);
        while records > self.root {
            records = records.div_ceil(self.node);
            total += records;
        }
        total
    }
}

/// The two layouts of a directory.
pub(super) enum Packing {
    /// Everything in one block, in the order of the names.
    Linear,
    /// An index over leaves: indices of entries sorted by hash, cut into leaves.
    Indexed(Vec<Leaf>, FanOut),
}

/// One leaf of an indexed directory.
pub(super) struct Leaf {
    /// The first name's hash; bit 0 says that the leaf before ends with the same hash.
    hash: u32,
    /// Indices into the names.
    entries: Vec<u32>,
}

impl Packing {
    /// Chooses the layout for `names`. `None` when three levels of index are not enough, at some
    /// two thousand million long names.
    pub(super) fn new<'a>(
        names: impl Iterator<Item = &'a [u8]> + Clone,
        identity: &Identity,
        fan_out: FanOut,
    ) -> Option<Self> {
        if DOTS_SIZE + names.clone().map(entry_size).sum::<usize>() <= LEAF_ROOM {
            return Some(Self::Linear);
        }
        let mut hashed: Vec<_> = names
            .clone()
            .zip(0u32..)
            .map(|(name, index)| (hash::half_md4(name, identity.hash_seed), index, entry_size(name)))
            .collect();
        hashed.sort_unstable();
        let mut leaves: Vec<Leaf> = Vec::new();
        let mut room = 0;
        let mut previous = None;
        for ((hash, _), index, size) in hashed {
            if size > room || leaves.is_empty() {
                let continued = previous == Some(hash);
                leaves.push(Leaf { hash: hash | u32::from(continued), entries: Vec::new() });
                room = LEAF_ROOM;
            }
            room -= size;
            previous = Some(hash);
            if let Some(leaf) = leaves.last_mut() {
                leaf.entries.push(index);
            }
        }
        (leaves.len() <= fan_out.three_levels()).then_some(Self::Indexed(leaves, fan_out))
    }

    /// Blocks that the directory takes.
    pub(super) fn blocks(&self) -> u32 {
        match self {
            Self::Linear => 1,
            Self::Indexed(leaves, fan_out) => (1 + fan_out.inner_nodes(leaves.len()) + leaves.len()) as u32,
        }
    }

    /// Whether it has three levels of index, which only file systems with `large_dir` may have.
    pub(super) fn is_large(&self) -> bool {
        matches!(self, Self::Indexed(leaves, fan_out) if leaves.len() > fan_out.two_levels())
    }

    /// The directory's blocks.
    pub(super) fn encode(
        &self,
        inode: u32,
        parent: u32,
        entries: &[DirEntry<'_>],
        identity: &Identity,
    ) -> Vec<u8> {
        let dot = DirEntry { name: b".", inode, file_type: TYPE_DIRECTORY };
        let dots = DirEntry { name: b"..", inode: parent, file_type: TYPE_DIRECTORY };
        let seed = identity.inode_seed(inode);
        let seal_leaf = |block: &mut [u8]| {
            put(block, LEAF_ROOM + 4, (TAIL_SIZE as u16).to_le_bytes());
            block[LEAF_ROOM + 7] = TAIL_TYPE;
            let checksum = seed.update(&block[..LEAF_ROOM]).value();
            put(block, LEAF_ROOM + 8, checksum.to_le_bytes());
        };
        let mut out = vec![0; self.blocks() as usize * BLOCK_SIZE];
        let (leaves, fan_out) = match self {
            Self::Linear => {
                write_entries(&mut out, [dot, dots].into_iter().chain(entries.iter().copied()));
                seal_leaf(&mut out);
                return out;
            }
            Self::Indexed(leaves, fan_out) => (leaves, fan_out),
        };
        let inner = fan_out.inner_nodes(leaves.len());
        let (index, data) = out.split_at_mut((1 + inner) * BLOCK_SIZE);
        let (root, nodes) = index.split_at_mut(BLOCK_SIZE);
        for (block, leaf) in data.chunks_exact_mut(BLOCK_SIZE).zip(leaves) {
            write_entries(block, leaf.entries.iter().map(|&index| entries[index as usize]));
            seal_leaf(block);
        }
        let mut records: Vec<(u32, u32)> =
            leaves.iter().zip(1 + inner as u32..).map(|(leaf, block)| (leaf.hash, block)).collect();
        let seal_index = |block: &mut [u8], header: usize, limit: usize, records: &[(u32, u32)]| {
            put(block, header, (limit as u16).to_le_bytes());
            put(block, header + 2, (records.len() as u16).to_le_bytes());
            for (number, &(hash, child)) in records.iter().enumerate() {
                let at = header + number * INDEX_RECORD;
                // The first record has no hash: the two counts sit in its place.
                if number > 0 {
                    put(block, at, hash.to_le_bytes());
                }
                put(block, at + 4, child.to_le_bytes());
            }
            // fs/ext4/namei.c, ext4_dx_csum: the records in use, the reserved word, and a zero for the checksum.
            let used = header + records.len() * INDEX_RECORD;
            let checksum = seed.update(&block[..used]).update(&[0; INDEX_TAIL]).value();
            put(block, header + limit * INDEX_RECORD + 4, checksum.to_le_bytes());
        };
        let mut levels = 0;
        let mut unused = nodes;
        let mut number = 1;
        while records.len() > fan_out.root {
            let nodes = records.len().div_ceil(fan_out.node);
            let mut above = Vec::with_capacity(nodes);
            let (level, rest) = unused.split_at_mut(nodes * BLOCK_SIZE);
            for (block, chunk) in level.chunks_exact_mut(BLOCK_SIZE).zip(records.chunks(fan_out.node)) {
                put(block, 4, (BLOCK_SIZE as u16).to_le_bytes());
                seal_index(block, NODE_HEADER, NODE_RECORDS, chunk);
                above.push((chunk[0].0, number));
                number += 1;
            }
            (records, unused) = (above, rest);
            levels += 1;
        }
        // `..` spans the rest of the root, so that readers without the feature see an empty block.
        write_entries_within(root, BLOCK_SIZE, [dot, dots].into_iter());
        root[0x1c] = hash::HALF_MD4;
        root[0x1d] = 8;
        root[0x1e] = levels;
        seal_index(root, ROOT_HEADER, ROOT_RECORDS, &records);
        out
    }
}

fn entry_size(name: &[u8]) -> usize {
    (ENTRY_HEADER + name.len()).next_multiple_of(4)
}

fn write_entries<'a>(block: &mut [u8], entries: impl Iterator<Item = DirEntry<'a>>) {
    write_entries_within(block, LEAF_ROOM, entries);
}

/// Writes entries one behind the other; the last one's length reaches to `room`.
fn write_entries_within<'a>(block: &mut [u8], room: usize, entries: impl Iterator<Item = DirEntry<'a>>) {
    let mut at = 0;
    let mut last = 0;
    for entry in entries {
        let size = entry_size(entry.name);
        put(block, at, entry.inode.to_le_bytes());
        put(block, at + 4, (size as u16).to_le_bytes());
        block[at + 6] = entry.name.len() as u8;
        block[at + 7] = entry.file_type;
        block[at + ENTRY_HEADER..][..entry.name.len()].copy_from_slice(entry.name);
        last = at;
        at += size;
    }
    put(block, last + 4, ((room - last) as u16).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(count: usize, length: usize) -> Packing {
        let names: Vec<Vec<u8>> = (0..count).map(|n| format!("{n:0length$}").into_bytes()).collect();
        Packing::new(names.iter().map(Vec::as_slice), &Identity::derive(b"test"), FanOut::FULL).unwrap()
    }

    #[test]
    fn layouts_by_size() {
        assert_eq!(pack(0, 1).blocks(), 1);
        // 4096 - 12 - 24 leaves room for 203 entries of 20 bytes.
        assert_eq!(pack(203, 12).blocks(), 1);
        // Without the dots one more fits a leaf.
        assert_eq!(pack(204, 12).blocks(), 2, "a root and a leaf");
        assert_eq!(pack(205, 12).blocks(), 3, "a root and two leaves");
        let deep = pack(20_000, 255);
        let Packing::Indexed(leaves, _) = &deep else { panic!("not indexed") };
        assert_eq!(leaves.len(), 20_000usize.div_ceil(15));
        assert_eq!(deep.blocks() as usize, 1 + leaves.len().div_ceil(NODE_RECORDS) + leaves.len());
    }

    #[test]
    fn nodes_of_every_level_are_counted() {
        for (leaves, nodes) in [
            (1, 0),
            (507, 0),
            (508, 1),
            (511, 2),
            (507 * 510, 507),
            (507 * 510 + 1, 508 + 1),
            (507 * 510 * 510, 507 * 510 + 507),
        ] {
            assert_eq!(FanOut::FULL.inner_nodes(leaves), nodes, "{leaves} leaves");
        }
    }

    #[test]
    fn every_entry_is_in_one_leaf_in_hash_order() {
        let Packing::Indexed(leaves, _) = pack(5000, 20) else { panic!("not indexed") };
        let mut seen: Vec<u32> = leaves.iter().flat_map(|leaf| leaf.entries.iter().copied()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..5000).collect::<Vec<u32>>());
        assert!(leaves.windows(2).all(|pair| pair[0].hash < pair[1].hash));
    }
}
