//! The walk from the root over everything that has a name.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::FileSystem;
use super::bytes::le32;
use super::extent::Blocks;
use super::fault::{Fault, Finding, Findings, damage};
use super::hash_tree::HashTree;
use super::inode::{BLOCK_AT, FileType, Inode};
use super::intervals::Intervals;
use super::xattr::Attributes as Stored;
use crate::ext4::ROOT_INODE;
use crate::ext4::extent::ROOT_SIZE;
use crate::tree::{Attributes, Content, Directory, FileData, Node, NodeId, Place, Run, Tree, Xattr};

/// The longest path in a finding.
const MAX_SHOWN_PATH: usize = 1000;

/// The longest path of a directory: what the kernel takes as one (`PATH_MAX`). It bounds what is kept for each entry.
const MAX_PATH: usize = 4096;

/// What a file system holds.
#[derive(Debug)]
pub struct Contents {
    /// Places of data are bytes of the image.
    pub tree: Tree,
    /// Inode numbers, by [`NodeId::index`].
    pub numbers: Vec<u32>,
    /// Sockets, which a tree has no place for.
    pub dropped_sockets: u64,
}

/// The tree of a file system without damage.
pub(super) fn tree(fs: &FileSystem) -> Result<Contents, Fault> {
    let mut findings = Findings::strict();
    let mut walk = Walk::new(fs, &mut findings, false)?;
    walk.run()?;
    Ok(walk.contents())
}

/// An inode that has a name.
#[derive(Debug)]
pub(super) struct Met {
    /// `None` for what the tree has no place for.
    node: Option<NodeId>,
    pub(super) is_directory: bool,
    pub(super) links: u16,
    /// Names, or for a directory its subdirectories and 2.
    pub(super) counted: u32,
    /// A directory's parent, and its name there.
    parent: u32,
    name: Box<[u8]>,
    path_length: usize,
}

/// A block of attributes that inodes share.
#[derive(Debug)]
pub(super) struct SharedXattrs {
    xattrs: Vec<Xattr>,
    pub(super) said: u32,
    pub(super) counted: u32,
}

/// A directory whose names were not read yet, and where the second part of its inline data is.
type Pending = (Inode, Option<(usize, usize)>, NodeId);

