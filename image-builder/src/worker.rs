//! Where steps see file systems, and where commands run.
//!
//! ```text
//!                 Worker::tree            Worker::run
//! ContainerWorker overlay of unpacked     container over an overlay; its upper directory is the layer
//!                 layers, read-only
//! ```
//!
//! `COPY`, `ADD` and `WORKDIR` need no more than a [`Tree`] of what is below them; `RUN` is the worker's own.

use std::path::PathBuf;

use oci::layer::{Compression, LayerWriter, UpperAttributes, UpperRoot, WrittenLayer, write_upper};
use oci::{Layer, Store};
use template::DataDir;

use crate::builder::BuildOptions;
use crate::cache_mounts::CacheMounts;
use crate::cgroups::Controllers;
use crate::console::Console;
use crate::error::{Error, at};
use crate::ids;
use crate::interrupt::Interrupt;
use crate::layers::{Chain, LayerCache, Scratch, Stack};
use crate::mounts::{MountSources, Mounts};
use crate::plan::RunAction;
use crate::rooted::Rooted;
use crate::run::{self, RunOptions};
use crate::tree::{Escape, Last, Tree};

/// A command of a `RUN` step.
pub(crate) struct RunStep<'a> {
    /// What is below.
    pub(crate) layers: &'a [Layer],
    pub(crate) action: &'a RunAction,
    /// For each mount of the action the layers whose tree it shows; none where it shows nothing. Files of a context are a
    /// layer too, so that a mount shows what a COPY would copy.
    pub(crate) mounts: &'a [Vec<Layer>],
    /// The mark before each line of the command's output.
    pub(crate) prefix: String,
}

/// Carries out what needs a file system of its own. Several steps may be at work at once.
pub(crate) trait Worker: Send + Sync {
    /// The tree of a stack of layers, lowest first.
    fn tree(&self, layers: &[Layer]) -> Result<Box<dyn Tree + '_>, Error>;

    /// Runs the command. `None` when it changed nothing.
    fn run(&self, step: &RunStep<'_>) -> Result<Option<WrittenLayer>, Error>;
}

/// Commands in containers on this machine.
pub(crate) struct ContainerWorker<'a> {
    layers: LayerCache,
    caches: CacheMounts,
    controllers: Controllers,
    store: Store,
    compression: Compression,
    host_ca: Option<PathBuf>,
    run: &'a RunOptions,
    /// This program, which is started again for each RUN.
    program: PathBuf,
    console: &'a Console,
    interrupt: &'a Interrupt,
}

impl<'a> ContainerWorker<'a> {
    /// Opens the caches. An error where this machine cannot hold steps to the limits that were asked for.
    pub(crate) fn open(
        data: &DataDir,
        options: &'a BuildOptions,
        store: Store,
        console: &'a Console,
        interrupt: &'a Interrupt,
    ) -> Result<Self, Error> {
        let controllers = Controllers::probe();
        if let Some(note) = options.run.limits.check(&controllers)? {
            console.line(&note);
        }
        Ok(Self {
            layers: LayerCache::open(&data.cache())?,
            caches: CacheMounts::new(&data.cache()),
            controllers,
            store,
            compression: options.compression,
            host_ca: options.host_ca.clone(),
            run: &options.run,
            program: options.program.clone(),
            console,
            interrupt,
        })
    }
}

impl Worker for ContainerWorker<'_> {
    fn tree(&self, layers: &[Layer]) -> Result<Box<dyn Tree + '_>, Error> {
        let chain = self.layers.unpack(layers, self.console)?;
        Ok(Box::new(Stack::mount(&self.layers, &chain)?))
    }

    fn run(&self, step: &RunStep<'_>) -> Result<Option<WrittenLayer>, Error> {
        let chain = self.layers.unpack(step.layers, self.console)?;
        let scratch = self.layers.scratch(&chain)?;
        let overlay = self.layers.mount(&chain, &scratch)?;
        let root = Rooted::open(&scratch.merged())?;
        let workdir = root.resolve(step.action.workdir.as_bytes(), Last::Follow, Escape::Clamp)?;
        root.make_directories(&workdir)?;
        let bundle = run::Bundle::make(scratch.beside("bundle"))?;
        let sources = MountSources {
            layers: &self.layers,
            caches: &self.caches,
            secrets: &self.run.secrets,
            console: self.console,
            memory: bundle.path(),
        };
        let mounts = Mounts::prepare(step.action, step.mounts, &root, &sources)?;
        let environment = run::Environment {
            merged: scratch.merged(),
            bundle: &bundle,
            id: scratch.unique_name(),
            lock: scratch.lock()?,
            host_ca: self.host_ca.as_deref(),
            program: &self.program,
            options: self.run,
            controllers: &self.controllers,
            console: self.console,
            interrupt: self.interrupt,
            prefix: step.prefix.clone(),
        };
        let points = run::run(step.action, mounts, environment)?;
        points.remove(&root)?;
        drop(bundle);
        // The overlay is busy as long as the root is open.
        drop(root);
        overlay.unmount()?;
        points.prune(&Rooted::open(&scratch.upper())?)?;
        let layer = self.write_layer(&chain, &scratch)?;
        if let Some(layer) = &layer {
            let mut above = chain.clone();
            above.push(&layer.diff_id);
            self.layers.keep(scratch, &above)?;
        }
        Ok(layer)
    }
}

impl ContainerWorker<'_> {
    /// `None` when the step changed nothing.
    fn write_layer(&self, below: &Chain, scratch: &Scratch) -> Result<Option<WrittenLayer>, Error> {
        let upper = scratch.upper();
        let empty = std::fs::read_dir(&upper).map_err(at(&upper))?.next().is_none();
        let root = match self.layers.root_changed(below, scratch)? {
            true => UpperRoot::Include,
            false if empty => return Ok(None),
            false => UpperRoot::Omit,
        };
        let mut writer = LayerWriter::new(&self.store, self.compression)?;
        let attributes = if ids::are_limited() { UpperAttributes::User } else { UpperAttributes::Trusted };
        write_upper(&upper, root, attributes, &mut writer)?;
        Ok(Some(writer.finish()?))
    }
}
