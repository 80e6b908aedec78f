//! From a plan to bytes, front to back.

use super::bitmap::Bitmap;
use super::checksum::Identity;
use super::directory::{DirEntry, Packing};
use super::geometry::has_superblock;
use super::group::{BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT, INODE_ZEROED};
use super::inode::{self, Inode, MAX_LINKS};
use super::plan::{FAST_SYMLINK, Holds, JournalPlan, Piece, Plan, Planned, inode_number};
use super::superblock::{PRIMARY_OFFSET, Superblock};
use super::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, FIRST_INODE, INODE_SIZE, INODES_PER_BLOCK, device, directory, extent,
    journal, put, resize, xattr,
};
use crate::Error;
use crate::format::{DataSource, Sink};
use crate::tree::{Content, Directory, NodeId, Place, Timestamp, Tree};

/// Writes the file system; `progress` is told the number of bytes behind it.
pub(crate) fn write(
    plan: &Plan,
    tree: &Tree,
    source: &mut dyn DataSource,
    output: &mut dyn Sink,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let writer = Writer { plan, tree, identity: plan.identity };
    let descriptors = writer.descriptors();
    let superblock = writer.superblock(&descriptors);
    let table: Vec<u8> = descriptors
        .iter()
        .zip(0..)
        .flat_map(|(descriptor, number)| descriptor.encode(number, &plan.identity))
        .collect();

    let mut structures = Vec::with_capacity(descriptors.len() * 4);
    for ((places, descriptor), group) in plan.geometry.groups.iter().zip(&descriptors).zip(0u32..) {
        if has_superblock(group) {
            structures.push((u64::from(group) * BLOCKS_PER_GROUP, Structure::Copies(group)));
        }
        if descriptor.flags & BLOCK_UNINIT == 0 {
            structures.push((places.block_bitmap, Structure::BlockBitmap(group)));
        }
        if descriptor.flags & INODE_UNINIT == 0 {
            structures.push((places.inode_bitmap, Structure::InodeBitmap(group)));
            structures.push((places.inode_table, Structure::InodeTable(group)));
        }
    }
    structures.sort_unstable_by_key(|(start, _)| *start);
    let mut structures = structures.into_iter().peekable();
    let mut pieces = plan.pieces().peekable();
    loop {
        let next_piece = pieces.peek().map_or(u64::MAX, |piece| piece.start);
        if let Some((start, structure)) = structures.next_if(|(start, _)| *start < next_piece) {
            output.zeros_to(start * BLOCK_SIZE as u64)?;
            writer.structure(structure, &superblock, &table, output)?;
        } else if let Some(piece) = pieces.next() {
            output.zeros_to(piece.start * BLOCK_SIZE as u64)?;
            writer.piece(&piece, source, output)?;
        } else {
            break;
        }
        progress(output.position());
    }
    output.zeros_to(plan.length())?;
    progress(plan.length());
    Ok(())
}

#[derive(Clone, Copy)]
enum Structure {
    Copies(u32),
    BlockBitmap(u32),
    InodeBitmap(u32),
    InodeTable(u32),
}

struct Writer<'a> {
    plan: &'a Plan,
    tree: &'a Tree,
    identity: Identity,
}