pub(super) struct Walk<'a> {
    pub(super) fs: &'a FileSystem,
    pub(super) findings: &'a mut Findings,
    /// Also looks at what reading does not need.
    thorough: bool,
    pub(super) claimed: Intervals,
    /// The file system's own structures, a part of what is claimed.
    pub(super) system: Intervals,
    pub(super) shared: BTreeMap<u64, SharedXattrs>,
    pub(super) met: HashMap<u32, Met>,
    tree: Tree,
    numbers: Vec<u32>,
    dropped_sockets: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(fs: &'a FileSystem, findings: &'a mut Findings, thorough: bool) -> Result<Self, Fault> {
        let mut walk = Self {
            fs,
            findings,
            thorough,
            claimed: Intervals::default(),
            system: Intervals::default(),
            shared: BTreeMap::new(),
            met: HashMap::new(),
            tree: Tree::new(),
            numbers: vec![ROOT_INODE],
            dropped_sockets: 0,
        };
        walk.claim_structures()?;
        walk.system = walk.claimed.clone();
        Ok(walk)
    }

    pub(super) fn contents(self) -> Contents {
        Contents { tree: self.tree, numbers: self.numbers, dropped_sockets: self.dropped_sockets }
    }

    fn claim_structures(&mut self) -> Result<(), Fault> {
        let fs = self.fs;
        let superblock = &fs.superblock;
        let copies =
            1 + superblock.descriptor_blocks() + u64::from(superblock.raw.reserved_descriptor_blocks);
        for (group, number) in fs.groups.iter().zip(0..) {
            let place = format!("structures of group {number}");
            let blocks = superblock.group_blocks(number);
            let mut ranges = vec![
                group.block_bitmap..group.block_bitmap + 1,
                group.inode_bitmap..group.inode_bitmap + 1,
                group.inode_table..group.inode_table + superblock.inode_table_blocks(),
            ];
            if superblock.has_copies(number) {
                // A file system too small for all of its reserved blocks has fewer.
                ranges.push(blocks.start..(blocks.start + copies).min(superblock.blocks));
            }
            for range in ranges {
                let claimed = self.claim(range, &place);
                self.findings.tolerate(claimed)?;
            }
        }
        Ok(())
    }

    /// Gives the blocks an owner; each has one.
    pub(super) fn claim(&mut self, blocks: Range<u64>, owner: &str) -> Result<(), Fault> {
        claim(&mut self.claimed, blocks, owner)
    }

    /// The blocks of an inode, claimed.
    pub(super) fn claim_blocks_of(&mut self, inode: &Inode) -> Result<Blocks, Fault> {
        let place = inode.place();
        let Self { claimed, findings, fs, .. } = self;
        let mut node = |block: u64| claim(claimed, block..block.saturating_add(1), &place);
        let blocks = fs.blocks_of(inode, &mut node, findings)?;
        for run in &blocks.runs {
            self.claim(run.start..run.start + run.length, &place)?;
        }
        Ok(blocks)
    }

    pub(super) fn run(&mut self) -> Result<(), Fault> {
        let root = self.load(ROOT_INODE)?;
        if root.inode.file_type != FileType::Directory {
            return Err(damage(
                "inode 2",
                "type of the root",
                "a directory",
                format!("{:?}", root.inode.file_type),
            ));
        }
        self.tree.node_mut(NodeId::ROOT).attributes = root.attributes;
        self.meet(&root.inode, Some(NodeId::ROOT), ROOT_INODE, b"");
        let mut stack = vec![(root.inode, root.inline, NodeId::ROOT)];
        while let Some((inode, inline, node)) = stack.pop() {
            let before = self.findings.count();
            let read = self.directory(&inode, inline, node, &mut stack);
            let read = read.map_err(|fault| fault.locate(&self.path_of(inode.number)));
            self.findings.tolerate(read)?;
            if self.findings.count() > before {
                let path = self.path_of(inode.number);
                self.findings.locate(before, &path);
            }
        }
        Ok(())
    }

    fn meet(&mut self, inode: &Inode, node: Option<NodeId>, parent: u32, name: &[u8]) {
        let is_directory = inode.file_type == FileType::Directory;
        let above = self.met.get(&parent).map_or(0, |met| met.path_length);
        let met = Met {
            path_length: above + 1 + name.len(),
            node,
            is_directory,
            links: inode.links,
            counted: if is_directory { 2 } else { 1 },
            parent,
            name: if is_directory { name.into() } else { Box::default() },
        };
        self.met.insert(inode.number, met);
    }

    /// The path of a directory that was met.
    pub(super) fn path_of(&self, mut number: u32) -> String {
        let mut path = String::new();
        while let Some(met) =
            self.met.get(&number).filter(|_| number != ROOT_INODE && path.len() < MAX_SHOWN_PATH)
        {
            path = format!("/{}{path}", String::from_utf8_lossy(&met.name));
            number = met.parent;
        }
        if path.is_empty() { "/".to_owned() } else { path }
    }

    fn directory(
        &mut self,
        inode: &Inode,
        inline: Option<(usize, usize)>,
        node: NodeId,
        stack: &mut Vec<Pending>,
    ) -> Result<(), Fault> {
        let place = format!("directory inode {}", inode.number);
        let parent = self.met.get(&inode.number).map_or(ROOT_INODE, |met| met.parent);
        if inode.has_inline_data() {
            let root = inode.root();
            self.findings.expect(&place, "inode of ..", parent, le32(&root, 0))?;
            let second = inline.map_or(&[][..], |(at, length)| &inode.raw[at..at + length]);
            for part in [&root[4..], second] {
                for entry in self.fs.entries(part, &place)? {
                    self.entry(entry, node, inode.number, stack)?;
                }
            }
            return Ok(());
        }
        let blocks = self.claim_blocks_of(inode)?;
        self.check_allocation(inode, blocks.count())?;
        let block_size = self.fs.block_size();
        let count = inode.size / block_size;
        let mapped: u64 = blocks.runs.iter().map(|run| run.length).sum();
        let end = blocks.runs.last().map_or(0, |run| run.logical + run.length);
        if count == 0 || !inode.size.is_multiple_of(block_size) || mapped != count || end != count {
            let got = format!("{} bytes in {mapped} blocks", inode.size);
            return Err(damage(
                place,
                "size",
                format!("as many bytes as its blocks have, at least {block_size}"),
                got,
            ));
        }
        let fs = self.fs;
        let mut block = |number: u64| {
            let index = blocks.runs.partition_point(|run| run.logical + run.length <= number);
            let run = &blocks.runs[index.min(blocks.runs.len() - 1)];
            fs.block(&place, run.start + number.saturating_sub(run.logical))
        };
        let hash_tree = match inode.is_indexed() && self.thorough {
            true => {
                let read = HashTree::read(fs, inode, count, &mut block, self.findings);
                self.findings.tolerate(read)?
            }
            false => None,
        };
        for number in 0..count {
            let bytes = block(number)?;
            let place = format!("{place}, block {number}");
            // The inner blocks of an index, which have checksums of another kind, begin with an entry over all of it.
            let is_inner = inode.is_indexed()
                && (number == 0
                    || le32(&bytes, 0) == 0 && usize::from(super::bytes::le16(&bytes, 4)) == bytes.len());
            let is_leaf = hash_tree.as_ref().map_or(!is_inner, |tree| tree.is_leaf(number));
            if is_leaf {
                fs.check_leaf(inode, &bytes, &place, self.findings)?;
            }
            let read = fs.entries(&bytes, &place);
            let Some(entries) = self.findings.tolerate(read)? else { continue };
            let mut entries = &entries[..];
            if number == 0 {
                for (name, expected) in [(&b"."[..], inode.number), (b"..", parent)] {
                    let got = match entries.split_first() {
                        Some((first, rest)) if first.name == name => {
                            entries = rest;
                            first.inode.to_string()
                        }
                        _ => "another name".to_owned(),
                    };
                    let what = format!("inode of {}", String::from_utf8_lossy(name));
                    self.findings.expect(&place, what, expected.to_string(), got)?;
                }
            }
            for &entry in entries {
                if let Some((expected, got)) =
                    hash_tree.as_ref().and_then(|tree| tree.misplaced(number, entry.name))
                {
                    let what = format!("hash of the name {:?}", String::from_utf8_lossy(entry.name));
                    self.findings.report(Finding::new(&place, what, expected, got))?;
                }
                self.entry(entry, node, inode.number, stack)?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        entry: super::directory::Entry<'_>,
        directory: NodeId,
        parent: u32,
        stack: &mut Vec<Pending>,
    ) -> Result<(), Fault> {
        let super::directory::Entry { name, inode: number, file_type } = entry;
        let shown = || format!("entry {:?}", String::from_utf8_lossy(name));
        if matches!(name, b"." | b"..") {
            return self.findings.report(Finding::new(
                shown(),
                "place",
                "at the start of the directory",
                "elsewhere",
            ));
        }
        if self.tree.child(directory, name).is_some() {
            return self.findings.report(Finding::new(shown(), "names", "one of each", "a second one"));
        }
        let special = number < self.fs.superblock.raw.first_inode && number != ROOT_INODE;
        if special || number > self.fs.superblock.inodes {
            let (from, to) = (self.fs.superblock.raw.first_inode, self.fs.superblock.inodes);
            return self.findings.report(Finding::new(shown(), "inode", format!("{from} to {to}"), number));
        }
        let code = match self.met.get_mut(&number) {
            Some(met) if met.is_directory => {
                return self.findings.report(Finding::new(shown(), "names of a directory", 1, 2));
            }
            Some(met) => {
                met.counted += 1;
                let Some(node) = met.node else { return Ok(()) };
                self.tree.link(directory, name, node, 0);
                code_of(&self.tree.node(node).content)
            }
            None => {
                let before = self.findings.count();
                let loaded = self.load(number).map_err(|fault| fault.locate(&shown()));
                let loaded = self.findings.tolerate(loaded)?;
                self.findings.locate(before, &shown());
                let Some(Loaded { inode, attributes, content, inline }) = loaded else { return Ok(()) };
                let code = inode.file_type.code();
                let is_directory = inode.file_type == FileType::Directory;
                let node = content.map(|content| {
                    let node = self.tree.add(Node { attributes, content });
                    self.numbers.push(number);
                    self.tree.link(directory, name, node, 0);
                    node
                });
                self.dropped_sockets += u64::from(node.is_none());
                self.meet(&inode, node, parent, name);
                if let Some(node) = node.filter(|_| is_directory) {
                    if self.met.get(&number).is_some_and(|met| met.path_length > MAX_PATH) {
                        let reason =
                            format!("its path is longer than {MAX_PATH} bytes, which no program can name");
                        return Err(Fault::unsupported(shown(), reason));
                    }
                    if let Some(above) = self.met.get_mut(&parent) {
                        above.counted += 1;
                    }
                    stack.push((inode, inline, node));
                }
                code
            }
        };
        if file_type != 0 {
            self.findings.expect(shown(), "type in the directory", code, file_type)?;
        }
        Ok(())
    }

    /// Reads an inode with what hangs on it, but for the names in a directory.
    fn load(&mut self, number: u32) -> Result<Loaded, Fault> {
        let fs = self.fs;
        let inode = fs.inode(number, self.findings)?;
        if inode.links == 0 {
            self.findings.report(Finding::new(inode.place(), "names", "at least 1", "0: it is deleted"))?;
        }
        let Stored { mut xattrs, inline_data } = fs.inode_xattrs(&inode, self.findings)?;
        if inode.xattr_block() != 0 {
            let read = self.block_xattrs(&inode);
            xattrs.extend(self.findings.tolerate(read)?.unwrap_or_default());
        }
        xattrs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = xattrs.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let what = format!("attribute {}", String::from_utf8_lossy(&pair[0].name));
            self.findings.report(Finding::new(inode.place(), what, "once", "twice"))?;
            xattrs.dedup_by(|a, b| a.name == b.name);
        }
        let attributes = Attributes {
            mode: inode.permissions(),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: inode.mtime(),
            xattrs: xattrs.into(),
        };
        let room = ROOT_SIZE as u64 + inline_data.map_or(0, |(_, length)| length as u64);
        if inode.has_inline_data() && inode.size > room {
            return Err(damage(inode.place(), "size of inline data", format!("at most {room}"), inode.size));
        }
        let content = match inode.file_type {
            FileType::Directory => Some(Content::Directory(Directory::default())),
            FileType::File => Some(self.file(&inode, inline_data)?),
            FileType::Symlink => Some(Content::Symlink(self.symlink(&inode, inline_data)?.into())),
            FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => {
                let (major, minor) = inode.device();
                self.check_allocation(&inode, 0)?;
                match inode.file_type {
                    FileType::CharDevice => Some(Content::CharDevice { major, minor }),
                    FileType::BlockDevice => Some(Content::BlockDevice { major, minor }),
                    FileType::Fifo => Some(Content::Fifo),
                    _ => None,
                }
            }
        };
        Ok(Loaded { inode, attributes, content, inline: inline_data })
    }

    fn block_xattrs(&mut self, inode: &Inode) -> Result<Vec<Xattr>, Fault> {
        let number = inode.xattr_block();
        if let Some(shared) = self.shared.get_mut(&number) {
            shared.counted += 1;
            return Ok(shared.xattrs.clone());
        }
        let place = inode.place();
        self.claim(number..number.saturating_add(1), &place)?;
        let (xattrs, said) = self.fs.block_xattrs(number, &place, self.findings)?;
        // Kept only where others will ask for it.
        let kept = if said > 1 { xattrs.clone() } else { Vec::new() };
        self.shared.insert(number, SharedXattrs { xattrs: kept, said, counted: 1 });
        Ok(xattrs)
    }

    fn file(&mut self, inode: &Inode, inline: Option<(usize, usize)>) -> Result<Content, Fault> {
        let size = inode.size;
        let place = |offset| Place { source: 0, offset };
        let mut runs: Vec<Run> = Vec::new();
        if inode.has_inline_data() {
            let parts = [(BLOCK_AT, ROOT_SIZE), inline.unwrap_or((0, 0))];
            let mut start = 0;
            for (at, length) in parts {
                let length = (length as u64).min(size - start);
                if length > 0 {
                    runs.push(Run { start, length, place: place(inode.offset + at as u64) });
                }
                start += length;
            }
            self.check_allocation(inode, 0)?;
            return Ok(Content::File { size, data: FileData::Sparse(runs.into()) });
        }
        let blocks = self.claim_blocks_of(inode)?;
        self.check_allocation(inode, blocks.count())?;
        let block_size = self.fs.block_size();
        for run in blocks.runs.iter().filter(|run| run.written) {
            let start = run.logical * block_size;
            let length = (run.length * block_size).min(size.saturating_sub(start));
            if self.thorough && size < start + (run.length - 1) * block_size {
                let expected = format!("at least {}", start + (run.length - 1) * block_size);
                self.findings.report(Finding::new(inode.place(), "size of the file", expected, size))?;
            }
            if length > 0 {
                runs.push(Run { start, length, place: place(run.start * block_size) });
            }
        }
        let data = match runs[..] {
            [Run { start: 0, length, place }] if length == size => FileData::Whole(place),
            _ => FileData::Sparse(runs.into()),
        };
        Ok(Content::File { size, data })
    }

    fn symlink(&mut self, inode: &Inode, inline: Option<(usize, usize)>) -> Result<Vec<u8>, Fault> {
        let block_size = self.fs.block_size();
        if inode.size == 0 || inode.size >= block_size {
            let expected = format!("1 to {}", block_size - 1);
            return Err(damage(inode.place(), "length of the link's target", expected, inode.size));
        }
        let length = inode.size as usize;
        let mut target = if inode.has_inline_data() {
            let second = inline.map_or(&[][..], |(at, length)| &inode.raw[at..at + length]);
            self.check_allocation(inode, 0)?;
            [&inode.root(), second].concat()
        } else if inode.is_fast_symlink(block_size) {
            self.check_allocation(inode, 0)?;
            inode.root().to_vec()
        } else {
            let blocks = self.claim_blocks_of(inode)?;
            self.check_allocation(inode, blocks.count())?;
            match blocks.runs[..] {
                [run] if run.logical == 0 && run.length == 1 && run.written => {
                    self.fs.block(&inode.place(), run.start)?
                }
                _ => return Err(damage(inode.place(), "blocks of a link", 1, blocks.runs.len())),
            }
        };
        target.truncate(length);
        if target.contains(&0) {
            return Err(damage(inode.place(), "target of the link", "no NUL", "one"));
        }
        Ok(target)
    }

    /// That the inode counts the blocks that it has.
    pub(super) fn check_allocation(&mut self, inode: &Inode, blocks: u64) -> Result<(), Fault> {
        if !self.thorough {
            return Ok(());
        }
        let block_size = self.fs.block_size();
        let blocks = blocks + u64::from(inode.xattr_block() != 0);
        let got = inode.allocated(block_size);
        self.findings.expect(inode.place(), "bytes on the disk", blocks * block_size, got)
    }
}

struct Loaded {
    inode: Inode,
    attributes: Attributes,
    content: Option<Content>,
    /// Where the second part of inline data is.
    inline: Option<(usize, usize)>,
}

fn claim(claimed: &mut Intervals, blocks: Range<u64>, owner: &str) -> Result<(), Fault> {
    claimed
        .insert(blocks)
        .map_err(|block| damage(owner, format!("owners of block {block}"), 1, "another one, too"))
}

fn code_of(content: &Content) -> u8 {
    match content {
        Content::File { .. } => FileType::File,
        Content::Directory(_) => FileType::Directory,
        Content::Symlink(_) => FileType::Symlink,
        Content::CharDevice { .. } => FileType::CharDevice,
        Content::BlockDevice { .. } => FileType::BlockDevice,
        Content::Fifo => FileType::Fifo,
    }
    .code()
}
