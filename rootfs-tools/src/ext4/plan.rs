//! The plan of a file system: a number for every inode and a place for every block, before anything is written.

use std::ops::Range;

use super::checksum::Identity;
use super::directory::{FanOut, Packing};
use super::extent::{self, Extent};
use super::geometry::{Allocator, Geometry};
use super::inode::MAX_LINKS;
use super::journal::{self, Journal};
use super::superblock::MAX_LABEL;
use super::xattr::{self, XattrError};
use super::{
    BLOCK_SIZE, BLOCKS_PER_GROUP, FIRST_INODE, LOST_FOUND, MAX_BYTES, MAX_INODES_PER_GROUP, ROOT_INODE,
    device,
};
use crate::tree::{Content, Directory, FileData, NodeId, Place, Run, Tree};

/// How large the file system is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capacity {
    /// As large as the contents, and what this many more bytes of files take.
    Free(u64),
    /// Exactly this many bytes.
    Size(u64),
}

/// Why there is no plan.
#[derive(Debug)]
pub(crate) enum PlanError {
    /// It needs `needed` bytes and may have `asked`.
    TooLarge { needed: u64, asked: u64 },
    /// The node cannot be stored.
    Unsupported { node: NodeId, reason: String },
}

/// mke2fs's ratio of bytes to inodes, for file systems that will be written to.
const BYTES_PER_INODE: u64 = 16384;

/// The longest name in bytes (`EXT4_NAME_LEN`).
const MAX_NAME: usize = 255;

/// Targets shorter than this live in the inode (`EXT4_N_BLOCKS * 4`, with a NUL).
pub(super) const FAST_SYMLINK: usize = 60;

/// An inode of the plan. There is one for each entry, so it is kept small: block numbers and counts have 32 bits, as
/// [`MAX_BYTES`] allows.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) node: NodeId,
    /// For directories the subdirectories with the two dots, for the others the names.
    pub(super) links: u32,
    /// The inode of the directory that holds it (of one, if there are several).
    pub(super) parent: u32,
    /// Blocks of contents.
    pub(super) blocks: u32,
    /// The block of extended attributes, 0 without one.
    pub(super) xattr_block: u32,
    /// Where its runs are in [`Plan::extents`].
    first_extent: u32,
    extent_count: u32,
}

/// What a run of blocks holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holds {
    /// Blocks of a directory or of a symbolic link's target, or data: from block `first` of the inode on.
    Contents { first: u64 },
    /// Extended attributes.
    Xattrs,
    /// A node of the extent tree.
    ExtentNode { number: u32 },
    /// The resize inode's doubly indirect block.
    Growth,
    /// The journal, from its block `first` on.
    Journal { first: u64 },
    /// A node of the journal's extent tree.
    JournalNode { number: u32 },
}

/// A run of blocks with what belongs there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) length: u32,
    /// Index into [`Plan::inodes`].
    pub(super) inode: u32,
    pub(super) holds: Holds,
}

/// The blocks of a journal.
#[derive(Clone, Debug)]
pub(super) struct JournalPlan {
    pub(super) blocks: u32,
    pub(super) extents: Vec<Extent>,
    pub(super) nodes: Vec<u64>,
}

/// Everything that is known before the first byte is written.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(super) geometry: Geometry,
    pub(super) identity: Identity,
    pub(super) label: [u8; MAX_LABEL],
    /// The root, then inode [`FIRST_INODE`] and on.
    pub(super) inodes: Vec<Planned>,
    /// The inode of each node, by [`NodeId::index`]; 0 for nodes without a name.
    pub(super) numbers: Vec<u32>,
    /// Indices into the inodes, in the order of the places of their contents.
    order: Vec<u32>,
    /// The blocks of extent trees, by inode index, ascending.
    extent_nodes: Vec<(u32, Vec<u64>)>,
    /// The resize inode's doubly indirect block.
    pub(super) growth: u64,
    pub(super) journal: Option<JournalPlan>,
    /// Whether a directory has three levels of index.
    pub(super) large_directories: bool,
    /// How directories are packed.
    pub(super) fan_out: FanOut,
    extents: Vec<Extent>,
    /// The first block behind the contents.
    pub(super) end: u64,
    /// Free runs before that, in ascending order.
    pub(super) gaps: Vec<Range<u64>>,
    /// Bytes of the file that holds the file system.
    length: u64,
}

