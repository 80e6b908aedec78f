//! What is at a path of a file system.

use std::collections::HashMap;

use serde::Serialize;

use crate::Error;
use crate::compare::type_of;
use crate::ext4::FileSystem;
use crate::tree::{Content, Node, NodeId, Tree};

/// An entry, as `ls` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its path; bytes that are not printable are escaped.
    pub path: String,
    /// directory, file, symlink, fifo, or a device with its number.
    #[serde(rename = "type")]
    pub kind: String,
    /// Permissions as `ls` writes them, with the type in front.
    pub permissions: String,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a file or of a link's target.
    pub size: u64,
    /// Bytes of it that are not holes.
    pub data: u64,
    /// Names of the inode in the file system.
    pub links: u32,
    /// Inode number.
    pub inode: u32,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// The target of a link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Names of its extended attributes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<String>,
}

/// Paths of a tree.
pub struct Names;

impl Names {
    /// A name for people: what is not printable is escaped, so that a name cannot steer a terminal.
    pub fn shown(bytes: &[u8]) -> String {
        let mut shown = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\\' => shown.push_str("\\\\"),
                    _ if character.is_control() => shown.extend(character.escape_default()),
                    _ => shown.push(character),
                }
            }
            shown.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
        }
        shown
    }

    /// What is at `path`; links on the way to it are followed inside the tree, it itself is not.
    pub(crate) fn find(tree: &mut Tree, path: &[u8]) -> Result<NodeId, Error> {
        let missing = |reason: &str| Error::Invalid { what: Self::shown(path), reason: reason.to_owned() };
        let trimmed: &[u8] = {
            let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
            &path[..end]
        };
        let (parent, name) = match trimmed.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&trimmed[..slash], &trimmed[slash + 1..]),
            None => (&b""[..], trimmed),
        };
        let is_name = !matches!(name, b"" | b"." | b"..");
        let resolved = tree.resolve(if is_name { parent } else { trimmed }, None);
        let directory = resolved.map_err(|error| missing(&format!("{error:?} on the way to it")))?;
        let directory = directory.ok_or_else(|| missing("it is not in the file system"))?;
        if !is_name {
            return Ok(directory);
        }
        let found = tree.child(directory, name).ok_or_else(|| missing("it is not in the file system"))?;
        Ok(found.node)
    }

    /// How many names each node has.
    pub(crate) fn counts(tree: &Tree) -> HashMap<usize, u32> {
        let mut counts = HashMap::new();
        let mut stack = vec![NodeId::ROOT];
        while let Some(directory) = stack.pop() {
            for child in tree.children(directory).into_iter().flat_map(|names| names.values()) {
                *counts.entry(child.node.index()).or_insert(0) += 1;
                if tree.is_directory(child.node) {
                    stack.push(child.node);
                    *counts.entry(directory.index()).or_insert(0) += 1;
                    *counts.entry(child.node.index()).or_insert(0) += 1;
                }
            }
        }
        *counts.entry(NodeId::ROOT.index()).or_insert(0) += 2;
        counts
    }
}

/// What is at `path`: the entry, or the entries of the directory; with `recursive`, everything below it too.
pub fn list(fs: &FileSystem, path: &[u8], recursive: bool) -> Result<Vec<Listed>, Error> {
    let contents = fs.tree()?;
    let mut tree = contents.tree;
    let start = Names::find(&mut tree, path)?;
    let counts = Names::counts(&tree);
    let entry = |path: &[u8], id: NodeId| {
        let links = counts.get(&id.index()).copied().unwrap_or(1);
        describe(Names::shown(path), tree.node(id), links, contents.numbers[id.index()])
    };
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    let base = match &path[..end] {
        trimmed if trimmed.is_empty() || trimmed.starts_with(b"/") => trimmed.to_vec(),
        trimmed => [b"/", trimmed].concat(),
    };
    if !tree.is_directory(start) {
        return Ok(vec![entry(&base, start)]);
    }
    let mut listed = Vec::new();
    let mut stack = vec![(base, start)];
    while let Some((path, directory)) = stack.pop() {
        let before = stack.len();
        for (name, child) in tree.children(directory).into_iter().flat_map(|names| names.iter()) {
            let path = [&path[..], b"/", name].concat();
            listed.push(entry(&path, child.node));
            if recursive && tree.is_directory(child.node) {
                stack.push((path, child.node));
            }
        }
        stack[before..].reverse();
    }
    Ok(listed)
}

fn describe(path: String, node: &Node, links: u32, inode: u32) -> Listed {
    let attributes = &node.attributes;
    let (letter, size, data, target) = match &node.content {
        Content::Directory(_) => ('d', 0, 0, None),
        Content::File { size, data } => ('-', *size, data.runs(*size).map(|run| run.length).sum(), None),
        Content::Symlink(target) => ('l', target.len() as u64, 0, Some(Names::shown(target))),
        Content::CharDevice { .. } => ('c', 0, 0, None),
        Content::BlockDevice { .. } => ('b', 0, 0, None),
        Content::Fifo => ('p', 0, 0, None),
    };
    Listed {
        path,
        kind: type_of(&node.content),
        permissions: permissions(letter, attributes.mode),
        mode: attributes.mode,
        uid: attributes.uid,
        gid: attributes.gid,
        size,
        data,
        links,
        inode,
        mtime: (attributes.mtime.seconds, attributes.mtime.nanoseconds),
        target,
        xattrs: attributes.xattrs.iter().map(|xattr| Names::shown(&xattr.name)).collect(),
    }
}

/// As `ls -l` writes them.
fn permissions(letter: char, mode: u16) -> String {
    let mut text = String::from(letter);
    for (shift, special, set) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => set,
            (true, false) => set.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_those_of_ls() {
        assert_eq!(permissions('-', 0o4755), "-rwsr-xr-x");
        assert_eq!(permissions('d', 0o1776), "drwxrwxrwT");
        assert_eq!(permissions('-', 0o2640), "-rw-r-S---");
    }

    #[test]
    fn names_cannot_steer_a_terminal() {
        assert_eq!(Names::shown(b"a\x1b[2J\xff\\\xc3\xa9"), "a\\u{1b}[2J\\xff\\\\\u{e9}");
    }
}
