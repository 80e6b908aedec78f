//! What one tree has over another, as the layer of an overlay.
//!
//! A step's layer on a large image becomes a small disk of its own: what is new or different, and whiteouts (character
//! devices 0:0) for what is gone. Directories that both have are merged by the overlay, so none is opaque.

use std::collections::{HashMap, HashSet};

use rootfs_tools::{Attributes, Content, Node, NodeId, Tree};

/// The layer that makes `new` of `old`. Places of data are those of `new`, and those of `old` the same ones.
pub(super) fn delta(old: &Tree, new: &Tree) -> Tree {
    let mut changed = HashSet::new();
    for pair in Pairs::new(old, new) {
        for (name, child) in pair.names(new) {
            let before = pair.old.and_then(|old_directory| old.child(old_directory, name));
            let same = before.is_some_and(|before| is_same(old.node(before.node), new.node(child)));
            if !new.is_directory(child) && !same {
                // With all of its names: links lead only within a layer.
                changed.insert(child.index());
            }
        }
    }
    let mut layer = Layer { out: Tree::new(), nodes: HashMap::new(), made: Vec::new() };
    layer.out.node_mut(NodeId::ROOT).attributes = new.node(NodeId::ROOT).attributes.clone();
    layer.nodes.insert(NodeId::ROOT.index(), NodeId::ROOT);
    for pair in Pairs::new(old, new) {
        let Some(&at) = layer.nodes.get(&pair.new.index()) else { continue };
        for (name, child) in pair.names(new) {
            if new.is_directory(child) {
                let before = pair.old.and_then(|directory| old.child(directory, name));
                let before = before.filter(|before| old.is_directory(before.node));
                let same = before.is_some_and(|before| {
                    is_alike(&old.node(before.node).attributes, &new.node(child).attributes)
                });
                layer.directory(at, name, child, &new.node(child).attributes, same);
            } else if changed.contains(&child.index()) {
                layer.other(at, name, child, new.node(child));
            }
        }
        let Some(before) = pair.old.and_then(|directory| old.children(directory)) else { continue };
        for (name, _) in before.iter().filter(|(name, _)| new.child(pair.new, name).is_none()) {
            let content = Content::CharDevice { major: 0, minor: 0 };
            let whiteout = layer.out.add(Node { attributes: Attributes::default(), content });
            layer.out.link(at, name, whiteout, 0);
        }
    }
    layer.finish()
}

/// Directories of the new tree, each with the old tree's of that path, outer ones first.
struct Pairs<'a> {
    old: &'a Tree,
    new: &'a Tree,
    left: Vec<Pair>,
}

#[derive(Clone, Copy)]
struct Pair {
    old: Option<NodeId>,
    new: NodeId,
}

impl Pair {
    fn names(self, new: &Tree) -> impl Iterator<Item = (&[u8], NodeId)> {
        new.children(self.new)
            .into_iter()
            .flat_map(|names| names.iter())
            .map(|(name, child)| (name, child.node))
    }
}

impl<'a> Pairs<'a> {
    fn new(old: &'a Tree, new: &'a Tree) -> Self {
        Self { old, new, left: vec![Pair { old: Some(NodeId::ROOT), new: NodeId::ROOT }] }
    }
}

impl Iterator for Pairs<'_> {
    type Item = Pair;

    fn next(&mut self) -> Option<Pair> {
        let pair = self.left.pop()?;
        for (name, child) in pair.names(self.new) {
            if self.new.is_directory(child) {
                let old = pair.old.and_then(|directory| self.old.child(directory, name));
                let old = old.map(|old| old.node).filter(|old| self.old.is_directory(*old));
                self.left.push(Pair { old, new: child });
            }
        }
        Some(pair)
    }
}

/// The layer as it grows.
struct Layer {
    out: Tree,
    /// By the index of the new tree's node.
    nodes: HashMap<usize, NodeId>,
    /// Directories, and whether the layer needs them only for what is in them.
    made: Vec<(NodeId, Box<[u8]>, NodeId, bool)>,
}

impl Layer {
    fn directory(&mut self, at: NodeId, name: &[u8], of: NodeId, attributes: &Attributes, same: bool) {
        let content = Content::Directory(Default::default());
        let directory = self.out.add(Node { attributes: attributes.clone(), content });
        self.out.link(at, name, directory, 0);
        self.nodes.insert(of.index(), directory);
        self.made.push((at, name.into(), directory, same));
    }

