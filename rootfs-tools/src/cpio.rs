//! The "newc" cpio format, which the kernel unpacks into its initramfs (Documentation/driver-api/early-userspace/
//! buffer-format.rst).

use crate::Error;
use crate::format::{DataSource, Format, Prepared, Sink};
use crate::tree::{Content, NodeId, Tree};

/// The archive ends at a multiple of this, as GNU cpio's does.
const ARCHIVE_BLOCK: u64 = 512;

/// A header: the magic and 13 numbers of 8 hexadecimal digits.
const HEADER_SIZE: u64 = 110;

const TYPE_FIFO: u32 = 0o010_000;
const TYPE_CHAR_DEVICE: u32 = 0o020_000;
const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_BLOCK_DEVICE: u32 = 0o060_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;

const TRAILER: &[u8] = b"TRAILER!!!";

/// A cpio archive. The root directory itself has no entry in it: an initramfs has one already.
///
/// It holds no extended attributes, no fractions of seconds, no times before 1970 or after 2106 and no files of 4 GiB;
/// those are errors, but for times, which are cut to what it holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpio;

impl Format for Cpio {
    fn prepare<'a>(&self, tree: &'a mut Tree) -> Result<Box<dyn Prepared + 'a>, Error> {
        let tree: &Tree = tree;
        let mut archive =
            Archive { tree, entries: Vec::new(), links: vec![0; tree.len()], length: 0, inodes: 0, data: 0 };
        archive.directory(NodeId::ROOT, &[])?;
        // The kernel makes a file when it meets its first name, so that name is the one with the data.
        let mut seen = vec![0u32; tree.len()];
        for entry in &mut archive.entries {
            let known = &mut seen[entry.node.index()];
            (entry.is_first, entry.inode) = (*known == 0, *known);
            if entry.is_first {
                *known = archive.inodes + 1;
                entry.inode = *known;
                archive.inodes += 1;
            }
            let Content::File { size, data } = &tree.node(entry.node).content else { continue };
            if entry.is_first {
                archive.data += data.runs(*size).map(|run| run.length).sum::<u64>();
            }
        }
        // Files behind everything else and in the order in which their data comes.
        archive.entries.sort_by_key(|entry| match &tree.node(entry.node).content {
            Content::File { size, data } if *size > 0 => {
                (1, data.runs(*size).next().map(|run| run.place), !entry.is_first)
            }
            _ => (0, None, false),
        });
        archive.length = archive.measure();
        Ok(Box::new(archive))
    }
}

struct Entry {
    node: NodeId,
    path: Box<[u8]>,
    inode: u32,
    /// The name that comes with the data of its inode.
    is_first: bool,
}

struct Archive<'a> {
    tree: &'a Tree,
    entries: Vec<Entry>,
    /// Names of each node; of a directory, its subdirectories and 2.
    links: Vec<u32>,
    length: u64,
    inodes: u32,
    data: u64,
}

