//! Blocks of directories. The inner blocks of a hash tree dress up as blocks without entries, so that all blocks can be
//! read one behind the other.

use super::FileSystem;
use super::bytes::{le16, le32};
use super::fault::{Fault, Findings, damage};
use super::inode::Inode;
use super::superblock::{Checksums, FILETYPE};

const HEADER: usize = 8;
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xde;

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) inode: u32,
    /// 0 where the file system does not keep types in directories.
    pub(super) file_type: u8,
}

impl FileSystem {
    /// The entries in a part of a directory: a block, or a piece of inline data.
    pub(super) fn entries<'a>(&self, part: &'a [u8], place: &str) -> Result<Vec<Entry<'a>>, Fault> {
        let has_types = self.superblock.raw.incompatible & FILETYPE != 0;
        let mut entries = Vec::new();
        let mut at = 0;
        while at < part.len() {
            let rest = &part[at..];
            let length = record_length(rest);
            let (name_length, file_type) = match rest.get(6..8) {
                Some(&[length, file_type]) if has_types => (usize::from(length), file_type),
                _ => (usize::from(le16(rest, 6)), 0),
            };
            let inode = le32(rest, 0);
            let needed = if inode == 0 { HEADER } else { HEADER + name_length };
            if length < needed || !length.is_multiple_of(4) || length > rest.len() {
                let expected = format!("a multiple of 4 from {needed} to {}", rest.len());
                return Err(damage(place, format!("length of the entry at {at}"), expected, length));
            }
            if inode != 0 {
                let name = &rest[HEADER..HEADER + name_length];
                if name.is_empty() || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                    let got = format!("{:?}", String::from_utf8_lossy(name));
                    return Err(damage(place, format!("name of the entry at {at}"), "no NUL and no /", got));
                }
                entries.push(Entry { name, inode, file_type });
            }
            at += length;
        }
        Ok(entries)
    }

    /// Checks the checksum at the end of a leaf. `index_block` checks those of a hash tree's inner blocks.
    pub(super) fn check_leaf(
        &self,
        inode: &Inode,
        block: &[u8],
        place: &str,
        findings: &mut Findings,
    ) -> Result<(), Fault> {
        if !self.check || self.superblock.checksums != Checksums::Metadata {
            return Ok(());
        }
        let at = block.len() - TAIL;
        let tail = &block[at..];
        if le32(tail, 0) != 0 || le16(tail, 4) != TAIL as u16 || tail[6] != 0 || tail[7] != TAIL_TYPE {
            return findings.report(super::Finding::new(
                place,
                "end of the block",
                "a checksum",
                "something else",
            ));
        }
        findings.checksum(place, inode.seed.update(&block[..at]).value(), le32(tail, 8))
    }
}

/// The length of a record. In blocks of 64 KiB the longest ones do not fit 16 bits: there the two low bits, which are
/// free in a multiple of 4, count on.
fn record_length(record: &[u8]) -> usize {
    match le16(record, 4) {
        0xffff | 0 if record.len() == 1 << 16 => 1 << 16,
        length => usize::from(length & 0xfffc) | usize::from(length & 3) << 16,
    }
}
