//! The index over a large directory: blocks of hashes, each with the block that has the names from that hash on.
//!
//! ```text
//!   block 0: . .. ─ root: hash kind, levels, (hash, block)*
//!                          └─ inner blocks: (hash, block)*   up to two levels (three with large_dir)
//!                                └─ leaves: names, whose hashes lie between two records
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::FileSystem;
use super::bytes::{le16, le32};
use super::fault::{Fault, Findings, damage};
use super::inode::Inode;
use super::name_hash::NameHash;
use super::superblock::{Checksums, LARGE_DIR};

const ROOT_HEADER: usize = 0x20;
const NODE_HEADER: usize = 8;
const RECORD: usize = 8;
const TAIL: usize = 8;

/// The index of one directory.
pub(super) struct HashTree {
    hash: NameHash,
    /// The hashes that each leaf may have: from, to, both included.
    leaves: BTreeMap<u64, (u32, u32)>,
    /// Blocks that hold no names.
    inner: BTreeSet<u64>,
}

impl HashTree {
    /// Reads the index of a directory of `blocks` blocks.
    pub(super) fn read(
        fs: &FileSystem,
        inode: &Inode,
        blocks: u64,
        block: &mut dyn FnMut(u64) -> Result<Vec<u8>, Fault>,
        findings: &mut Findings,
    ) -> Result<Self, Fault> {
        let place = format!("hash tree of inode {}", inode.number);
        let root = block(0)?;
        let (version, info_length, levels) = (root[0x1c], root[0x1d], root[0x1e]);
        let raw = &fs.superblock.raw;
        let Some(hash) = NameHash::new(version, raw.unsigned_hash, raw.hash_seed) else {
            return Err(damage(place, "kind of hash", "0 to 5", version));
        };
        let most = if raw.incompatible & LARGE_DIR != 0 { 2 } else { 1 };
        if info_length != 8 || levels > most || le32(&root, 0x18) != 0 {
            let got = format!("a header of {info_length} bytes and {levels} levels");
            return Err(damage(place, "root", format!("a header of 8 bytes and at most {most} levels"), got));
        }
        let mut tree = Self { hash, leaves: BTreeMap::new(), inner: [0].into() };
        let mut level = vec![(root, ROOT_HEADER, 0, u32::MAX)];
        for depth in (0..=levels).rev() {
            let mut next = Vec::new();
            for (bytes, header, from, to) in level {
                for (child, from, to) in records(fs, inode, &bytes, header, (from, to), &place, findings)? {
                    if child == 0
                        || child >= blocks
                        || tree.leaves.contains_key(&child)
                        || tree.inner.contains(&child)
                    {
                        let expected = format!("1 to {} and no other record with it", blocks - 1);
                        return Err(damage(place, "block of a record", expected, child));
                    }
                    if depth == 0 {
                        tree.leaves.insert(child, (from, to));
                    } else {
                        tree.inner.insert(child);
                        let bytes = block(child)?;
                        if le32(&bytes, 0) != 0 || bytes[6] != 0 {
                            return Err(damage(place, format!("block {child}"), "an inner block", "names"));
                        }
                        next.push((bytes, NODE_HEADER, from, to));
                    }
                }
            }
            level = next;
        }
        let named = (tree.leaves.len() + tree.inner.len()) as u64;
        findings.expect(&place, "blocks in it", blocks, named)?;
        Ok(tree)
    }

    /// Whether block `number` has names.
    pub(super) fn is_leaf(&self, number: u64) -> bool {
        !self.inner.contains(&number)
    }

    /// What is wrong with `name` being in block `number`.
    pub(super) fn misplaced(&self, number: u64, name: &[u8]) -> Option<(String, String)> {
        let (from, to) = *self.leaves.get(&number)?;
        let hash = self.hash.of(name);
        (hash < from || hash > to).then(|| (format!("{from:#x} to {to:#x}"), format!("{hash:#x}")))
    }
}

/// The records of a block, each with the range of hashes below it.
fn records(
    fs: &FileSystem,
    inode: &Inode,
    block: &[u8],
    header: usize,
    (from, to): (u32, u32),
    place: &str,
    findings: &mut Findings,
) -> Result<Vec<(u64, u32, u32)>, Fault> {
    let is_checked = fs.superblock.checksums == Checksums::Metadata;
    let room = block.len() - header - if is_checked { TAIL } else { 0 };
    let (limit, count) = (usize::from(le16(block, header)), usize::from(le16(block, header + 2)));
    if limit != room / RECORD || count == 0 || count > limit {
        let expected = format!("1 to {0} of {0}", room / RECORD);
        return Err(damage(place, "records of a block", expected, format!("{count} of {limit}")));
    }
    if fs.check && is_checked {
        let tail = header + limit * RECORD;
        let seed = inode.seed.update(&block[..header + count * RECORD]);
        let expected = seed.update(&block[tail..tail + 4]).update(&[0; 4]).value();
        findings.checksum(format!("{place}, a block of records"), expected, le32(block, tail + 4))?;
    }
    // A record's first bit says that the block before ends with the same hash.
    let hash = |index: usize| if index == 0 { from } else { le32(block, header + index * RECORD) };
    let mut found = Vec::with_capacity(count);
    for index in 0..count {
        let low = hash(index) & !1;
        let high = match index + 1 < count {
            true if hash(index + 1) & 1 == 1 => hash(index + 1) & !1,
            true => hash(index + 1).saturating_sub(1),
            false => to,
        };
        if low > high && !(index == 0 && count == 1) {
            let expected = format!("ascending up to {to:#x}");
            return Err(damage(place, "hashes of a block of records", expected, format!("{low:#x}")));
        }
        // The upper bits are reserved (`dx_get_block`).
        let child = u64::from(le32(block, header + index * RECORD + 4) & 0x0fff_ffff);
        found.push((child, low, high));
    }
    Ok(found)
}
