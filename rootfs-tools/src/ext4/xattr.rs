//! Extended attributes: in the room behind the inode, and in one block more when that is too small.

use super::checksum::Identity;
use super::{BLOCK_SIZE, EXTRA_ISIZE, INODE_SIZE, put};
use crate::tree::Xattr;

const MAGIC: u32 = 0xea02_0000;
const ENTRY_SIZE: usize = 16;
const BLOCK_HEADER_SIZE: usize = 32;
const INLINE_HEADER_SIZE: usize = 4;
/// A zero word behind the last entry ends the list.
const END_SIZE: usize = 4;

/// Bytes behind the fixed part of an inode.
pub(super) const INLINE_SIZE: usize = INODE_SIZE - 128 - EXTRA_ISIZE;

const INLINE_ROOM: usize = INLINE_SIZE - INLINE_HEADER_SIZE - END_SIZE;

/// Bytes that the entries and values of one block may take.
const BLOCK_ROOM: usize = BLOCK_SIZE - BLOCK_HEADER_SIZE - END_SIZE;

const INDEX_ACL_ACCESS: u8 = 2;
const INDEX_ACL_DEFAULT: u8 = 3;

/// Whether an attribute of this name is stored. It must be of a namespace that ext4 has, and no message to overlayfs: the
/// guest stacks an overlay on this file system, and an image must not steer it.
pub(crate) fn is_stored(name: &[u8]) -> bool {
    split_name(name).is_some() && !name.starts_with(b"trusted.overlay.")
}

/// Why a set of attributes cannot be stored.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum XattrError {
    /// They need more than the inode and one block.
    TooLarge { needed: usize, room: usize },
    /// A POSIX ACL that is not one.
    MalformedAcl,
}

/// A node's attributes in their on-disk parts.
pub(super) struct Encoded {
    /// What follows the fixed part of the inode; all zeros when nothing is stored there.
    pub(super) inline: [u8; INLINE_SIZE],
    /// The block, but for its checksum, which depends on where the block is.
    pub(super) block: Option<Vec<u8>>,
}

/// Encodes `xattrs`: as much as fits goes into the inode, the rest into a block.
pub(super) fn encode(xattrs: &[Xattr]) -> Result<Encoded, XattrError> {
    let mut entries = Vec::with_capacity(xattrs.len());
    for xattr in xattrs {
        let Some((index, suffix)) = split_name(&xattr.name) else { continue };
        let value = match index {
            INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT => acl(&xattr.value).ok_or(XattrError::MalformedAcl)?,
            _ => xattr.value.to_vec(),
        };
        entries.push(Entry { index, suffix, value });
    }
    // The kernel searches a block by this order (fs/ext4/xattr.c, ext4_xattr_cmp).
    entries.sort_by(|a, b| (a.index, a.suffix.len(), a.suffix).cmp(&(b.index, b.suffix.len(), b.suffix)));
    let mut room = INLINE_ROOM;
    let (inline, outside): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| {
        let fits = entry.size() <= room;
        room -= if fits { entry.size() } else { 0 };
        fits
    });
    let needed: usize = outside.iter().map(Entry::size).sum();
    if needed > BLOCK_ROOM {
        return Err(XattrError::TooLarge { needed, room: BLOCK_ROOM });
    }
    let mut encoded = Encoded { inline: [0; INLINE_SIZE], block: None };
    if !inline.is_empty() {
        put(&mut encoded.inline, 0, MAGIC.to_le_bytes());
        // Here offsets of values count from the first entry, in a block from the block's start.
        fill(&mut encoded.inline[INLINE_HEADER_SIZE..], 0, &inline);
    }
    if !outside.is_empty() {
        let mut block = vec![0; BLOCK_SIZE];
        put(&mut block, 0, MAGIC.to_le_bytes());
        put(&mut block, 4, 1u32.to_le_bytes());
        put(&mut block, 8, 1u32.to_le_bytes());
        let hash = outside.iter().fold(0u32, |hash, entry| hash.rotate_left(16) ^ entry.hash());
        put(&mut block, 12, hash.to_le_bytes());
        fill(&mut block, BLOCK_HEADER_SIZE, &outside);
        encoded.block = Some(block);
    }
    Ok(encoded)
}

/// Puts the checksum into a block that will be written at `place`.
pub(super) fn seal(block: &mut [u8], place: u64, identity: &Identity) {
    let checksum = identity.seed().update(&place.to_le_bytes()).update(block).value();
    put(block, 16, checksum.to_le_bytes());
}

struct Entry<'a> {
    index: u8,
    suffix: &'a [u8],
    value: Vec<u8>,
}

