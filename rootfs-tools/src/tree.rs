//! A file system before it is written: names and metadata. File data stays where it is, and is named by its [`Place`].

use std::collections::BTreeMap;

use oci::layer::Timestamp;

/// The deepest nesting of directories. A path that the kernel takes has at most 2048 components; entries below symbolic
/// links could go deeper, to where no program can follow.
const MAX_DEPTH: usize = 2048;

/// Symbolic links followed on the way to one directory at the most, as in the kernel.
const MAX_LINKS_FOLLOWED: usize = 40;

/// A node of a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub(crate) const ROOT: Self = Self(0);

    /// Its place in a list with one element for each node.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What an inode holds.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) content: Content,
}

/// What every inode has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes {
    /// Permission bits with setuid, setgid and sticky; no file type.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Sorted by name.
    pub(crate) xattrs: Box<[Xattr]>,
}

impl Attributes {
    /// A directory that no layer describes.
    pub(crate) fn implied_directory() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// An extended attribute with its full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) name: Box<[u8]>,
    pub(crate) value: Box<[u8]>,
}

/// The type of an inode, with what belongs to it.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Directory(BTreeMap<Box<[u8]>, Name>),
    File { size: u64, data: FileData },
    Symlink(Box<[u8]>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// Where the bytes of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FileData {
    /// All of them, one behind the other.
    Whole(Place),
    /// Only some, in ascending runs that do not touch. The rest is zeros; whole blocks of them stay holes.
    Sparse(Box<[Run]>),
}

impl FileData {
    /// The runs of a file of `size` bytes.
    pub(crate) fn runs(&self, size: u64) -> impl Iterator<Item = Run> + Clone {
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
pub(crate) struct Run {
    /// Where they begin in the file.
    pub(crate) start: u64,
    /// How many, at least one.
    pub(crate) length: u64,
    /// Where they are.
    pub(crate) place: Place,
}

/// A byte of a source: of the uncompressed tar stream of a layer, of a file of a folder, of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Which source.
    pub(crate) source: u32,
    /// Which byte of it.
    pub(crate) offset: u64,
}

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    pub(crate) node: NodeId,
    /// The last layer that had an entry for it. Whiteouts spare what their own layer brought.
    pub(crate) layer: u32,
}

/// Why a path leads to no directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResolveError {
    NotADirectory,
    TooManyLinks,
    TooDeep,
}

/// All nodes of a file system. Several names of one node are hard links.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree with nothing but the root.
    pub(crate) fn new() -> Self {
        let content = Content::Directory(BTreeMap::new());
        Self { nodes: vec![Node { attributes: Attributes::implied_directory(), content }] }
    }

    /// The node.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node, to change it.
    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// An upper bound of [`NodeId::index`]. Nodes that lost their last name still count.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The names in a directory; `None` for other nodes.
    pub(crate) fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Name>> {
        match &self.node(id).content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Whether the node is a directory.
    pub(crate) fn is_directory(&self, id: NodeId) -> bool {
        self.children(id).is_some()
    }

    /// What `name` stands for in the directory.
    pub(crate) fn child(&self, directory: NodeId, name: &[u8]) -> Option<Name> {
        self.children(directory)?.get(name).copied()
    }

    /// Adds a node without a name.
    pub(crate) fn add(&mut self, node: Node) -> NodeId {
        // Layers are bounded far below 2^32 entries (oci::layer::MAX_ENTRIES).
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        id
    }

    /// Gives a node a name; one that had it before loses it.
    pub(crate) fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId, layer: u32) {
        if let Content::Directory(children) = &mut self.node_mut(directory).content {
            children.insert(name.into(), Name { node, layer });
        }
    }

    /// Takes a name away.
    pub(crate) fn unlink(&mut self, directory: NodeId, name: &[u8]) {
        if let Content::Directory(children) = &mut self.node_mut(directory).content {
            children.remove(name);
        }
    }

    /// The directory at `path`, symbolic links resolved as if the tree's root were `/`. Where a name is missing, the
    /// directory is made for `create` (a layer's number), or the answer is `None`.
    pub(crate) fn resolve(
        &mut self,
        path: &[u8],
        create: Option<u32>,
    ) -> Result<Option<NodeId>, ResolveError> {
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
                        content: Content::Directory(BTreeMap::new()),
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
    pub(crate) fn prune(&mut self, directory: NodeId, layer: u32) {
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
            children.retain(|_, name| {
                name.layer == layer || self.children(name.node).is_some_and(|children| !children.is_empty())
            });
            self.node_mut(id).content = Content::Directory(children);
        }
    }

    /// A path of the node, for messages. Not fast.
    pub(crate) fn path_of(&self, wanted: NodeId) -> String {
        let mut stack = vec![(NodeId::ROOT, String::new())];
        while let Some((directory, path)) = stack.pop() {
            if directory == wanted {
                break;
            }
            for (name, child) in self.children(directory).into_iter().flatten() {
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
