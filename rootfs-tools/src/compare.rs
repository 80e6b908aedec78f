//! Two trees by path: what is on one side only, and what differs about what is on both.

use std::collections::HashMap;

use oci::{Digest, Hasher};
use serde::Serialize;

use crate::Error;
use crate::ext4::{LOST_FOUND, clamp_time};
use crate::format::DataSource;
use crate::list::Names;
use crate::source::Source;
use crate::tree::{Content, NodeId, Place, Run, Tree};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It is on the second side only.
    Added,
    /// It is on the first side only.
    Removed,
    /// It is on both, and not the same.
    Changed,
}

/// An entry that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Its path; bytes that are not printable are escaped.
    pub path: String,
    /// How it differs.
    pub change: Change,
    /// What about it: `mode: 644, 600`, the first side before the second.
    pub what: Vec<String>,
}

/// The differences between two sources, by path. Data is compared by its digest.
pub fn diff(first: &Source, second: &Source) -> Result<Vec<Difference>, Error> {
    let ((first_tree, mut first_data), (second_tree, mut second_data)) = (first.read()?, second.read()?);
    let found = trees((&first_tree, &mut first_data), (&second_tree, &mut second_data))?;
    first_data.finish()?;
    second_data.finish()?;
    Ok(found)
}

/// The differences between two trees.
pub(crate) fn trees(
    (first, first_data): (&Tree, &mut dyn DataSource),
    (second, second_data): (&Tree, &mut dyn DataSource),
) -> Result<Vec<Difference>, Error> {
    let mut walk = Walk { first, second, found: Vec::new(), pairs: HashMap::new(), data: Vec::new() };
    walk.run();
    let Walk { mut found, data, .. } = walk;
    let digests = |tree: &Tree, source: &mut dyn DataSource, nodes: Vec<NodeId>| digests(tree, source, nodes);
    let first = digests(first, first_data, data.iter().map(|(_, node, _)| *node).collect())?;
    let second = digests(second, second_data, data.iter().map(|(_, _, node)| *node).collect())?;
    for (path, one, other) in data {
        let (one, other) = (&first[&one.index()], &second[&other.index()]);
        if one != other {
            let what = vec![format!("contents: {one}, {other}")];
            found.push(Difference { path: shown(&path), change: Change::Changed, what });
        }
    }
    found.sort_by(|a, b| (&a.path, a.change as u8).cmp(&(&b.path, b.change as u8)));
    // An entry whose metadata and contents differ is one entry.
    found.dedup_by(|later, earlier| {
        let same = later.path == earlier.path && later.change == earlier.change;
        if same {
            earlier.what.append(&mut later.what);
        }
        same
    });
    Ok(found)
}

struct Walk<'a> {
    first: &'a Tree,
    second: &'a Tree,
    found: Vec<Difference>,
    /// What was met on one side for each node of the other, from both sides.
    pairs: HashMap<(bool, usize), NodeId>,
    /// Files of the same size, to be read.
    data: Vec<(Vec<u8>, NodeId, NodeId)>,
}