impl Writer<'_> {
    fn structure(
        &self,
        structure: Structure,
        superblock: &Superblock,
        table: &[u8],
        output: &mut dyn Sink,
    ) -> Result<(), Error> {
        match structure {
            Structure::Copies(group) => {
                let mut block = vec![0; BLOCK_SIZE];
                let at = if group == 0 { PRIMARY_OFFSET } else { 0 };
                put(&mut block, at, superblock.encode(group));
                output.write(&block)?;
                output.write(table)?;
                if group == 0 {
                    let geometry = &self.plan.geometry;
                    let first = geometry.descriptor_blocks;
                    for slot in first..first + geometry.reserved_descriptor_blocks {
                        output.zeros_to((1 + slot) * BLOCK_SIZE as u64)?;
                        output.write(&resize::indirect(slot, geometry.group_count()))?;
                    }
                }
                Ok(())
            }
            Structure::BlockBitmap(group) => output.write(self.block_bitmap(group).bytes()),
            Structure::InodeBitmap(group) => output.write(self.inode_bitmap(group).bytes()),
            Structure::InodeTable(group) => self.inode_table(group, output),
        }
    }

    /// Inodes in use, with the reserved ones. They are the first ones without a gap.
    fn used_inodes(&self) -> u32 {
        inode_number(self.plan.inodes.len() - 1).max(FIRST_INODE - 1)
    }

    /// How many inodes of the group are in use; they are its first ones.
    fn used_inodes_of(&self, group: u32) -> u32 {
        let per_group = self.plan.geometry.inodes_per_group;
        self.used_inodes().saturating_sub(group * per_group).min(per_group)
    }

    fn descriptors(&self) -> Vec<GroupDescriptor> {
        let geometry = &self.plan.geometry;
        let count = geometry.group_count();
        let mut descriptors: Vec<GroupDescriptor> = geometry
            .groups
            .iter()
            .zip(0..)
            .map(|(places, group)| {
                let blocks = geometry.group_blocks(group);
                let used = self.used_blocks(group);
                let used_inodes = self.used_inodes_of(group);
                let unused = geometry.inodes_per_group - used_inodes;
                let mut descriptor = GroupDescriptor {
                    block_bitmap: places.block_bitmap,
                    inode_bitmap: places.inode_bitmap,
                    inode_table: places.inode_table,
                    free_blocks: (blocks.end - blocks.start - used) as u32,
                    free_inodes: unused,
                    unused_inodes: unused,
                    flags: INODE_ZEROED,
                    ..GroupDescriptor::default()
                };
                // The last group's bitmap also marks what lies behind the end, so it is always written.
                if group + 1 < count && used == geometry.copies(group) {
                    descriptor.flags |= BLOCK_UNINIT;
                } else {
                    let bitmap = self.block_bitmap(group);
                    descriptor.block_bitmap_checksum = self.identity.seed().update(bitmap.bytes()).value();
                }
                if used_inodes == 0 {
                    descriptor.flags |= INODE_UNINIT;
                } else {
                    let bitmap = self.inode_bitmap(group);
                    let covered = &bitmap.bytes()[..geometry.inodes_per_group as usize / 8];
                    descriptor.inode_bitmap_checksum = self.identity.seed().update(covered).value();
                }
                descriptor
            })
            .collect();
        for (index, planned) in self.plan.inodes.iter().enumerate() {
            if self.tree.is_directory(planned.node) {
                let group = (inode_number(index) - 1) / geometry.inodes_per_group;
                descriptors[group as usize].used_directories += 1;
            }
        }
        descriptors
    }

    fn superblock(&self, descriptors: &[GroupDescriptor]) -> Superblock {
        let geometry = &self.plan.geometry;
        Superblock {
            blocks: geometry.blocks,
            free_blocks: descriptors.iter().map(|descriptor| u64::from(descriptor.free_blocks)).sum(),
            inodes: geometry.inodes(),
            free_inodes: geometry.inodes() - self.used_inodes(),
            inodes_per_group: geometry.inodes_per_group,
            identity: self.identity,
            label: self.plan.label,
            // At most one for each slot of the resize inode.
            reserved_descriptor_blocks: geometry.reserved_descriptor_blocks as u16,
            large_directories: self.plan.large_directories,
            journal: self.plan.journal.as_ref().map(|plan| {
                let inode = self.journal_inode(plan);
                (inode.block, inode.size)
            }),
        }
    }

    /// The group's blocks in use, as ranges: everything below the end of the contents but the gaps, and the structures above it.
    fn used_ranges(&self, group: u32) -> impl Iterator<Item = std::ops::Range<u64>> {
        let blocks = self.plan.geometry.group_blocks(group);
        let end = self.plan.end.clamp(blocks.start, blocks.end);
        let reserved = &self.plan.geometry.reserved;
        let above = reserved.partition_point(|run| run.end <= end);
        let limit = blocks.end;
        let gaps = &self.plan.gaps;
        let first = gaps.partition_point(|gap| gap.end <= blocks.start);
        let gaps = &gaps[first..gaps.partition_point(|gap| gap.start < end).max(first)];
        // What is between the gaps: from the end of one to the start of the next.
        let starts = std::iter::once(blocks.start).chain(gaps.iter().map(move |gap| gap.end.min(end)));
        let ends = gaps.iter().map(move |gap| gap.start.max(blocks.start)).chain(std::iter::once(end));
        let used = starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty());
        used.chain(
            reserved[above..]
                .iter()
                .take_while(move |run| run.start < limit)
                .map(move |run| run.start.max(end)..run.end.min(limit)),
        )
    }

    fn used_blocks(&self, group: u32) -> u64 {
        self.used_ranges(group).map(|range| range.end - range.start).sum()
    }

    fn block_bitmap(&self, group: u32) -> Bitmap {
        let blocks = self.plan.geometry.group_blocks(group);
        let mut bitmap = Bitmap::new();
        for range in self.used_ranges(group) {
            bitmap.mark((range.start - blocks.start) as usize..(range.end - blocks.start) as usize);
        }
        bitmap.mark((blocks.end - blocks.start) as usize..BLOCKS_PER_GROUP as usize);
        bitmap
    }

    fn inode_bitmap(&self, group: u32) -> Bitmap {
        let mut bitmap = Bitmap::new();
        bitmap.mark(0..self.used_inodes_of(group) as usize);
        bitmap.mark(self.plan.geometry.inodes_per_group as usize..BLOCK_SIZE * 8);
        bitmap
    }

    /// The used part of the group's inode table, in whole blocks. The rest is zeros.
    fn inode_table(&self, group: u32, output: &mut dyn Sink) -> Result<(), Error> {
        let first = group * self.plan.geometry.inodes_per_group + 1;
        let used = self.used_inodes_of(group);
        for number in first..first + used.next_multiple_of(INODES_PER_BLOCK) {
            let inode = match number {
                super::ROOT_INODE => Some(self.inode(0, &self.plan.inodes[0])),
                resize::INODE => Some(self.resize_inode()),
                journal::INODE => self.plan.journal.as_ref().map(|plan| self.journal_inode(plan)),
                FIRST_INODE.. => {
                    let index = (number - FIRST_INODE + 1) as usize;
                    self.plan.inodes.get(index).map(|planned| self.inode(index, planned))
                }
                // The other reserved inodes are zeros, as mke2fs leaves them.
                _ => None,
            };
            match inode {
                Some(inode) => output.write(&inode.encode(number, &self.identity))?,
                None => output.write(&[0; INODE_SIZE])?,
            }
        }
        Ok(())
    }

    /// An inode of the file system's own.
    fn own_inode(&self, size: u64, blocks: u64) -> Inode {
        Inode {
            mode: inode::TYPE_FILE | 0o600,
            uid: 0,
            gid: 0,
            links: 1,
            size,
            mtime: Timestamp::default(),
            blocks,
            flags: 0,
            block: [0; extent::ROOT_SIZE],
            xattr_block: 0,
            xattr_inline: [0; xattr::INLINE_SIZE],
        }
    }

    fn resize_inode(&self) -> Inode {
        let geometry = &self.plan.geometry;
        let blocks = resize::owned_blocks(geometry.reserved_descriptor_blocks, geometry.group_count());
        let mut inode = self.own_inode(resize::LENGTH, blocks);
        put(&mut inode.block, resize::DOUBLY_INDIRECT * 4, (self.plan.growth as u32).to_le_bytes());
        inode
    }

    fn journal_inode(&self, plan: &JournalPlan) -> Inode {
        let blocks = u64::from(plan.blocks);
        let mut inode = self.own_inode(blocks * BLOCK_SIZE as u64, blocks + plan.nodes.len() as u64);
        inode.flags = inode::FLAG_EXTENTS;
        inode.block = self.journal_extents(plan).root;
        inode
    }

    fn journal_extents(&self, plan: &JournalPlan) -> extent::ExtentTree {
        extent::encode(&plan.extents, &plan.nodes, self.identity.inode_seed(journal::INODE))
    }

    fn inode(&self, index: usize, planned: &Planned) -> Inode {
        let node = self.tree.node(planned.node);
        let (file_type, _) = types(&node.content);
        let nodes = self.plan.extent_nodes_of(index as u32);
        // The plan has encoded them once, so they can be encoded.
        let xattr_inline =
            xattr::encode(&node.attributes.xattrs).map_or([0; xattr::INLINE_SIZE], |it| it.inline);
        let mut inode = Inode {
            mode: file_type | node.attributes.mode & 0o7777,
            uid: node.attributes.uid,
            gid: node.attributes.gid,
            links: planned.links as u16,
            size: 0,
            mtime: node.attributes.mtime,
            blocks: u64::from(planned.blocks) + nodes.len() as u64 + u64::from(planned.xattr_block != 0),
            flags: 0,
            block: [0; extent::ROOT_SIZE],
            xattr_block: planned.xattr_block.into(),
            xattr_inline,
        };
        match &node.content {
            Content::Directory(_) => {
                inode.size = u64::from(planned.blocks) * BLOCK_SIZE as u64;
                inode.links = if planned.links >= MAX_LINKS { 1 } else { inode.links };
                inode.flags |= if planned.blocks > 1 { inode::FLAG_INDEX } else { 0 };
            }
            Content::File { size, .. } => inode.size = *size,
            Content::Symlink(target) => {
                inode.size = target.len() as u64;
                if target.len() < FAST_SYMLINK {
                    inode.block[..target.len()].copy_from_slice(target);
                    return inode;
                }
            }
            Content::CharDevice { major, minor } | Content::BlockDevice { major, minor } => {
                let [first, second] = device::encode(*major, *minor).unwrap_or_default();
                put(&mut inode.block, 0, first.to_le_bytes());
                put(&mut inode.block, 4, second.to_le_bytes());
                return inode;
            }
            Content::Fifo => return inode,
        }
        inode.flags |= inode::FLAG_EXTENTS;
        let seed = self.identity.inode_seed(inode_number(index));
        inode.block = extent::encode(self.plan.extents_of(planned), nodes, seed).root;
        inode
    }

    fn piece(&self, piece: &Piece, source: &mut dyn DataSource, output: &mut dyn Sink) -> Result<(), Error> {
        let index = piece.inode as usize;
        let planned = &self.plan.inodes[index];
        let node = self.tree.node(planned.node);
        match (piece.holds, &node.content) {
            (Holds::Growth, _) => {
                let geometry = &self.plan.geometry;
                let (used, reserved) = (geometry.descriptor_blocks, geometry.reserved_descriptor_blocks);
                output.write(&resize::doubly_indirect(used, reserved))
            }
            (Holds::Journal { first: 0 }, _) => {
                let blocks = self.plan.journal.as_ref().map_or(0, |journal| journal.blocks);
                output.write(&journal::superblock(blocks, &self.identity.uuid))
            }
            // An empty log.
            (Holds::Journal { .. }, _) => Ok(()),
            (Holds::JournalNode { number }, _) => match &self.plan.journal {
                Some(journal) => output.write(&self.journal_extents(journal).blocks[number as usize]),
                None => Ok(()),
            },
            (Holds::Contents { first }, Content::File { size, data }) => {
                let from = first * BLOCK_SIZE as u64;
                let end = from + u64::from(piece.length) * BLOCK_SIZE as u64;
                // Where in the output the file's first byte would be.
                let base = piece.start * BLOCK_SIZE as u64;
                let runs = data.runs(*size).skip_while(|run| run.start + run.length <= from);
                for run in runs.take_while(|run| run.start < end) {
                    let mut at = run.start.max(from);
                    output.zeros_to(base + (at - from))?;
                    while at < (run.start + run.length).min(end) {
                        let room = output.room((run.start + run.length).min(end) - at)?;
                        source
                            .read(Place { offset: run.place.offset + (at - run.start), ..run.place }, room)?;
                        let count = room.len();
                        output.advance(count);
                        at += count as u64;
                    }
                }
                Ok(())
            }
            (Holds::Contents { first }, Content::Directory(_)) => {
                let bytes = self.directory(index, planned);
                let from = first as usize * BLOCK_SIZE;
                output.write(&bytes[from..from + piece.length as usize * BLOCK_SIZE])
            }
            (Holds::Contents { .. }, Content::Symlink(target)) => output.write(target),
            (Holds::Contents { .. }, _) => Ok(()),
            (Holds::Xattrs, _) => {
                let encoded = xattr::encode(&node.attributes.xattrs).ok().and_then(|encoded| encoded.block);
                let mut block = encoded.unwrap_or_default();
                xattr::seal(&mut block, piece.start, &self.identity);
                output.write(&block)
            }
            (Holds::ExtentNode { number }, _) => {
                let seed = self.identity.inode_seed(inode_number(index));
                let nodes = self.plan.extent_nodes_of(piece.inode);
                let tree = extent::encode(self.plan.extents_of(planned), nodes, seed);
                output.write(&tree.blocks[number as usize])
            }
        }
    }

    fn directory(&self, index: usize, planned: &Planned) -> Vec<u8> {
        let children = self.tree.children(planned.node).into_iter().flat_map(Directory::iter);
        let entries: Vec<DirEntry<'_>> = children
            .map(|(name, child)| DirEntry {
                name,
                inode: self.number(child.node),
                file_type: types(&self.tree.node(child.node).content).1,
            })
            .collect();
        let packing = Packing::new(entries.iter().map(|entry| entry.name), &self.identity, self.plan.fan_out);
        // The plan has packed it once, so it can be packed.
        packing.unwrap_or(Packing::Linear).encode(
            inode_number(index),
            planned.parent,
            &entries,
            &self.identity,
        )
    }

    fn number(&self, node: NodeId) -> u32 {
        self.plan.numbers[node.index()]
    }
}