impl Plan {
    /// Plans the file system of `tree`. Of `label` at most 16 bytes are used.
    pub(crate) fn new(
        tree: &Tree,
        capacity: Capacity,
        identity: Identity,
        label: &[u8],
        journal: Journal,
        fan_out: FanOut,
    ) -> Result<Self, PlanError> {
        let mut name = [0; MAX_LABEL];
        let label = &label[..label.len().min(MAX_LABEL)];
        name[..label.len()].copy_from_slice(label);
        let (inodes, numbers, large_directories) = number(tree, &identity, fan_out)?;
        let mut order: Vec<u32> = (0..inodes.len() as u32).collect();
        order.sort_by_key(|&index| match &tree.node(inodes[index as usize].node).content {
            // Directories come first, to be read together; data last, in the order in which the layers give it.
            Content::Directory(_) => (0, 0, 0),
            Content::File { size, data } => match data.runs(*size).next() {
                Some(run) => (2, run.place.source, run.place.offset),
                None => (1, 0, 0),
            },
            _ => (1, 0, 0),
        });
        let used = u64::from(FIRST_INODE) + inodes.len() as u64 - 2;
        let mut draft = Draft { tree, inodes, order, journal };
        let (layout, length) = match capacity {
            Capacity::Free(free) => {
                let layout = draft.fit_around(used, free)?;
                let length = layout.geometry.blocks * BLOCK_SIZE as u64;
                (layout, length)
            }
            Capacity::Size(asked) => {
                let wanted = used.max(asked / BYTES_PER_INODE);
                let mut fits = |inodes, alignment| {
                    let geometry = Geometry::fit(asked.min(MAX_BYTES) / BLOCK_SIZE as u64, inodes)?;
                    let layout = draft.lay_out(geometry, alignment);
                    (layout.end <= layout.geometry.blocks).then_some(layout)
                };
                let fitting = fits(wanted, Alignment::Windows)
                    .or_else(|| fits(used, Alignment::Windows))
                    .or_else(|| fits(used, Alignment::None));
                match fitting {
                    Some(layout) => (layout, asked),
                    None => {
                        let needed = draft.fit_around(used, 0)?.geometry.blocks * BLOCK_SIZE as u64;
                        return Err(PlanError::TooLarge { needed, asked });
                    }
                }
            }
        };
        let Layout { geometry, extents, extent_nodes, growth, journal, end, gaps } = layout;
        let Draft { inodes, order, .. } = draft;
        Ok(Self {
            geometry,
            identity,
            label: name,
            inodes,
            numbers,
            order,
            extent_nodes,
            growth,
            journal,
            large_directories,
            fan_out,
            extents,
            end,
            gaps,
            length,
        })
    }

    /// Everything but the structures of the groups, in ascending order of the places.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> {
        let piece = |start, length, holds| Piece { start, length, inode: 0, holds };
        let growth = std::iter::once(piece(self.growth, 1, Holds::Growth));
        let journal = self.journal.iter().flat_map(move |journal| {
            let runs = journal.extents.iter().map(move |&Extent { logical, start, length }| {
                piece(start, length, Holds::Journal { first: logical.into() })
            });
            let node = move |(&start, number)| piece(start, 1, Holds::JournalNode { number });
            runs.chain(journal.nodes.iter().zip(0..).map(node))
        });
        let inodes = self.order.iter().flat_map(move |&inode| {
            let planned = &self.inodes[inode as usize];
            let piece = move |start, length, holds| Piece { start, length, inode, holds };
            let runs = self.extents_of(planned).iter().map(move |&Extent { logical, start, length }| {
                piece(start, length, Holds::Contents { first: logical.into() })
            });
            let nodes = self.extent_nodes_of(inode).iter().zip(0..);
            let xattrs = (planned.xattr_block != 0).then_some(planned.xattr_block);
            runs.chain(nodes.map(move |(&start, number)| piece(start, 1, Holds::ExtentNode { number })))
                .chain(xattrs.map(move |start| piece(start.into(), 1, Holds::Xattrs)))
        });
        growth.chain(journal).chain(inodes)
    }

    /// Bytes of the file that the file system fills.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Inodes in use that are not reserved ones.
    pub(crate) fn entries(&self) -> u64 {
        self.inodes.len() as u64
    }

    /// Bytes of file data, without holes.
    pub(crate) fn data_bytes(&self, tree: &Tree) -> u64 {
        let size = |inode: &Planned| match &tree.node(inode.node).content {
            Content::File { size, data } => data.runs(*size).map(|run| run.length).sum(),
            _ => 0,
        };
        self.inodes.iter().map(size).sum::<u64>()
    }

    /// The runs of an inode's contents.
    pub(super) fn extents_of(&self, planned: &Planned) -> &[Extent] {
        let first = planned.first_extent as usize;
        &self.extents[first..first + planned.extent_count as usize]
    }

    /// The blocks of the extent tree of `inodes[index]`.
    pub(super) fn extent_nodes_of(&self, index: u32) -> &[u64] {
        match self.extent_nodes.binary_search_by_key(&index, |(inode, _)| *inode) {
            Ok(found) => &self.extent_nodes[found].1,
            Err(_) => &[],
        }
    }
}

