//! `RUN` in a machine of its own, and everything else without a mount: a build that needs no privilege of this host.
//!
//! ```text
//! layers ── spool, tree ──► COPY, WORKDIR, USER look at names in memory, contents in the layers
//!   │ disks, delta
//!   ▼
//! image.ext4, layer.ext4 ..   an empty upper.ext4
//!   └──────────┬───────────────────┘ host-shim run --attach .. -- envd build-step
//!              ▼
//!            microVM: overlay of the disks, the command in a container       output ──► console
//!              │ unmounted, powered off
//!              ▼
//!           upper.ext4 ── upper: rootfs-tools reads it, a stranger's disk ──► layer
//! ```
//!
//! The guest is hostile from the moment the command starts. What comes back from it is bytes for the console and a disk,
//! which no kernel of this host mounts.

mod delta;
mod disks;
mod machine;
mod spool;
mod step;
mod tree;
mod upper;

use std::path::PathBuf;
use std::time::Duration;

use envd_proto::build::Outcome;
use oci::layer::{Compression, LayerWriter, WrittenLayer};
use oci::{Layer, Store};
use rootfs_tools::NodeId;
use template::DataDir;

use crate::console::Console;
use crate::error::Error;
use crate::interrupt::Interrupt;
use crate::limits::{Pids, StepLimits};
use crate::run::{Network, RunOptions};
use crate::secrets::Secrets;
use crate::tree::Tree;
use crate::worker::{RunStep, Worker};
use disks::Disks;
use machine::Machines;
use upper::UpperDisk;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The folder in the cache with the disks of cache mounts.
const FOLDER_OF_CACHES: &str = "mounts-vm";

/// The machines of steps.
#[derive(Clone, Debug)]
pub struct VmOptions {
    /// The program host-shim; the one beside this program or in PATH by default.
    pub host_shim: Option<PathBuf>,
    /// The guest kernel; the one that host-shim finds by default.
    pub kernel: Option<PathBuf>,
    /// The guest image; the one that host-shim finds by default.
    pub guest_image: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs; as many as this machine has, and at most 8, by default.
    pub cpus: Option<u32>,
    /// What a step can write, in bytes; a multiple of 4096. Takes only what is written.
    pub disk: u64,
    /// How long a step may take; for ever by default.
    pub timeout: Option<Duration>,
    /// Without a network.
    pub offline: bool,
}

impl Default for VmOptions {
    fn default() -> Self {
        Self {
            host_shim: None,
            kernel: None,
            guest_image: None,
            memory_mib: 1024,
            cpus: None,
            disk: 10 * GIB,
            timeout: None,
            offline: false,
        }
    }
}

impl VmOptions {
    /// With what was asked of all steps. What a machine does not limit is refused, rather than left out.
    pub(crate) fn with(mut self, run: &RunOptions) -> Result<Self, Error> {
        let StepLimits { memory, cpus, pids, timeout, shm_size, ulimits } = &run.limits;
        let refused = [
            ("--pids-limit", matches!(pids, Pids::Limit(_))),
            ("--ulimit", !ulimits.is_empty()),
            ("--shm-size", *shm_size != StepLimits::default().shm_size),
        ];
        if let Some((option, _)) = refused.into_iter().find(|(_, given)| *given) {
            return Err(Error::Invalid {
                what: option.to_owned(),
                reason: "steps in machines of their own have no such limit: leave it out, or use --isolation container"
                    .to_owned(),
            });
        }
        if let Some(memory) = memory {
            self.memory_mib = memory.div_ceil(MIB);
        }
        // Processors of a machine are whole ones.
        self.cpus =
            cpus.map(|cpus| u32::try_from(cpus.0.div_ceil(100_000)).unwrap_or(u32::MAX)).or(self.cpus);
        self.timeout = timeout.or(self.timeout);
        self.offline = run.network == Network::None;
        Ok(self)
    }
}

/// What a build has that its steps need.
pub(crate) struct VmBuild<'a> {
    pub(crate) store: Store,
    pub(crate) compression: Compression,
    /// The host's certificates, where they are wanted.
    pub(crate) host_ca: Option<PathBuf>,
    pub(crate) secrets: Secrets,
    pub(crate) console: &'a Console,
    pub(crate) interrupt: &'a Interrupt,
}

/// Commands in machines of their own.
pub(crate) struct VmWorker<'a> {
    build: VmBuild<'a>,
    disks: Disks,
    machines: Machines,
}

impl<'a> VmWorker<'a> {
    /// Finds what machines need, and opens the caches.
    pub(crate) fn new(data: &DataDir, options: VmOptions, build: VmBuild<'a>) -> Result<Self, Error> {
        let disks = Disks::open(&data.cache().join(disks::FOLDER))?;
        Ok(Self { build, disks, machines: Machines::new(data, options)? })
    }
}

/// The tree of a stack of layers, for who only looks at it: this needs neither mounts nor root.
pub(crate) fn tree_of(data: &DataDir, layers: &[Layer]) -> Result<Box<dyn Tree>, Error> {
    Ok(Box::new(Disks::open(&data.cache().join(disks::FOLDER))?.tree(layers)?))
}

impl Worker for VmWorker<'_> {
    fn tree(&self, layers: &[Layer]) -> Result<Box<dyn Tree + '_>, Error> {
        Ok(Box::new(self.disks.tree(layers)?))
    }

    fn run(&self, step: &RunStep<'_>) -> Result<Option<WrittenLayer>, Error> {
        let image = self.disks.tree(step.layers)?;
        let scratch = self.disks.scratch()?;
        let prepared = step::prepare(step, &image, scratch.path(), self)?;
        self.machines.run(&prepared.disks, &prepared.step, &step.prefix, &self.build)?;
        let upper = UpperDisk::open(&prepared.upper)?;
        match upper.outcome()? {
            Outcome::Exited(0) => prepared.keep()?,
            Outcome::Exited(code) => {
                prepared.keep()?;
                return Err(Error::Command { outcome: format!("exited with code {code}") });
            }
            Outcome::Killed { signal, out_of_memory } => {
                prepared.keep()?;
                let why = match out_of_memory {
                    true => format!(
                        ": it took more memory than its machine has ({} MiB)",
                        self.machines.options().memory_mib
                    ),
                    false => String::new(),
                };
                return Err(Error::Command { outcome: format!("was killed by signal {signal}{why}") });
            }
            Outcome::Failed(reason) => return Err(Error::Container { reason }),
        }
        let before = &image.nodes().node(NodeId::ROOT).attributes;
        let after = upper.root();
        let root_changed = (before.mode, before.uid, before.gid) != (after.mode, after.uid, after.gid);
        if upper.is_empty() && !root_changed {
            return Ok(None);
        }
        let mut writer = LayerWriter::new(&self.build.store, self.build.compression)?;
        upper.write(root_changed, &mut writer)?;
        Ok(Some(writer.finish()?))
    }
}