/// The type as `i_mode` and as a directory entry have it.
fn types(content: &Content) -> (u16, u8) {
    match content {
        Content::File { .. } => (inode::TYPE_FILE, 1),
        Content::Directory(_) => (inode::TYPE_DIRECTORY, directory::TYPE_DIRECTORY),
        Content::CharDevice { .. } => (inode::TYPE_CHAR_DEVICE, 3),
        Content::BlockDevice { .. } => (inode::TYPE_BLOCK_DEVICE, 4),
        Content::Fifo => (inode::TYPE_FIFO, 5),
        Content::Symlink(_) => (inode::TYPE_SYMLINK, 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::plan::Capacity;
    use crate::output::Output;
    use crate::tree::{Attributes, FileData, Node};
    use std::process::Command;

    /// Every block begins with its number in the file; the rest is zeros.
    struct Numbered;

    impl DataSource for Numbered {
        fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
            let offset = place.offset;
            assert!(offset.is_multiple_of(BLOCK_SIZE as u64) && buffer.len().is_multiple_of(BLOCK_SIZE));
            buffer.fill(0);
            for (block, number) in buffer.chunks_exact_mut(BLOCK_SIZE).zip(offset / BLOCK_SIZE as u64..) {
                put(block, 0, number.to_le_bytes());
            }
            Ok(())
        }
    }

    /// More runs than the inode holds (an extent ends at 128 MiB, and at each copy of the superblock), so that the tree
    /// of extents has a level below it.
    #[test]
    fn a_file_with_more_extents_than_an_inode_holds() {
        const SIZE: u64 = 700 << 20;
        let mut tree = Tree::new();
        let content = Content::File { size: SIZE, data: FileData::Whole(Place { source: 0, offset: 0 }) };
        let node =
            tree.add(Node { attributes: Attributes { mode: 0o644, ..Attributes::default() }, content });
        tree.link(NodeId::ROOT, b"large", node, 0);
        let lost_found = Attributes { mode: 0o700, ..Attributes::default() };
        let node = tree.add(Node { attributes: lost_found, content: Content::Directory(Default::default()) });
        tree.link(NodeId::ROOT, crate::ext4::LOST_FOUND, node, 0);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rootfs.ext4");
        let plan = Plan::new(
            &tree,
            Capacity::Free(0),
            Identity::derive(b"large"),
            b"",
            crate::ext4::Journal::None,
            directory::FanOut::FULL,
        )
        .unwrap();
        let mut output = Output::create(&path).unwrap();
        write(&plan, &tree, &mut Numbered, &mut output, &mut |_| {}).unwrap();
        output.publish().unwrap();

        let check = Command::new("e2fsck").arg("-fn").arg(&path).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        let extents = Command::new("debugfs").args(["-R", "ex large"]).arg(&path).output().unwrap();
        let extents = String::from_utf8_lossy(&extents.stdout).into_owned();
        assert!(extents.lines().any(|line| line.trim_start().starts_with("1/ 1")), "{extents}");
        let ext4 = ext4_view::Ext4::load_from_path(&path).unwrap();
        let mut file = ext4.open("/large").unwrap();
        for number in [0, 1, 32_767, 32_768, 100_000, SIZE / BLOCK_SIZE as u64 - 1] {
            file.seek_to(number * BLOCK_SIZE as u64).unwrap();
            let mut start = [0; 8];
            assert_eq!(file.read_bytes(&mut start).unwrap(), 8);
            assert_eq!(u64::from_le_bytes(start), number);
        }
    }
}
