//! A file system before it is written: names and metadata. File data stays where it is, and is named by its [`Place`].

use std::collections::BTreeMap;

pub use oci::layer::Timestamp;
use oci::{Digest, Hasher};

/// The deepest nesting of directories. A path that the kernel takes has at most 2048 components; entries below symbolic
/// links could go deeper, to where no program can follow.
const MAX_DEPTH: usize = 2048;

/// Symbolic links followed on the way to one directory at the most, as in the kernel.
const MAX_LINKS_FOLLOWED: usize = 40;

/// A node of a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// Its place in a list with one element for each node.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What an inode holds.
#[derive(Clone, Debug)]
pub struct Node {
    /// Owner, mode, time, extended attributes.
    pub attributes: Attributes,
    /// Its type, with what belongs to it.
    pub content: Content,
}

/// What every inode has.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the contents.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name.
    pub xattrs: Box<[Xattr]>,
}

impl Attributes {
    /// A directory that no layer describes.
    pub fn implied_directory() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// An extended attribute with its full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// As `security.capability`.
    pub name: Box<[u8]>,
    /// As the system calls have it.
    pub value: Box<[u8]>,
}

/// The type of an inode, with what belongs to it.
#[derive(Clone, Debug)]
pub enum Content {
    /// A directory with its names. An empty one is `Content::Directory(Default::default())`.
    Directory(Directory),
    /// A regular file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Where its bytes are.
        data: FileData,
    },
    /// A symbolic link with its target.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDevice {
        /// Major number, at most 4095.
        major: u32,
        /// Minor number, at most 1,048,575.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number, at most 4095.
        major: u32,
        /// Minor number, at most 1,048,575.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// The names in a directory.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    names: BTreeMap<Box<[u8]>, Name>,
}

impl Directory {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// What `name` stands for.
    pub fn get(&self, name: &[u8]) -> Option<Name> {
        self.names.get(name).copied()
    }

    /// All of them, sorted by their bytes.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], Name)> + Clone {
        self.names.iter().map(|(name, target)| (&name[..], *target))
    }

    /// What the names stand for, in their order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Name> + Clone {
        self.names.values().copied()
    }
}

/// Where the bytes of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileData {
    /// All of them, one behind the other.
    Whole(Place),
    /// Only some, in ascending runs that do not touch. The rest is zeros; whole blocks of them stay holes.
    Sparse(Box<[Run]>),
}

impl FileData {
    /// The runs of a file of `size` bytes.
    pub fn runs(&self, size: u64) -> impl Iterator<Item = Run> + Clone {
        let (whole, sparse) = match self {
            Self::Whole(place) => {
                ((size > 0).then_some(Run { start: 0, length: size, place: *place }), &[][..])
            }
            Self::Sparse(runs) => (None, &runs[..]),
        };
        whole.into_iter().chain(sparse.iter().copied())
    }
}

/// Bytes of a file that are one behind the other in their source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where they begin in the file.
    pub start: u64,
    /// How many, at least one.
    pub length: u64,
    /// Where they are.
    pub place: Place,
}

/// A byte of a source: of the uncompressed tar stream of a layer, of a file of a folder, of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which source.
    pub source: u32,
    /// Which byte of it.
    pub offset: u64,
}

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// The inode.
    pub node: NodeId,
    /// The last layer that had an entry for it. Whiteouts spare what their own layer brought.
    pub layer: u32,
}

/// Why a path leads to no directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResolveError {
    /// A name on the way is a file.
    NotADirectory,
    /// More symbolic links than the kernel follows, or a loop of them.
    TooManyLinks,
    /// Deeper than any path that the kernel takes.
    TooDeep,
}

