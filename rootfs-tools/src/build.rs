//! An image's layers to an ext4 file.

use std::num::NonZeroUsize;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use oci::{Digest, Image};
use serde::Serialize;

use crate::Error;
use crate::apply::Applier;
use crate::ext4::{Ext4, Journal, Size};
use crate::format::{DataSource, Format};
use crate::layers::{self, Layers};
use crate::output::Output;
use crate::tree::Tree;

/// What [`build()`] may be told.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// How large the file system is.
    pub size: Size,
    /// Whether it has a journal. One that is mounted read-only needs none.
    pub journal: Journal,
    /// Layers that are decompressed at the same time; as many as this machine has processors, if it is not said. The result
    /// does not depend on it.
    pub threads: Option<NonZeroUsize>,
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
    /// Digest of the image's manifest; a folder has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
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
    /// Sockets that were left out; only folders have some.
    pub dropped_sockets: u64,
    /// Time of the first pass over the layers, in milliseconds.
    pub index_ms: u64,
    /// Time of planning and of the second pass, in milliseconds.
    pub write_ms: u64,
    /// Time of syncing and renaming, in milliseconds.
    pub sync_ms: u64,
}

/// Writes the file system of `image` to `output`, which appears only when it is whole and on disk.
///
/// The same image and options give the same bytes. Compressed layers are decompressed into unnamed files beside the output,
/// and each layer is checked against its digests before the file gets its name. On an error nothing is left behind.
pub fn build(
    image: &Image,
    options: &BuildOptions,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<BuildReport, Error> {
    let format =
        Ext4::new(image.digest.to_string().as_bytes()).size(options.size).journal(options.journal)?;
    // First of all, so that a bad path costs nothing.
    let writing = Writing { format, file: Output::create_hashed(output)? };
    writing.run(image, options.threads, |_| Ok(()), |layers| layers, Layers::finish, progress)
}

/// An image on its way to a file.
pub(crate) struct Writing {
    pub(crate) format: Ext4,
    pub(crate) file: Output,
}

impl Writing {
    /// Writes `image` with what `add` puts on top of its layers. The data is that of what `source` makes of the layers';
    /// only after `finish` it is trusted.
    pub(crate) fn run<'a, S: DataSource>(
        self,
        image: &'a Image,
        threads: Option<NonZeroUsize>,
        add: impl FnOnce(&mut Tree) -> Result<(), Error>,
        source: impl FnOnce(Layers<'a>) -> S,
        finish: impl FnOnce(S) -> Result<(), Error>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<BuildReport, Error> {
        let started = Instant::now();
        let mut applier = Applier::new();
        let threads = threads.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
        let layers = layers::index(image, &mut applier, self.file.folder(), threads, progress)?;
        let (mut tree, dropped_xattrs) = applier.finish();
        add(&mut tree)?;
        let index_ms = milliseconds(started.elapsed());
        let report = self.write(&mut tree, source(layers), finish, progress)?;
        Ok(BuildReport { image: Some(image.digest.clone()), dropped_xattrs, index_ms, ..report })
    }

    /// Writes `tree`.
    pub(crate) fn write<S: DataSource>(
        self,
        tree: &mut Tree,
        mut source: S,
        finish: impl FnOnce(S) -> Result<(), Error>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<BuildReport, Error> {
        let started = Instant::now();
        let Self { format, mut file } = self;
        let prepared = format.prepare(tree)?;
        let total = prepared.length();
        prepared.write(&mut source, &mut file, &mut |done| progress(Progress::Writing { done, total }))?;
        finish(source)?;
        let written = Instant::now();

        progress(Progress::Syncing);
        let digest = file.publish_hashed()?;
        Ok(BuildReport {
            image: None,
            digest,
            size: total,
            entries: prepared.entries(),
            data: prepared.data(),
            dropped_xattrs: 0,
            dropped_sockets: 0,
            index_ms: 0,
            write_ms: milliseconds(written - started),
            sync_ms: milliseconds(written.elapsed()),
        })
    }
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}
