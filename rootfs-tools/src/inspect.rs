//! What an image is made of, and what takes the space.

use std::collections::{BTreeMap, HashSet};

use oci::Image;
use oci::layer::{Change, Kind, LayerReader};
use serde::Serialize;

use crate::Error;
use crate::list::Names;
use crate::source::image_tree;
use crate::tree::{Content, NodeId, Tree};

/// Facts of an OCI image.
#[derive(Clone, Debug, Serialize)]
pub struct ImageFacts {
    /// Digest of the manifest.
    pub digest: String,
    /// The config, with all of its fields.
    pub config: serde_json::Value,
    /// Lowest first.
    pub layers: Vec<LayerFacts>,
    /// Files, directories and others that are left when the layers are stacked.
    pub entries: u64,
    /// What takes the space in the end.
    pub largest: Sizes,
    /// The largest files that layers bring and later layers hide.
    pub lost: Vec<LostFile>,
}

/// Facts of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerFacts {
    /// Digest of the blob.
    pub digest: String,
    /// Digest of the tar stream.
    pub diff_id: String,
    /// As in the manifest.
    pub media_type: String,
    /// Bytes of the blob.
    pub size: u64,
    /// Entries, whiteouts among them.
    pub entries: u64,
    /// Entries that hide something of the layers below.
    pub whiteouts: u64,
    /// Bytes of file data.
    pub data: u64,
    /// Bytes of it that later layers hide, or that one of its own entries replaces.
    pub lost: u64,
}

/// A file that an image carries for nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostFile {
    /// Its path; bytes that are not printable are escaped.
    pub path: String,
    /// Bytes of data.
    pub size: u64,
    /// The layer that brings it, counted from 1.
    pub layer: usize,
}

/// The largest files and directories.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Directories, with everything below them.
    pub directories: Vec<SizeOf>,
    /// Files, without their holes.
    pub files: Vec<SizeOf>,
}

/// A path and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SizeOf {
    /// Bytes that are not printable are escaped.
    pub path: String,
    /// Bytes of data.
    pub size: u64,
}

/// The `most` largest files and directories of a tree. A file with several names counts where the first of them is.
pub fn largest(tree: &Tree, most: usize) -> Sizes {
    let mut seen = HashSet::new();
    let mut order = vec![(NodeId::ROOT, 0, Vec::new())];
    let mut sums = vec![0u64];
    let mut files = Top::new(most);
    let mut next = 0;
    while next < order.len() {
        let (directory, _, path) = order[next].clone();
        for (name, child) in tree.children(directory).into_iter().flat_map(|names| names.iter()) {
            let path = || [&path[..], b"/", name].concat();
            match &tree.node(child.node).content {
                Content::Directory(_) => {
                    order.push((child.node, next, path()));
                    sums.push(0);
                }
                Content::File { size, data } if seen.insert(child.node.index()) => {
                    let bytes = data.runs(*size).map(|run| run.length).sum();
                    sums[next] += bytes;
                    files.offer(bytes, 0, path);
                }
                _ => {}
            }
        }
        next += 1;
    }
    // Children stand behind their parents.
    for index in (1..order.len()).rev() {
        sums[order[index].1] += sums[index];
    }
    let mut directories = Top::new(most);
    for ((_, _, path), sum) in order.iter().zip(&sums) {
        directories.offer(*sum, 0, || if path.is_empty() { b"/".to_vec() } else { path.clone() });
    }
    let sizes = |top: Top| top.finish().map(|(size, _)| size).collect();
    Sizes { directories: sizes(directories), files: sizes(files) }
}

/// The largest of what is offered.
struct Top {
    most: usize,
    /// By size, then in the order in which they came.
    kept: BTreeMap<(u64, std::cmp::Reverse<usize>), (Vec<u8>, usize)>,
    offered: usize,
}

impl Top {
    fn new(most: usize) -> Self {
        Self { most, kept: BTreeMap::new(), offered: 0 }
    }

    fn offer(&mut self, size: u64, layer: usize, path: impl FnOnce() -> Vec<u8>) {
        self.offered += 1;
        let smallest = self.kept.first_key_value().map_or(0, |((size, _), _)| *size);
        if size == 0 || self.kept.len() >= self.most && size <= smallest {
            return;
        }
        self.kept.insert((size, std::cmp::Reverse(self.offered)), (path(), layer));
        if self.kept.len() > self.most {
            self.kept.pop_first();
        }
    }

    /// Largest first, each with its layer.
    fn finish(self) -> impl Iterator<Item = (SizeOf, usize)> {
        self.kept
            .into_iter()
            .rev()
            .map(|((size, _), (path, layer))| (SizeOf { path: Names::shown(&path), size }, layer))
    }
}

/// Reads all layers of an image; of what takes the space, the `most` largest of each kind.
pub fn image_facts(image: &Image, most: usize) -> Result<ImageFacts, Error> {
    let tree = image_tree(image)?;
    let mut kept: HashSet<(u32, u64)> = HashSet::new();
    let mut entries = 1;
    let mut stack = vec![NodeId::ROOT];
    let mut seen = HashSet::new();
    while let Some(directory) = stack.pop() {
        for child in tree.children(directory).into_iter().flat_map(|names| names.values()) {
            if !seen.insert(child.node.index()) {
                continue;
            }
            entries += 1;
            match &tree.node(child.node).content {
                Content::Directory(_) => stack.push(child.node),
                Content::File { size, data } => {
                    kept.extend(data.runs(*size).next().map(|run| (run.place.source, run.place.offset)));
                }
                _ => {}
            }
        }
    }
    let mut lost = Top::new(most);
    let mut layers = Vec::new();
    for (layer, number) in image.layers.iter().zip(0u32..) {
        let mut facts = LayerFacts {
            digest: layer.descriptor.digest().to_string(),
            diff_id: layer.diff_id.to_string(),
            media_type: layer.descriptor.media_type().to_string(),
            size: layer.descriptor.size(),
            entries: 0,
            whiteouts: 0,
            data: 0,
            lost: 0,
        };
        let mut reader = LayerReader::new(layer.open()?);
        while let Some(change) = reader.next_change()? {
            facts.entries += 1;
            match change {
                Change::Whiteout(_) | Change::Opaque(_) => facts.whiteouts += 1,
                Change::Node(node) => {
                    let Some((bytes, offset)) = file_data(&node.kind) else { continue };
                    facts.data += bytes;
                    if !kept.contains(&(number, offset)) {
                        facts.lost += bytes;
                        lost.offer(bytes, number as usize + 1, || node.path.as_bytes().to_vec());
                    }
                }
            }
        }
        layers.push(facts);
    }
    let lost = lost.finish().map(|(SizeOf { path, size }, layer)| LostFile { path, size, layer });
    Ok(ImageFacts {
        digest: image.digest.to_string(),
        config: image.config_json.clone(),
        layers,
        entries,
        lost: lost.collect(),
        largest: largest(&tree, most),
    })
}

/// How much data a file of a layer has, and where it begins.
fn file_data(kind: &Kind) -> Option<(u64, u64)> {
    match kind {
        Kind::File { size, offset, .. } => (*size > 0).then_some((*size, *offset)),
        Kind::Sparse { runs, .. } => Some((runs.iter().map(|run| run.length).sum(), runs.first()?.offset)),
        _ => None,
    }
}