    fn other(&mut self, at: NodeId, name: &[u8], of: NodeId, node: &Node) {
        let known = self.nodes.get(&of.index()).copied();
        let id = known.unwrap_or_else(|| self.out.add(node.clone()));
        self.nodes.insert(of.index(), id);
        self.out.link(at, name, id, 0);
    }

    /// Takes away the directories in which nothing is different, the inner ones first.
    fn finish(mut self) -> Tree {
        for (parent, name, directory, same) in self.made.iter().rev() {
            if *same && self.out.children(*directory).is_some_and(|names| names.is_empty()) {
                self.out.unlink(*parent, name);
            }
        }
        self.out
    }
}

fn is_same(old: &Node, new: &Node) -> bool {
    let content = match (&old.content, &new.content) {
        (Content::File { size: old_size, data: old }, Content::File { size, data }) => {
            // An empty file has no bytes, wherever they would be.
            old_size == size && (*size == 0 || old == data)
        }
        (Content::Symlink(old), Content::Symlink(new)) => old == new,
        (Content::CharDevice { major: a, minor: b }, Content::CharDevice { major, minor })
        | (Content::BlockDevice { major: a, minor: b }, Content::BlockDevice { major, minor }) => {
            (a, b) == (major, minor)
        }
        (Content::Fifo, Content::Fifo) => true,
        _ => false,
    };
    content && is_alike(&old.attributes, &new.attributes)
}

fn is_alike(old: &Attributes, new: &Attributes) -> bool {
    (old.mode, old.uid, old.gid, old.mtime, &old.xattrs)
        == (new.mode, new.uid, new.gid, new.mtime, &new.xattrs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rootfs_tools::{FileData, Place};

    fn tree(entries: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::new();
        let mut known: HashMap<String, NodeId> = HashMap::new();
        for (path, what) in entries {
            let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
            let parent = tree.resolve(folder.as_bytes(), Some(0)).unwrap().unwrap();
            if *what == "dir" {
                tree.resolve(path.as_bytes(), Some(0)).unwrap();
                continue;
            }
            let node = *known.entry((*what).to_owned()).or_insert_with(|| {
                let place =
                    Place { source: 0, offset: what.len() as u64 * 1000 + u64::from(what.as_bytes()[0]) };
                let content = Content::File { size: 1, data: FileData::Whole(place) };
                tree.add(Node { attributes: Attributes::default(), content })
            });
            tree.link(parent, name.as_bytes(), node, 0);
        }
        tree
    }

    fn shown(tree: &Tree) -> Vec<String> {
        let mut seen = Vec::new();
        let mut left = vec![(String::new(), NodeId::ROOT)];
        while let Some((path, directory)) = left.pop() {
            for (name, child) in tree.children(directory).unwrap().iter() {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                let kind = match &tree.node(child.node).content {
                    Content::Directory(_) => {
                        left.push((path.clone(), child.node));
                        "dir"
                    }
                    Content::CharDevice { .. } => "gone",
                    _ => "file",
                };
                seen.push(format!("{path} {kind}"));
            }
        }
        seen.sort();
        seen
    }

    #[test]
    fn a_layer_has_what_is_different_and_no_more() {
        let old =
            tree(&[("a/same", "x"), ("a/old", "y"), ("b/c/d", "z"), ("e", "w"), ("l1", "v"), ("f/g", "u")]);
        let new = tree(&[
            ("a/same", "x"),
            ("b/c/d", "z2"),
            ("e/inside", "t"),
            ("l1", "v"),
            ("l2", "v"),
            ("n", "dir"),
            ("f/g", "u"),
        ]);
        let layer = delta(&old, &new);
        let expected =
            ["/a dir", "/a/old gone", "/b dir", "/b/c dir", "/b/c/d file", "/e dir", "/e/inside file"];
        let mut expected: Vec<_> = expected.iter().map(|line| (*line).to_owned()).collect();
        expected.extend(["/l1 file".to_owned(), "/l2 file".to_owned(), "/n dir".to_owned()]);
        assert_eq!(shown(&layer), expected);
        // One inode for both names, though one of them was there before.
        let node = |name: &[u8]| layer.child(NodeId::ROOT, name).unwrap().node;
        assert_eq!(node(b"l1"), node(b"l2"));
        assert!(shown(&delta(&new, &new)).is_empty());
    }
}