/// The inode number of `inodes[index]`.
pub(super) fn inode_number(index: usize) -> u32 {
    // Lists of inodes are built from 32-bit node ids.
    if index == 0 { ROOT_INODE } else { FIRST_INODE + index as u32 - 1 }
}

/// Numbers the nodes, directory by directory, and finds out how many blocks each of them takes, and whether a directory
/// is so large that the file system needs a feature for it.
fn number(
    tree: &Tree,
    identity: &Identity,
    fan_out: FanOut,
) -> Result<(Vec<Planned>, Vec<u32>, bool), PlanError> {
    let planned = |node, parent| Planned {
        node,
        links: 0,
        parent,
        blocks: 0,
        xattr_block: 0,
        first_extent: 0,
        extent_count: 0,
    };
    let mut inodes = vec![planned(NodeId::ROOT, ROOT_INODE)];
    // Index + 1, so that 0 means that there is none yet.
    let mut places = vec![0u32; tree.len()];
    places[NodeId::ROOT.index()] = 1;
    // By convention lost+found is the first inode that is not reserved.
    if let Some(lost_found) = tree.child(NodeId::ROOT, LOST_FOUND).filter(|name| tree.is_directory(name.node))
    {
        inodes.push(planned(lost_found.node, ROOT_INODE));
        places[lost_found.node.index()] = 2;
    }
    let mut stack = vec![NodeId::ROOT];
    while let Some(directory) = stack.pop() {
        let place = places[directory.index()] as usize - 1;
        let number = inode_number(place);
        let children = tree.children(directory).into_iter().flat_map(Directory::iter);
        let before = stack.len();
        let mut subdirectories = 0;
        for (name, child) in children {
            let known = &mut places[child.node.index()];
            let is_lost_found = directory == NodeId::ROOT && name == LOST_FOUND;
            if *known != 0 && tree.is_directory(child.node) && !is_lost_found {
                let reason = "the directory has two names".to_owned();
                return Err(PlanError::Unsupported { node: child.node, reason });
            }
            if *known == 0 {
                inodes.push(planned(child.node, number));
                *known = inodes.len() as u32;
            }
            if tree.is_directory(child.node) {
                subdirectories += 1;
                stack.push(child.node);
            } else {
                inodes[*known as usize - 1].links += 1;
            }
        }
        inodes[place].links = 2 + subdirectories;
        // The stack hands them out in the order of their names.
        stack[before..].reverse();
    }
    let mut large = false;
    for inode in &mut inodes {
        large |= measure(tree, inode, identity, fan_out)?;
    }
    let numbers = places
        .into_iter()
        .map(|place| if place == 0 { 0 } else { inode_number(place as usize - 1) })
        .collect();
    Ok((inodes, numbers, large))
}