impl Walk<'_> {
    fn run(&mut self) {
        let (first, second) = (self.first, self.second);
        self.pair(b"", NodeId::ROOT, NodeId::ROOT);
        let mut stack = vec![(Vec::new(), NodeId::ROOT, NodeId::ROOT)];
        while let Some((path, one, other)) = stack.pop() {
            let (Some(ones), Some(others)) = (first.children(one), second.children(other)) else { continue };
            for (name, child) in ones.iter() {
                let path = [&path[..], b"/", name].concat();
                match others.get(name) {
                    Some(twin) => {
                        if self.pair(&path, child.node, twin.node) {
                            stack.push((path, child.node, twin.node));
                        }
                    }
                    None => self.only(first, path, child.node, Change::Removed),
                }
            }
            for (name, child) in others.iter().filter(|(name, _)| ones.get(name).is_none()) {
                self.only(second, [&path[..], b"/", name].concat(), child.node, Change::Added);
            }
        }
    }

    fn only(&mut self, tree: &Tree, path: Vec<u8>, node: NodeId, change: Change) {
        // Every ext4 has the folder, and no layer.
        let is_lost_found = path[1..] == *LOST_FOUND;
        if is_lost_found && tree.children(node).is_some_and(|names| names.is_empty()) {
            return;
        }
        let mut stack = vec![(path, node)];
        while let Some((path, node)) = stack.pop() {
            for (name, child) in tree.children(node).into_iter().flat_map(|names| names.iter()) {
                stack.push(([&path[..], b"/", name].concat(), child.node));
            }
            let what = vec![type_of(&tree.node(node).content)];
            self.found.push(Difference { path: shown(&path), change, what });
        }
    }

    /// Compares two nodes of one path; whether both are directories.
    fn pair(&mut self, path: &[u8], one: NodeId, other: NodeId) -> bool {
        let (first, second) = (self.first.node(one), self.second.node(other));
        let mut what = Vec::new();
        let mut differ = |name: &str, one: String, other: String| {
            if one != other {
                what.push(format!("{name}: {one}, {other}"));
            }
        };
        let both_directories = self.first.is_directory(one) && self.second.is_directory(other);
        if !both_directories {
            // Two names of one inode must be two names of one inode on the other side.
            let forth = *self.pairs.entry((true, one.index())).or_insert(other);
            let back = *self.pairs.entry((false, other.index())).or_insert(one);
            let linked = |same| if same { "the same file as before" } else { "another file" }.to_owned();
            if forth != other || back != one {
                differ("hard links", linked(back == one), linked(forth == other));
            }
        }
        let (a, b) = (&first.attributes, &second.attributes);
        differ("mode", format!("{:o}", a.mode), format!("{:o}", b.mode));
        differ("owner", format!("{}:{}", a.uid, a.gid), format!("{}:{}", b.uid, b.gid));
        let time = |time| {
            let time = clamp_time(time);
            format!("{}.{:09}", time.seconds, time.nanoseconds)
        };
        differ("time", time(a.mtime), time(b.mtime));
        for name in a.xattrs.iter().chain(&b.xattrs).map(|xattr| &xattr.name) {
            let value = |xattrs: &[crate::Xattr]| {
                xattrs.iter().find(|xattr| xattr.name == *name).map_or("none".to_owned(), |xattr| {
                    format!("{} bytes {}", xattr.value.len(), Hasher::digest_of(&xattr.value))
                })
            };
            let (one, other) = (value(&a.xattrs), value(&b.xattrs));
            let seen = format!("attribute {}: {one}, {other}", shown(name));
            if one != other && !what.contains(&seen) {
                what.push(seen);
            }
        }
        let mut differ = |name: &str, one: String, other: String| {
            if one != other {
                what.push(format!("{name}: {one}, {other}"));
            }
        };
        match (&first.content, &second.content) {
            (Content::File { size: a, .. }, Content::File { size: b, .. }) if a == b => {
                if *a > 0 {
                    self.data.push((path.to_vec(), one, other));
                }
            }
            (Content::File { size: a, .. }, Content::File { size: b, .. }) => {
                differ("size", a.to_string(), b.to_string())
            }
            (Content::Symlink(a), Content::Symlink(b)) => differ("target", shown(a), shown(b)),
            (a, b) => differ("type", type_of(a), type_of(b)),
        }
        if !what.is_empty() {
            let path = if path.is_empty() { &b"/"[..] } else { path };
            self.found.push(Difference { path: shown(path), change: Change::Changed, what });
        }
        both_directories
    }
}

/// A type, with the number of a device.
pub(crate) fn type_of(content: &Content) -> String {
    match content {
        Content::Directory(_) => "directory".to_owned(),
        Content::File { .. } => "file".to_owned(),
        Content::Symlink(_) => "symlink".to_owned(),
        Content::CharDevice { major, minor } => format!("character device {major}:{minor}"),
        Content::BlockDevice { major, minor } => format!("block device {major}:{minor}"),
        Content::Fifo => "fifo".to_owned(),
    }
}

/// Digests of files, in the order in which the source has their data.
fn digests(
    tree: &Tree,
    source: &mut dyn DataSource,
    mut nodes: Vec<NodeId>,
) -> Result<HashMap<usize, Digest>, Error> {
    let runs = |node: NodeId| -> (u64, Vec<Run>) {
        match &tree.node(node).content {
            Content::File { size, data } => (*size, data.runs(*size).collect()),
            _ => (0, Vec::new()),
        }
    };
    let place = |node: &NodeId| match &tree.node(*node).content {
        Content::File { size, data } => data.runs(*size).next().map(|run| run.place),
        _ => None,
    };
    nodes.sort_by_key(|node| (place(node), node.index()));
    nodes.dedup();
    let mut buffer = vec![0; BUFFER];
    let mut found = HashMap::new();
    for node in nodes {
        let (size, runs) = runs(node);
        let mut hasher = Hasher::new();
        let mut at = 0;
        for run in runs {
            zeros(&mut hasher, run.start - at);
            let mut done = 0;
            while done < run.length {
                let now = (run.length - done).min(BUFFER as u64) as usize;
                let place = Place { offset: run.place.offset + done, ..run.place };
                source.read(place, &mut buffer[..now])?;
                hasher.update(&buffer[..now]);
                done += now as u64;
            }
            at = run.start + run.length;
        }
        zeros(&mut hasher, size - at);
        found.insert(node.index(), hasher.finish().0);
    }
    Ok(found)
}

fn zeros(hasher: &mut Hasher, mut count: u64) {
    while count > 0 {
        let now = count.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..now as usize]);
        count -= now;
    }
}

fn shown(bytes: &[u8]) -> String {
    Names::shown(bytes)
}
