//! An image's layers to an ext4 file.

use std::path::Path;
use std::time::{Duration, Instant};

use oci::{Digest, Image};
use serde::Serialize;

use crate::Error;
use crate::apply::Applier;
use crate::ext4::{self, BLOCK_SIZE, Capacity, DataSource, Identity, LOST_FOUND, Plan, PlanError};
use crate::layers::{self, Layers};
use crate::output::Output;
use crate::tree::{Attributes, Content, Node, NodeId, Tree};

/// How large the file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Size {
    /// As small as the contents allow.
    #[default]
    Minimal,
    /// As small as the contents and this many bytes of new files allow.
    Free(u64),
    /// This many bytes: a multiple of 4096. It is an error when the contents need more.
    Exact(u64),
}

impl Size {
    /// Checked, as the plan takes it.
    pub(crate) fn capacity(self) -> Result<Capacity, Error> {
        match self {
            Self::Minimal => Ok(Capacity::Free(0)),
            Self::Free(bytes) if bytes <= ext4::MAX_BYTES => Ok(Capacity::Free(bytes)),
            Self::Exact(bytes) if bytes <= ext4::MAX_BYTES && bytes.is_multiple_of(BLOCK_SIZE as u64) => {
                Ok(Capacity::Size(bytes))
            }
            Self::Free(bytes) | Self::Exact(bytes) => Err(Error::Invalid {
                what: format!("size of {bytes} bytes"),
                reason: format!("expected a multiple of {BLOCK_SIZE} of at most 16 TiB"),
            }),
        }
    }
}

/// What [`build()`] may be told.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// How large the file system is.
    pub size: Size,
}

/// How far [`build()`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The entries of layer `layer` (from 1) of `layers` are being read.
    Indexing {
        /// The layer, counted from 1.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// `done` of `total` bytes of the file are written.
    Writing {
        /// Bytes so far.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
    },
    /// The file is being synced to the disk.
    Syncing,
}

/// What [`build()`] made.
#[derive(Clone, Debug, Serialize)]
pub struct BuildReport {
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Digest of the file.
    pub digest: Digest,
    /// Length of the file in bytes.
    pub size: u64,
    /// Inodes: files, directories, links, devices.
    pub entries: u64,
    /// Bytes of file data.
    pub data: u64,
    /// Extended attributes that were left out: of no namespace that Linux knows, or meant for overlayfs.
    pub dropped_xattrs: u64,
    /// Time of the first pass over the layers, in milliseconds.
    pub index_ms: u64,
    /// Time of planning and of the second pass, in milliseconds.
    pub write_ms: u64,
    /// Time of syncing and renaming, in milliseconds.
    pub sync_ms: u64,
}

/// Writes the file system of `image` to `output`, which appears only when it is whole and on disk.
///
/// The same image and options give the same bytes. The layers are read twice, and each is checked against its digests
/// before the file gets its name. On an error nothing is left behind.
pub fn build(
    image: &Image,
    options: &BuildOptions,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<BuildReport, Error> {
    let identity = Identity::derive(image.digest.to_string().as_bytes());
    // First of all, so that a bad path costs nothing.
    let file = Output::create_hashed(output)?;
    let writing = Writing { size: options.size, identity, file };
    writing.run(image, |_| Ok(()), Layers::new(image), Layers::finish, progress)
}

/// An image on its way to a file.
pub(crate) struct Writing {
    pub(crate) size: Size,
    pub(crate) identity: Identity,
    pub(crate) file: Output,
}

impl Writing {
    /// Writes `image` with what `add` puts on top of its layers. The data is `source`'s; only after `finish` it is trusted.
    pub(crate) fn run<S: DataSource>(
        self,
        image: &Image,
        add: impl FnOnce(&mut Tree) -> Result<(), Error>,
        mut source: S,
        finish: impl FnOnce(S) -> Result<(), Error>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<BuildReport, Error> {
        let started = Instant::now();
        let Self { size, identity, mut file } = self;
        let capacity = size.capacity()?;
        let mut applier = Applier::new();
        let layers = image.layers.len();
        for (layer, number) in image.layers.iter().zip(1..) {
            progress(Progress::Indexing { layer: number, layers });
            layers::index(layer, &mut applier)?;
        }
        let (mut tree, dropped_xattrs) = applier.finish();
        add(&mut tree)?;
        add_lost_found(&mut tree);
        let indexed = Instant::now();

        let plan = Plan::new(&tree, capacity, identity, b"").map_err(|error| explain(&tree, error))?;
        let total = plan.length();
        ext4::write(&plan, &tree, &mut source, &mut file, &mut |done| {
            progress(Progress::Writing { done, total })
        })?;
        finish(source)?;
        let written = Instant::now();

        progress(Progress::Syncing);
        let digest = file.publish_hashed()?;
        Ok(BuildReport {
            image: image.digest.clone(),
            digest,
            size: total,
            entries: plan.entries(),
            data: plan.data_bytes(&tree),
            dropped_xattrs,
            index_ms: milliseconds(indexed - started),
            write_ms: milliseconds(written - indexed),
            sync_ms: milliseconds(written.elapsed()),
        })
    }
}

/// e2fsck wants the directory; an image that has one keeps its own.
pub(crate) fn add_lost_found(tree: &mut Tree) {
    if tree.child(NodeId::ROOT, LOST_FOUND).is_none() {
        let attributes = Attributes { mode: 0o700, ..Attributes::default() };
        let node = tree.add(Node { attributes, content: Content::Directory(Default::default()) });
        tree.link(NodeId::ROOT, LOST_FOUND, node, 0);
    }
}

/// The plan's error with the path that it is about.
pub(crate) fn explain(tree: &Tree, error: PlanError) -> Error {
    match error {
        PlanError::TooLarge { needed, asked } => Error::TooLarge { needed, asked },
        PlanError::Unsupported { node, reason } => Error::Unsupported { path: tree.path_of(node), reason },
    }
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}