/// Whether a directory can hold the name.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= MAX_NAME
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// Finds out what a node takes, and whether it can be stored at all. True for a directory with three levels of index.
fn measure(
    tree: &Tree,
    inode: &mut Planned,
    identity: &Identity,
    fan_out: FanOut,
) -> Result<bool, PlanError> {
    let node = tree.node(inode.node);
    let unsupported = |reason: String| Err(PlanError::Unsupported { node: inode.node, reason });
    if let Content::Directory(children) = &node.content
        && let Some((name, _)) = children.iter().find(|(name, _)| !is_name(name))
    {
        let shown = String::from_utf8_lossy(&name[..name.len().min(300)]);
        return unsupported(format!(
            "the name {shown:?} has {} bytes, expected 1 to 255 without '/' and NUL, not '.' or '..'",
            name.len()
        ));
    }
    if let Content::File { size, data: FileData::Sparse(runs) } = &node.content {
        let mut end = 0;
        for run in &runs[..] {
            let behind = run.start.checked_add(run.length).filter(|behind| *behind <= *size);
            match behind {
                Some(behind) if run.length > 0 && run.start >= end => end = behind,
                _ => return unsupported("its runs of data are not ascending parts of the file".to_owned()),
            }
        }
    }
    let mut is_large = false;
    let blocks: u64 = match &node.content {
        Content::Directory(children) => {
            match Packing::new(children.iter().map(|(name, _)| name), identity, fan_out) {
                Some(packing) => {
                    is_large = packing.is_large();
                    packing.blocks().into()
                }
                None => {
                    return unsupported(format!(
                        "the directory has {} entries, more than an index holds",
                        children.len()
                    ));
                }
            }
        }
        Content::File { size, .. } if *size > MAX_BYTES - BLOCK_SIZE as u64 => {
            return unsupported(format!("the file has {size} bytes, ext4 files have at most 16 TiB"));
        }
        Content::File { size, data } => block_runs(*size, data).map(|run| run.end - run.start).sum(),
        Content::Symlink(target) if target.is_empty() || target.len() >= BLOCK_SIZE => {
            return unsupported(format!("the link's target has {} bytes, expected 1 to 4095", target.len()));
        }
        Content::Symlink(target) => u64::from(target.len() >= FAST_SYMLINK),
        Content::CharDevice { major, minor } | Content::BlockDevice { major, minor } => {
            if device::encode(*major, *minor).is_none() {
                return unsupported(format!(
                    "the device number is {major}:{minor}, Linux has numbers up to 4095:1048575"
                ));
            }
            0
        }
        Content::Fifo => 0,
    };
    // Below the bound of a file's size, in blocks.
    inode.blocks = blocks as u32;
    if inode.links > MAX_LINKS && !tree.is_directory(inode.node) {
        return unsupported(format!(
            "the file has {} names, an inode of ext4 has at most {MAX_LINKS}",
            inode.links
        ));
    }
    match xattr::encode(&node.attributes.xattrs) {
        // Any number but 0 stands for "to be placed".
        Ok(encoded) => inode.xattr_block = encoded.block.is_some().into(),
        Err(XattrError::TooLarge { needed, room }) => {
            return unsupported(format!(
                "the extended attributes take {needed} bytes, a block of ext4 holds {room}"
            ));
        }
        Err(XattrError::MalformedAcl) => {
            return unsupported("a POSIX ACL of it is malformed (expected version 2)".to_owned());
        }
    }
    Ok(is_large)
}

/// The blocks of a file that hold data, in ascending disjoint runs.
fn block_runs(size: u64, data: &FileData) -> impl Iterator<Item = Range<u64>> {
    let mut runs = data.runs(size).peekable();
    let blocks =
        |run: Run| run.start / BLOCK_SIZE as u64..(run.start + run.length).div_ceil(BLOCK_SIZE as u64);
    std::iter::from_fn(move || {
        let mut joined = blocks(runs.next()?);
        while let Some(next) = runs.next_if(|&next| blocks(next).start <= joined.end) {
            joined.end = blocks(next).end;
        }
        Some(joined)
    })
}

/// Where data is put at round places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alignment {
    /// Once in each [`ALIGNED_WINDOW`] of its source.
    Windows,
    /// Nowhere.
    None,
}

/// After each of these in a layer the data goes on at a multiple of [`ALIGNMENT`]. Images that share the layer then have the
/// same chunks, although what is in front of its data has another length in each of them.
const ALIGNED_WINDOW: u64 = 4 << 20;

/// Blocks of the chunks that images are cut into (`crate::chunk`, 64 KiB).
const ALIGNMENT: u64 = 16;

/// Inodes, with places for their blocks that can still change.
struct Draft<'a> {
    tree: &'a Tree,
    inodes: Vec<Planned>,
    order: Vec<u32>,
    journal: Journal,
}

struct Layout {
    geometry: Geometry,
    extents: Vec<Extent>,
    extent_nodes: Vec<(u32, Vec<u64>)>,
    growth: u64,
    journal: Option<JournalPlan>,
    end: u64,
    gaps: Vec<Range<u64>>,
}