impl Archive<'_> {
    /// Lists what is in the directory and below it, in the order of the names.
    fn directory(&mut self, root: NodeId, root_path: &[u8]) -> Result<(), Error> {
        let tree = self.tree;
        let mut stack = vec![(root, Box::<[u8]>::from(root_path))];
        while let Some((node, path)) = stack.pop() {
            if node != root {
                self.check(node, &path)?;
                self.entries.push(Entry { node, path: path.clone(), inode: 0, is_first: false });
            }
            let Some(children) = tree.children(node) else {
                self.links[node.index()] += 1;
                continue;
            };
            if self.links[node.index()] > 0 {
                let path = format!("/{}", String::from_utf8_lossy(&path));
                return Err(Error::Unsupported { path, reason: "the directory has two names".to_owned() });
            }
            self.links[node.index()] =
                2 + children.iter().filter(|(_, child)| tree.is_directory(child.node)).count() as u32;
            let before = stack.len();
            for (name, child) in children.iter() {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                stack.push((child.node, [&path[..], separator, name].concat().into()));
            }
            stack[before..].reverse();
        }
        Ok(())
    }

    fn check(&self, node: NodeId, path: &[u8]) -> Result<(), Error> {
        let refuse = |reason: String| {
            Err(Error::Unsupported { path: format!("/{}", String::from_utf8_lossy(path)), reason })
        };
        let node = self.tree.node(node);
        if !node.attributes.xattrs.is_empty() {
            return refuse("a cpio archive holds no extended attributes".to_owned());
        }
        match node.content {
            Content::File { size, .. } if u32::try_from(size).is_err() => {
                refuse(format!("the file has {size} bytes, a cpio archive holds less than 4 GiB of each"))
            }
            _ => Ok(()),
        }
    }

    fn measure(&self) -> u64 {
        let entry = |name: &[u8], size: u64| {
            (HEADER_SIZE + name.len() as u64 + 1).next_multiple_of(4) + size.next_multiple_of(4)
        };
        let entries: u64 = self.entries.iter().map(|it| entry(&it.path, self.stored(it))).sum();
        (entries + entry(TRAILER, 0)).next_multiple_of(ARCHIVE_BLOCK)
    }

    /// Bytes behind the entry's header.
    fn stored(&self, entry: &Entry) -> u64 {
        match &self.tree.node(entry.node).content {
            Content::File { size, .. } if entry.is_first => *size,
            Content::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }

    fn header(&self, entry: &Entry, sink: &mut dyn Sink) -> Result<(), Error> {
        let node = self.tree.node(entry.node);
        let (kind, device) = match &node.content {
            Content::Directory(_) => (TYPE_DIRECTORY, (0, 0)),
            Content::File { .. } => (TYPE_FILE, (0, 0)),
            Content::Symlink(_) => (TYPE_SYMLINK, (0, 0)),
            Content::CharDevice { major, minor } => (TYPE_CHAR_DEVICE, (*major, *minor)),
            Content::BlockDevice { major, minor } => (TYPE_BLOCK_DEVICE, (*major, *minor)),
            Content::Fifo => (TYPE_FIFO, (0, 0)),
        };
        let attributes = &node.attributes;
        write_header(
            sink,
            &entry.path,
            [
                entry.inode,
                kind | u32::from(attributes.mode & 0o7777),
                attributes.uid,
                attributes.gid,
                self.links[entry.node.index()],
                attributes.mtime.seconds.clamp(0, u32::MAX.into()) as u32,
                // Checked when the entry was listed.
                self.stored(entry) as u32,
                0,
                0,
                device.0,
                device.1,
                entry.path.len() as u32 + 1,
                0,
            ],
        )
    }
}

impl Prepared for Archive<'_> {
    fn length(&self) -> u64 {
        self.length
    }

    fn entries(&self) -> u64 {
        self.inodes.into()
    }

    fn data(&self) -> u64 {
        self.data
    }

    fn write(
        &self,
        source: &mut dyn DataSource,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        for entry in &self.entries {
            self.header(entry, sink)?;
            let start = sink.position();
            match &self.tree.node(entry.node).content {
                Content::File { size, data } if entry.is_first => {
                    for run in data.runs(*size) {
                        sink.zeros_to(start + run.start)?;
                        let mut done = 0;
                        while done < run.length {
                            let room = sink.room(run.length - done)?;
                            let place = crate::tree::Place { offset: run.place.offset + done, ..run.place };
                            source.read(place, room)?;
                            let count = room.len();
                            sink.advance(count);
                            done += count as u64;
                        }
                    }
                    sink.zeros_to(start + size)?;
                }
                Content::Symlink(target) => sink.write(target)?,
                _ => {}
            }
            align(sink)?;
            progress(sink.position());
        }
        write_header(sink, TRAILER, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, TRAILER.len() as u32 + 1, 0])?;
        sink.zeros_to(self.length)?;
        progress(self.length);
        Ok(())
    }
}

fn write_header(sink: &mut dyn Sink, name: &[u8], fields: [u32; 13]) -> Result<(), Error> {
    let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
    sink.write(b"070701")?;
    sink.write(header.as_bytes())?;
    sink.write(name)?;
    sink.write(b"\0")?;
    align(sink)
}

fn align(sink: &mut dyn Sink) -> Result<(), Error> {
    sink.zeros_to(sink.position().next_multiple_of(4))
}