impl Entry<'_> {
    fn size(&self) -> usize {
        ENTRY_SIZE + self.suffix.len().next_multiple_of(4) + self.value.len().next_multiple_of(4)
    }

    /// fs/ext4/xattr.c, ext4_xattr_hash_entry.
    fn hash(&self) -> u32 {
        let hash = self.suffix.iter().fold(0u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
        self.value.chunks(4).fold(hash, |hash, chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// Entries grow from `first` upwards, their values from the end downwards.
fn fill(area: &mut [u8], first: usize, entries: &[Entry<'_>]) {
    let mut at = first;
    let mut value_at = area.len();
    for entry in entries {
        value_at -= entry.value.len().next_multiple_of(4);
        area[at] = entry.suffix.len() as u8;
        area[at + 1] = entry.index;
        let offset = if entry.value.is_empty() { 0 } else { value_at as u16 };
        put(area, at + 2, offset.to_le_bytes());
        put(area, at + 8, (entry.value.len() as u32).to_le_bytes());
        put(area, at + 12, entry.hash().to_le_bytes());
        area[at + ENTRY_SIZE..][..entry.suffix.len()].copy_from_slice(entry.suffix);
        area[value_at..][..entry.value.len()].copy_from_slice(&entry.value);
        at += ENTRY_SIZE + entry.suffix.len().next_multiple_of(4);
    }
}

/// The namespace's number and what is left of the name.
fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((INDEX_ACL_ACCESS, b"")),
        b"system.posix_acl_default" => return Some((INDEX_ACL_DEFAULT, b"")),
        _ => {}
    }
    let namespaces: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    namespaces
        .into_iter()
        .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
        .filter(|(_, suffix)| !suffix.is_empty() && suffix.len() <= 255 && !suffix.contains(&0))
}

/// An ACL from the form of the system call (include/uapi/linux/posix_acl_xattr.h) to ext4's (fs/ext4/acl.h), which leaves
/// out ids where the tag implies them.
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    const CALL_VERSION: u32 = 2;
    const DISK_VERSION: u32 = 1;
    const TAG_USER: u16 = 0x02;
    const TAG_GROUP: u16 = 0x08;
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != CALL_VERSION || entries.len() % 8 != 0 {
        return None;
    }
    let mut encoded = DISK_VERSION.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        match u16::from_le_bytes([entry[0], entry[1]]) {
            TAG_USER | TAG_GROUP => encoded.extend_from_slice(entry),
            0x01 | 0x04 | 0x10 | 0x20 => encoded.extend_from_slice(&entry[..4]),
            _ => return None,
        }
    }
    Some(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &str, value: &[u8]) -> Xattr {
        Xattr { name: name.as_bytes().into(), value: value.into() }
    }

    #[test]
    fn small_sets_need_no_block() {
        let encoded = encode(&[xattr("security.capability", &[7; 20])]).unwrap();
        assert!(encoded.block.is_none());
        assert_eq!(encoded.inline[..4], MAGIC.to_le_bytes());
        assert_eq!(encoded.inline[4..6], [10, 6]);
        assert_eq!(&encoded.inline[20..30], b"capability");
        assert_eq!(encoded.inline[INLINE_SIZE - 20..], [7; 20]);
        assert_eq!(encode(&[]).unwrap().inline, [0; INLINE_SIZE]);
    }

    #[test]
    fn large_sets_take_one_block_and_no_more() {
        let encoded = encode(&[xattr("user.a", &[1; 4000]), xattr("user.b", b"x")]).unwrap();
        assert!(encoded.block.is_some());
        assert_eq!(encoded.inline[5], 1, "the small one still sits in the inode");
        let exact = BLOCK_ROOM - ENTRY_SIZE - 4;
        assert!(encode(&[xattr("user.a", &vec![1; exact])]).is_ok());
        let error = encode(&[xattr("user.a", &vec![1; exact + 1])]).err();
        assert_eq!(error, Some(XattrError::TooLarge { needed: BLOCK_ROOM + 4, room: BLOCK_ROOM }));
    }

    #[test]
    fn acls_change_their_form() {
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let call =
            [2u32.to_le_bytes().to_vec(), entry(1, 6, !0), entry(2, 4, 1000), entry(0x20, 0, !0)].concat();
        let disk = acl(&call).unwrap();
        assert_eq!(disk.len(), 4 + 4 + 8 + 4);
        assert_eq!(disk[8..16], entry(2, 4, 1000));
        assert_eq!(acl(&call[..call.len() - 1]), None);
        assert_eq!(acl(&[1, 0, 0, 0]), None);
        assert!(
            !is_stored(b"com.apple.quarantine")
                && !is_stored(b"user.")
                && !is_stored(b"trusted.overlay.redirect")
        );
    }
}