impl Draft<'_> {
    /// The smallest layout with `used` inodes and `free` bytes to spare (with inodes for them).
    fn fit_around(&mut self, used: u64, free: u64) -> Result<Layout, PlanError> {
        const STEP: u64 = 64;
        let too_large =
            |blocks: u64| PlanError::TooLarge { needed: blocks * BLOCK_SIZE as u64, asked: MAX_BYTES };
        if free > MAX_BYTES {
            return Err(PlanError::TooLarge { needed: free, asked: MAX_BYTES });
        }
        let inodes = used + free / BYTES_PER_INODE;
        let free = free.div_ceil(BLOCK_SIZE as u64);
        let contents: u64 =
            self.inodes.iter().map(|inode| u64::from(inode.blocks) + u64::from(inode.xattr_block != 0)).sum();
        let full_groups = inodes.div_ceil(MAX_INODES_PER_GROUP.into()) - 1;
        let mut blocks = (contents + free + STEP).max(full_groups * BLOCKS_PER_GROUP + STEP);
        while blocks <= MAX_BYTES / BLOCK_SIZE as u64 {
            let Some(geometry) = Geometry::fit(blocks, inodes) else {
                blocks += STEP;
                continue;
            };
            let trimmed = geometry.blocks < blocks;
            let layout = self.lay_out(geometry, Alignment::Windows);
            let taken: u64 = layout
                .geometry
                .reserved
                .iter()
                .map(|run| run.end - run.start.max(layout.end).min(run.end))
                .sum();
            let missing = (layout.end + taken + free).saturating_sub(layout.geometry.blocks);
            if missing == 0 {
                return Ok(layout);
            }
            blocks += if trimmed { missing.max(STEP) } else { missing };
        }
        Err(too_large(blocks))
    }

    /// Gives every block a place, beyond the end of the geometry if it must be.
    fn lay_out(&mut self, geometry: Geometry, alignment: Alignment) -> Layout {
        let mut extents: Vec<Extent> = Vec::with_capacity(self.order.len());
        let mut extent_nodes = Vec::new();
        let mut allocator = Allocator::new(&geometry);
        let growth = allocator.allocate_block();
        let journal_blocks = match self.journal {
            Journal::None => 0,
            Journal::Auto => journal::default_blocks(geometry.blocks),
            // Checked by whoever set it.
            Journal::Size(bytes) => (bytes / BLOCK_SIZE as u64) as u32,
        };
        let journal = (journal_blocks > 0).then(|| {
            let mut extents = Vec::new();
            allocator.allocate(0..journal_blocks.into(), &mut extents);
            let nodes = extent::tree_blocks(extents.len());
            let nodes = (0..nodes).map(|_| allocator.allocate_block()).collect();
            JournalPlan { blocks: journal_blocks, extents, nodes }
        });
        let mut gaps = Vec::new();
        let mut window: Option<Place> = None;
        for &index in &self.order {
            let inode = &mut self.inodes[index as usize];
            let from = extents.len();
            if let Content::File { size, data } = &self.tree.node(inode.node).content
                && let Some(Run { place, .. }) = data.runs(*size).next()
            {
                let here = Place { source: place.source, offset: place.offset / ALIGNED_WINDOW };
                let before = window.replace(here);
                if alignment == Alignment::Windows
                    && before.is_some_and(|it| it.source == here.source && it.offset != here.offset)
                {
                    gaps.extend(allocator.align(ALIGNMENT));
                }
            }
            match &self.tree.node(inode.node).content {
                Content::File { size, data } => {
                    block_runs(*size, data).for_each(|run| allocator.allocate(run, &mut extents));
                }
                _ => allocator.allocate(0..inode.blocks.into(), &mut extents),
            }
            let count = extents.len() - from;
            (inode.first_extent, inode.extent_count) = (from as u32, count as u32);
            let nodes: Vec<u64> =
                (0..extent::tree_blocks(count)).map(|_| allocator.allocate_block()).collect();
            if !nodes.is_empty() {
                extent_nodes.push((index, nodes));
            }
            if inode.xattr_block != 0 {
                // A layout that goes beyond the largest file system is not used.
                inode.xattr_block = u32::try_from(allocator.allocate_block()).unwrap_or(u32::MAX);
            }
        }
        extent_nodes.sort_unstable_by_key(|(index, _)| *index);
        let end = allocator.end();
        Layout { geometry, extents, extent_nodes, growth, journal, end, gaps }
    }
}