/// All nodes of a file system. Several names of one node are hard links.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree with nothing but the root.
    pub fn new() -> Self {
        let content = Content::Directory(Directory::default());
        Self { nodes: vec![Node { attributes: Attributes::implied_directory(), content }] }
    }

    /// The node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node, to change it.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// More than any [`NodeId::index`]. Nodes that lost their last name still count.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there always is a root.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The names in a directory; `None` for other nodes.
    pub fn children(&self, id: NodeId) -> Option<&Directory> {
        match &self.node(id).content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Whether the node is a directory.
    pub fn is_directory(&self, id: NodeId) -> bool {
        self.children(id).is_some()
    }

    /// What `name` stands for in the directory.
    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<Name> {
        self.children(directory)?.get(name)
    }

    /// Adds a node without a name.
    pub fn add(&mut self, node: Node) -> NodeId {
        // Layers are bounded far below 2^32 entries (oci::layer::MAX_ENTRIES).
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        id
    }

    /// Gives a node a name in a directory; a node that had it before loses it. Names may be any bytes but NUL and `/`, at
    /// most 255 of them. `layer` matters to [`Tree::prune`] only.
    pub fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId, layer: u32) {
        if let Content::Directory(children) = &mut self.node_mut(directory).content {
            children.names.insert(name.into(), Name { node, layer });
        }
    }

    /// Takes a name away.
    pub fn unlink(&mut self, directory: NodeId, name: &[u8]) {
        if let Content::Directory(children) = &mut self.node_mut(directory).content {
            children.names.remove(name);
        }
    }

    /// The directory at `path`, symbolic links resolved as if the tree's root were `/`. Where a name is missing, the
    /// directory is made for `create` (a layer's number), or the answer is `None`.
    pub fn resolve(&mut self, path: &[u8], create: Option<u32>) -> Result<Option<NodeId>, ResolveError> {
        let mut reached = vec![NodeId::ROOT];
        let mut rest: Vec<Box<[u8]>> = path.rsplit(|&byte| byte == b'/').map(Box::from).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop() {
            let here = reached.last().copied().unwrap_or(NodeId::ROOT);
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    // The parent of the root is the root.
                    reached.truncate((reached.len() - 1).max(1));
                    continue;
                }
                _ if reached.len() > MAX_DEPTH => return Err(ResolveError::TooDeep),
                _ => {}
            }
            let child = match (self.child(here, &name), create) {
                (Some(child), _) => child.node,
                (None, None) => return Ok(None),
                (None, Some(layer)) => {
                    let child = self.add(Node {
                        attributes: Attributes::implied_directory(),
                        content: Content::Directory(Directory::default()),
                    });
                    self.link(here, &name, child, layer);
                    child
                }
            };
            match &self.node(child).content {
                Content::Directory(_) => reached.push(child),
                Content::Symlink(target) => {
                    followed += 1;
                    if followed > MAX_LINKS_FOLLOWED {
                        return Err(ResolveError::TooManyLinks);
                    }
                    if target.starts_with(b"/") {
                        reached.truncate(1);
                    }
                    rest.extend(target.rsplit(|&byte| byte == b'/').map(Box::from));
                }
                _ => return Err(ResolveError::NotADirectory),
            }
        }
        Ok(reached.last().copied())
    }

    /// Removes everything under `directory` that layers below `layer` brought. What `layer` itself brought stays, with
    /// the directories on the way to it.
    pub fn prune(&mut self, directory: NodeId, layer: u32) {
        // Parents come before their children, so the reverse order empties children first.
        let mut directories = vec![directory];
        let mut next = 0;
        while let Some(children) = directories.get(next).and_then(|&id| self.children(id)) {
            let below: Vec<NodeId> =
                children.values().map(|name| name.node).filter(|&id| self.is_directory(id)).collect();
            directories.extend(below);
            next += 1;
        }
        for id in directories.into_iter().rev() {
            // Taken out for the while, because the answer depends on other directories.
            let Content::Directory(children) = &mut self.node_mut(id).content else { continue };
            let mut children = std::mem::take(children);
            children.names.retain(|_, name| {
                name.layer == layer || self.children(name.node).is_some_and(|children| !children.is_empty())
            });
            self.node_mut(id).content = Content::Directory(children);
        }
    }

    /// A digest of names, metadata and sizes; of the data only where it has holes. It does not depend on the order in which
    /// nodes were added.
    pub fn fingerprint(&self) -> Digest {
        let mut hasher = Hasher::new();
        // Names of one inode are told by the number that its first name gave it.
        let mut numbers = vec![0u32; self.len()];
        let mut next = 1;
        let mut stack = vec![NodeId::ROOT];
        self.fingerprint_of(NodeId::ROOT, &mut hasher);
        while let Some(directory) = stack.pop() {
            let before = stack.len();
            for (name, child) in self.children(directory).into_iter().flat_map(Directory::iter) {
                let number = &mut numbers[child.node.index()];
                hasher.update(&(name.len() as u64).to_le_bytes());
                hasher.update(name);
                hasher.update(&number.to_le_bytes());
                if *number == 0 {
                    (*number, next) = (next, next + 1);
                    self.fingerprint_of(child.node, &mut hasher);
                    if self.is_directory(child.node) {
                        stack.push(child.node);
                    }
                }
            }
            stack[before..].reverse();
            // No name is that long.
            hasher.update(&u64::MAX.to_le_bytes());
        }
        hasher.finish().0
    }

    fn fingerprint_of(&self, id: NodeId, hasher: &mut Hasher) {
        let Node { attributes, content } = self.node(id);
        let Attributes { mode, uid, gid, mtime, xattrs } = attributes;
        let mut number = |value: u64| hasher.update(&value.to_le_bytes());
        [(*mode).into(), (*uid).into(), (*gid).into(), mtime.seconds as u64, mtime.nanoseconds.into()]
            .into_iter()
            .for_each(&mut number);
        match content {
            Content::Directory(_) => number(1),
            Content::File { size, data } => {
                [2, *size].into_iter().for_each(&mut number);
                data.runs(*size).flat_map(|run| [run.start, run.length]).for_each(&mut number);
                number(u64::MAX);
            }
            Content::Symlink(target) => [3, target.len() as u64].into_iter().for_each(&mut number),
            Content::CharDevice { major, minor } => {
                [4, (*major).into(), (*minor).into()].into_iter().for_each(&mut number);
            }
            Content::BlockDevice { major, minor } => {
                [5, (*major).into(), (*minor).into()].into_iter().for_each(&mut number);
            }
            Content::Fifo => number(6),
        }
        number(xattrs.len() as u64);
        if let Content::Symlink(target) = content {
            hasher.update(target);
        }
        for Xattr { name, value } in xattrs {
            for part in [name, value] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
    }

    /// A path of the node, for messages. Not fast.
    pub fn path_of(&self, wanted: NodeId) -> String {
        let mut stack = vec![(NodeId::ROOT, String::new())];
        while let Some((directory, path)) = stack.pop() {
            if directory == wanted {
                break;
            }
            for (name, child) in self.children(directory).into_iter().flat_map(Directory::iter) {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                if child.node == wanted {
                    return path;
                }
                if self.is_directory(child.node) {
                    stack.push((child.node, path));
                }
            }
        }
        "/".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symlink(tree: &mut Tree, name: &[u8], target: &[u8]) {
        let node =
            tree.add(Node { attributes: Attributes::default(), content: Content::Symlink(target.into()) });
        tree.link(NodeId::ROOT, name, node, 0);
    }

    #[test]
    fn resolving_never_leaves_the_root() {
        let mut tree = Tree::new();
        let usr_lib = tree.resolve(b"usr/lib", Some(0)).unwrap().unwrap();
        symlink(&mut tree, b"lib", b"usr/lib");
        symlink(&mut tree, b"up", b"../../../usr/./lib/../lib");
        symlink(&mut tree, b"absolute", b"/usr");
        symlink(&mut tree, b"loop", b"loop");
        symlink(&mut tree, b"out", b"../../etc");
        for path in [&b"lib"[..], b"up", b"absolute/lib", b"usr//lib"] {
            assert_eq!(tree.resolve(path, None), Ok(Some(usr_lib)), "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(tree.resolve(b"loop/x", None), Err(ResolveError::TooManyLinks));
        assert_eq!(tree.resolve(b"out", None), Ok(None));
        let made = tree.resolve(b"out", Some(1)).unwrap().unwrap();
        assert_eq!(tree.path_of(made), "/etc", "made inside the root");
    }

    #[test]
    fn depth_is_bounded() {
        let mut tree = Tree::new();
        let deep = "a/".repeat(MAX_DEPTH + 1);
        assert_eq!(tree.resolve(deep.as_bytes(), Some(0)), Err(ResolveError::TooDeep));
    }

    #[test]
    fn pruning_spares_the_layers_own_entries() {
        let mut tree = Tree::new();
        tree.resolve(b"a/old/older", Some(0)).unwrap();
        tree.resolve(b"a/mixed/old", Some(0)).unwrap();
        tree.resolve(b"a/mixed/new", Some(1)).unwrap();
        let a = tree.resolve(b"a", None).unwrap().unwrap();
        tree.prune(a, 1);
        assert_eq!(tree.resolve(b"a/old", None), Ok(None));
        assert_eq!(tree.resolve(b"a/mixed/old", None), Ok(None));
        assert!(tree.resolve(b"a/mixed/new", None).unwrap().is_some());
    }
}
