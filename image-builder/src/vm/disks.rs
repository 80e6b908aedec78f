//! Images as the disks of a machine.
//!
//! ```text
//! cache/rootfs/
//!   <chain id>.ext4          an image, whole
//!   <chain id>.layer.ext4    only what its top layer changes, for an overlay over the disks of the layers below
//!   .new-*/                  of a step that runs: the disk that it writes to
//! ```
//!
//! A base image is written once, and each layer over it costs what is in it. A file appears by a rename when it is complete
//! and on disk. Whoever uses the folder holds a shared lock on it; with an exclusive one everything in it may be removed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use oci::Layer;
use rootfs_tools::{Content, Ext4, Node, NodeId, Size, Tree as Nodes, write_tree};

use super::delta::delta;
use super::spool::Spools;
use super::tree::LayerTree;
use crate::console::Console;
use crate::error::{Error, at};
use crate::layers::Chain;

/// The folder in the cache.
pub(super) const FOLDER: &str = "rootfs";

const NEW_PREFIX: &str = ".new-";

/// Layers that are disks of their own over an image that is one. A machine has room for 16 disks, and a mount of a step
/// takes one; what an overlay looks through costs time.
const MAX_LAYER_DISKS: usize = 6;

/// Trees that are kept in memory: that of a step, the one below it, and those of two other stages.
const MAX_TREES: usize = 4;

/// The trees and disks of the images of a build.
#[derive(Debug)]
pub(super) struct Disks {
    root: PathBuf,
    spools: Spools,
    /// Those that were used last, the newest last.
    trees: Mutex<Vec<(String, LayerTree)>>,
    _lock: File,
}

impl Disks {
    /// Opens the cache and removes what killed builds left, unless another build is at work.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(at(root))?;
        let lock = File::open(root).map_err(at(root))?;
        if lock.try_lock().is_ok() {
            for entry in fs::read_dir(root).map_err(at(root))? {
                let path = entry.map_err(at(root))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name.starts_with(NEW_PREFIX) {
                    fs::remove_dir_all(&path).map_err(at(&path))?;
                }
            }
            lock.unlock().map_err(at(root))?;
        }
        lock.lock_shared().map_err(at(root))?;
        Ok(Self { root: root.to_owned(), spools: Spools::new(root), trees: Mutex::default(), _lock: lock })
    }

    /// A folder that goes when it is dropped.
    pub(super) fn scratch(&self) -> Result<tempfile::TempDir, Error> {
        tempfile::Builder::new().prefix(NEW_PREFIX).tempdir_in(&self.root).map_err(at(&self.root))
    }

    /// The tree of the layers.
    pub(super) fn tree(&self, layers: &[Layer]) -> Result<LayerTree, Error> {
        let chain = chain(layers);
        let mut trees = self.lock();
        if let Some(position) = trees.iter().position(|(known, _)| known == chain.id()) {
            let found = trees.remove(position);
            let tree = found.1.clone();
            trees.push(found);
            return Ok(tree);
        }
        drop(trees);
        let tree = LayerTree::read(layers, chain.id(), &self.spools)?;
        let mut trees = self.lock();
        trees.push((chain.id().to_owned(), tree.clone()));
        if trees.len() > MAX_TREES {
            trees.remove(0);
        }
        Ok(tree)
    }

    /// Disks that are the image when they are laid one over the other, the highest first.
    pub(super) fn of(&self, layers: &[Layer], console: &Console) -> Result<Vec<PathBuf>, Error> {
        let least = layers.len().saturating_sub(MAX_LAYER_DISKS);
        let whole = (least..=layers.len()).rev().find(|&count| self.whole(&layers[..count]).exists());
        let Some(whole) = whole else { return Ok(vec![self.make_whole(layers, console)?]) };
        let mut disks = vec![self.whole(&layers[..whole])];
        for count in whole + 1..=layers.len() {
            disks.push(self.make_layer(&layers[..count], console)?);
        }
        disks.reverse();
        Ok(disks)
    }

    /// One disk that is the image.
    pub(super) fn make_whole(&self, layers: &[Layer], console: &Console) -> Result<PathBuf, Error> {
        let file = self.whole(layers);
        if !file.exists() {
            let _work = console.work("writing the image as a disk", None);
            let tree = self.tree(layers)?;
            self.write(tree.nodes().clone(), &tree, &file)?;
        }
        Ok(file)
    }

    fn make_layer(&self, layers: &[Layer], console: &Console) -> Result<PathBuf, Error> {
        let file = self.root.join(format!("{}.layer.ext4", name(layers)));
        if !file.exists() {
            let _work = console.work("writing a layer as a disk", None);
            let below = self.tree(&layers[..layers.len() - 1])?;
            let tree = self.tree(layers)?;
            self.write(delta(below.nodes(), tree.nodes()), &tree, &file)?;
        }
        Ok(file)
    }

    fn whole(&self, layers: &[Layer]) -> PathBuf {
        self.root.join(format!("{}.ext4", name(layers)))
    }

    fn write(&self, mut nodes: Nodes, tree: &LayerTree, file: &Path) -> Result<(), Error> {
        let format = Ext4::new(file.file_name().unwrap_or_default().as_encoded_bytes());
        write_tree(&mut nodes, &format, &mut tree.data(), file)?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, LayerTree)>> {
        self.trees.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn chain(layers: &[Layer]) -> Chain {
    let mut chain = Chain::default();
    layers.iter().for_each(|layer| chain.push(&layer.diff_id));
    chain
}

/// The chain id without the name of its algorithm.
fn name(layers: &[Layer]) -> String {
    let chain = chain(layers);
    chain.id().rsplit(':').next().unwrap_or_default().to_owned()
}

/// A disk with a folder `name` that has what the directory `from` of the tree has, and room for `bytes` in all. Sparse.
pub(super) fn write_folder(
    tree: &LayerTree,
    from: NodeId,
    name: &str,
    bytes: u64,
    file: &Path,
) -> Result<(), Error> {
    let mut nodes = Nodes::new();
    let mut copies = std::collections::HashMap::new();
    let mut left = vec![(NodeId::ROOT, name.as_bytes().to_vec(), from)];
    while let Some((at, name, of)) = left.pop() {
        let node = tree.nodes().node(of);
        let copy = match (&node.content, copies.get(&of.index())) {
            (Content::Directory(names), _) => {
                let content = Content::Directory(Default::default());
                let copy = nodes.add(Node { attributes: node.attributes.clone(), content });
                left.extend(names.iter().map(|(name, child)| (copy, name.to_vec(), child.node)));
                copy
            }
            (_, Some(copy)) => *copy,
            (_, None) => nodes.add(node.clone()),
        };
        copies.insert(of.index(), copy);
        nodes.link(at, &name, copy, 0);
    }
    let format = Ext4::new(file.as_os_str().as_encoded_bytes()).size(Size::Exact(bytes));
    write_tree(&mut nodes, &format, &mut tree.data(), file)?;
    Ok(())
}
