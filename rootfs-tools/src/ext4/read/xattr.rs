//! Extended attributes: in the room behind an inode, and in a block that inodes may share.

use super::FileSystem;
use super::bytes::{le16, le32};
use super::fault::{Fault, Findings, damage};
use super::inode::Inode;
use super::superblock::Checksums;
use crate::tree::Xattr;

const MAGIC: u32 = 0xea02_0000;
const ENTRY: usize = 16;
const BLOCK_HEADER: usize = 32;
const INDEX_ACL_ACCESS: u8 = 2;
const INDEX_ACL_DEFAULT: u8 = 3;
const INDEX_SYSTEM: u8 = 7;

/// An attribute as it is stored.
struct Stored<'a> {
    index: u8,
    suffix: &'a [u8],
    value: &'a [u8],
    /// Where the value is in the area that was read.
    value_at: usize,
}

/// The attributes of an inode.
#[derive(Debug, Default)]
pub(super) struct Attributes {
    pub(super) xattrs: Vec<Xattr>,
    /// Where in the inode the part of inline data is that does not fit `i_block`, and how long it is.
    pub(super) inline_data: Option<(usize, usize)>,
}

impl FileSystem {
    /// The attributes in the inode itself.
    pub(super) fn inode_xattrs(&self, inode: &Inode, findings: &mut Findings) -> Result<Attributes, Fault> {
        let mut attributes = Attributes::default();
        let from = inode.fixed_size();
        let Some(area) = inode.raw.get(from + 4..).filter(|_| le32(&inode.raw, from) == MAGIC) else {
            return Ok(attributes);
        };
        let place = format!("attributes in inode {}", inode.number);
        for stored in entries(area, 0, &place, findings)? {
            if stored.index == INDEX_SYSTEM && stored.suffix == b"data" {
                attributes.inline_data = Some((from + 4 + stored.value_at, stored.value.len()));
            } else {
                attributes.xattrs.push(stored.decode(&place)?);
            }
        }
        Ok(attributes)
    }

    /// The attributes in block `number`, and how many inodes it says it belongs to.
    pub(super) fn block_xattrs(
        &self,
        number: u64,
        owner: &str,
        findings: &mut Findings,
    ) -> Result<(Vec<Xattr>, u32), Fault> {
        let block = self.block(owner, number)?;
        let place = format!("attribute block {number} of {owner}");
        let (magic, references, blocks) = (le32(&block, 0), le32(&block, 4), le32(&block, 8));
        if magic != MAGIC || blocks != 1 {
            let expected = format!("{MAGIC:#x} and 1 block");
            return Err(damage(place, "header", expected, format!("{magic:#x} and {blocks} blocks")));
        }
        if self.check && self.superblock.checksums == Checksums::Metadata {
            let seed = self.superblock.raw.seed.update(&number.to_le_bytes());
            let expected = seed.update(&block[..16]).update(&[0; 4]).update(&block[20..]).value();
            findings.checksum(&place, expected, le32(&block, 16))?;
        }
        let stored = entries(&block, BLOCK_HEADER, &place, findings)?;
        let xattrs = stored.iter().map(|stored| stored.decode(&place)).collect::<Result<_, _>>()?;
        Ok((xattrs, references))
    }
}

/// The entries of an area; offsets of values count from its start.
fn entries<'a>(
    area: &'a [u8],
    first: usize,
    place: &str,
    findings: &mut Findings,
) -> Result<Vec<Stored<'a>>, Fault> {
    let mut found: Vec<Stored<'a>> = Vec::new();
    let mut at = first;
    let outside =
        |what: &str, got: usize| Err(damage(place, what, format!("within its {} bytes", area.len()), got));
    while area.get(at..at + 4).is_some_and(|word| word != [0; 4]) {
        let length = usize::from(area[at]);
        let Some(entry) = area.get(at..at + ENTRY + length) else { return outside("entry", at) };
        let (value_at, size) = (usize::from(le16(entry, 2)), le32(entry, 8) as usize);
        if le32(entry, 4) != 0 {
            return Err(Fault::unsupported(place, "a value in an inode of its own (ea_inode)"));
        }
        let value =
            if size == 0 { Some(&[][..]) } else { area.get(value_at..).and_then(|rest| rest.get(..size)) };
        let Some(value) = value else { return outside("end of a value", value_at.saturating_add(size)) };
        let stored = Stored { index: entry[1], suffix: &entry[ENTRY..], value, value_at };
        let hash = le32(entry, 12);
        // Kernels differ in whether the bytes of a name have a sign, and some writers leave the hash out.
        if hash != 0 && hash != stored.hash(false) && hash != stored.hash(true) {
            findings.checksum(format!("{place}, hash of an entry"), stored.hash(false), hash)?;
        }
        found.push(stored);
        at += ENTRY + length.next_multiple_of(4);
    }
    if at + 4 > area.len() {
        return outside("end of the list", at + 4);
    }
    if let Some(early) = found.iter().find(|stored| !stored.value.is_empty() && stored.value_at < at + 4) {
        return Err(damage(place, "offset of a value", format!("at least {}", at + 4), early.value_at));
    }
    Ok(found)
}

impl Stored<'_> {
    fn decode(&self, place: &str) -> Result<Xattr, Fault> {
        let plain =
            |prefix: &[u8]| Xattr { name: [prefix, self.suffix].concat().into(), value: self.value.into() };
        let acl = |name: &[u8]| match acl(self.value) {
            Some(value) if self.suffix.is_empty() => Ok(Xattr { name: name.into(), value: value.into() }),
            _ => Err(damage(place, "POSIX ACL", "version 1 and entries of known tags", "another")),
        };
        match self.index {
            INDEX_ACL_ACCESS => acl(b"system.posix_acl_access"),
            INDEX_ACL_DEFAULT => acl(b"system.posix_acl_default"),
            1 => Ok(plain(b"user.")),
            4 => Ok(plain(b"trusted.")),
            6 => Ok(plain(b"security.")),
            INDEX_SYSTEM => Ok(plain(b"system.")),
            index => Err(Fault::unsupported(place, format!("attributes of namespace {index}"))),
        }
    }

    /// fs/ext4/xattr.c, ext4_xattr_hash_entry.
    fn hash(&self, signed: bool) -> u32 {
        let hash = self.suffix.iter().fold(0u32, |hash, &byte| {
            hash.rotate_left(5) ^ if signed { byte as i8 as u32 } else { byte.into() }
        });
        self.value.chunks(4).fold(hash, |hash, chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// An ACL from ext4's form (fs/ext4/acl.h) to that of the system call (include/uapi/linux/posix_acl_xattr.h).
fn acl(stored: &[u8]) -> Option<Vec<u8>> {
    let (version, mut rest) = stored.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != 1 {
        return None;
    }
    let mut value = 2u32.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let tag = rest.split_first_chunk::<4>()?;
        value.extend_from_slice(tag.0);
        rest = tag.1;
        match u16::from_le_bytes([tag.0[0], tag.0[1]]) {
            // A user or group of their own have an id; for the others the tag says it.
            0x02 | 0x08 => {
                let id = rest.split_first_chunk::<4>()?;
                value.extend_from_slice(id.0);
                rest = id.1;
            }
            0x01 | 0x04 | 0x10 | 0x20 => value.extend_from_slice(&[0xff; 4]),
            _ => return None,
        }
    }
    Some(value)
}
