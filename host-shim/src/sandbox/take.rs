//! Snapshots of a running sandbox: it is held still, its RAM and disk are cut, and it goes on, or is paused.
//!
//! ```text
//!  Freeze ─► stop ─► devices, RAM, disk ─► cont ─► Thaw ─► sync, rename      snapshot, fork, template
//!                    └ links to the base before it   └──── not for pause: sync, rename, then the VMM's end
//! ```
//!
//! The folder appears by rename when everything of it is on disk. A failure at any step lets the sandbox go on as it was.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envd_proto::control::Freeze;
use sandbox_folder::calls::Taken;

use super::ground::{Ground, Origin, no_space, stands_still};
use super::start::blocking;
use crate::Error;
use crate::agent::{Agent, AgentError};
use crate::dir::{SCRATCH, SCRATCH_OVERLAY};
use crate::snapshot::{
    self, Description, Durability, FileName, GuestMemory, NewSnapshot, SnapshotFolder, SnapshotMachine, Verb,
    disk::Placed,
};
use crate::spec::CheckedSpec;
use crate::vmm::Ram;

/// A snapshot to take.
pub(super) struct Take<'a> {
    pub(super) verb: Verb,
    /// Where its folder goes.
    pub(super) target: &'a Path,
    /// Where a killed shim leaves something unfinished.
    pub(super) unfinished: &'a Path,
    /// The root file system, where the snapshot is to be complete without the template.
    pub(super) rootfs: Option<Arc<File>>,
    /// For stamps of what was verified.
    pub(super) cache: &'a Path,
}

/// A snapshot that was taken.
pub(super) struct Kept {
    pub(super) folder: SnapshotFolder,
    pub(super) taken: Taken,
}

impl Ground {
    /// Takes a snapshot. The sandbox goes on, but for a pause that succeeded.
    pub(super) async fn take(
        &mut self,
        spec: &CheckedSpec,
        agent: &Agent,
        take: Take<'_>,
    ) -> Result<Kept, Error> {
        if self.state.channel.as_deref() != Some("serial") {
            let channel = self.state.channel.as_deref().unwrap_or("no channel");
            return Err(Error::Conflict(format!(
                "a sandbox with the channel {channel} cannot be snapshotted: start it with --channel serial"
            )));
        }
        spec.refuse_extras("snapshotted")?;
        let Some(origin) = &self.origin else { return Err(AgentError::Ended.into()) };
        let description = describe(origin, spec, agent, take.verb);
        let base = origin.base.clone();
        let target = take.target.to_owned();
        let at_template = spec.rootfs_is_at_template();
        self.reaper.sweeps(take.unfinished);
        let own_rootfs = base.as_ref().is_some_and(|base| base.file(FileName::Rootfs).is_some());
        // All that can be done while the sandbox runs.
        let new = blocking(move || {
            // What a killed one has left.
            snapshot::sweep(parent(&target))?;
            let mut new = NewSnapshot::begin(&target)?;
            if let Some(base) = &base {
                new.add_base(base)?;
            }
            if let Some(rootfs) = take.rootfs.filter(|_| !own_rootfs) {
                add_rootfs(&mut new, &rootfs, at_template)?;
            }
            Ok(new)
        })
        .await?;

        let still = Instant::now();
        let strip_ssh_host_keys = take.verb == Verb::Template;
        // A template's disk is also what a host boots from that cannot restore it.
        let skip_sync = take.verb != Verb::Template;
        let freeze = agent.freeze(Freeze { strip_ssh_host_keys, skip_sync });
        let mut stalled = self.vmm()?.stalled();
        let frozen = tokio::select! {
            frozen = freeze => frozen.map_err(Error::from),
            () = stands_still(&mut stalled) => Err(no_space(self.scratch())),
        };
        if let Err(error) = frozen {
            // An answer that is late is of a Freeze that may be done all the same: the Thaw comes after it, whenever that is.
            if let Err(error) = agent.thaw_soon().await {
                tracing::warn!(%error, "no Thaw yet after a Freeze that failed");
            }
            return Err(error);
        }
        if take.verb == Verb::Template {
            rehearse(agent).await?;
        }
        let pausing = take.verb == Verb::Pause;
        let cut = self.cut(new).await;
        let going = if !pausing || cut.is_err() { self.go_on(agent).await } else { Ok(()) };
        let stopped = still.elapsed();
        // What failed first says why.
        let Cut { new, ram_bytes, disk_bytes } = cut?;
        going?;

        let durability = if take.verb == Verb::Fork { Durability::Volatile } else { Durability::Synced };
        let cache = take.cache.to_owned();
        let published = blocking(move || new.publish(description, durability, Some(&cache))).await;
        let folder = match published {
            Ok(folder) => folder,
            Err(error) => {
                if pausing && let Err(error) = self.go_on(agent).await {
                    tracing::error!(%error, "the sandbox does not go on");
                }
                return Err(error);
            }
        };
        let stopped = if pausing { still.elapsed() } else { stopped };
        let taken = Taken { stopped_ms: milliseconds(stopped), ram_bytes, disk_bytes, spec: None };
        tracing::info!(verb = ?take.verb, ?taken, path = %take.target.display(), "a snapshot was taken");
        Ok(Kept { folder, taken })
    }

    /// Lets a sandbox go on that was held still.
    async fn go_on(&mut self, agent: &Agent) -> Result<(), Error> {
        self.vmm()?.resume().await?;
        Ok(agent.thaw().await?)
    }

    /// Stops the CPUs and writes what must not change meanwhile.
    async fn cut(&mut self, mut new: NewSnapshot) -> Result<Cut, Error> {
        let disk = [SCRATCH_OVERLAY, SCRATCH].map(|name| self.dir.file(name));
        let vmm = self.vmm()?;
        vmm.pause().await?;
        // By way of memory: QEMU says nothing but "an IO error" of a disk that is full.
        let devices = vmm.save_devices().await?;
        new.add_bytes(FileName::State, &devices)?;
        let ram = vmm.ram().ok_or(crate::vmm::QmpError::Ended)?;
        let ram = match ram {
            Ram::Shared(file) => {
                Source::Shared(file.try_clone().map_err(Error::io("share", "the guest's RAM"))?)
            }
            Ram::Private { base, pid } => {
                Source::Private(pid, base.try_clone().map_err(Error::io("share", "the guest's RAM"))?)
            }
        };
        blocking(move || {
            let [overlay, raw] = disk;
            let open = |path: &Path| {
                std::fs::File::open(path).map_err(|source| snapshot::Error::Io {
                    action: "open",
                    path: path.to_owned(),
                    source,
                })
            };
            let (ram_bytes, name, file) = match ram {
                Source::Shared(file) => (new.add_ram(&file)?.data, FileName::Scratch, open(&raw)?),
                Source::Private(pid, base) => {
                    let saved = new.add_ram_delta(&GuestMemory::of(pid, &base)?)?;
                    (saved.data_pages * snapshot::PAGE_SIZE, FileName::ScratchOverlay, open(&overlay)?)
                }
            };
            let disk_bytes = match new.add_copy(name, &file)? {
                Placed::Linked | Placed::Reflinked => 0,
                Placed::Copied => allocated(&file),
            };
            Ok(Cut { new, ram_bytes, disk_bytes })
        })
        .await
    }
}

fn describe(origin: &Origin, spec: &CheckedSpec, agent: &Agent, verb: Verb) -> Description {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Description {
        key: origin.key.clone(),
        machine: SnapshotMachine::of(spec),
        guest: origin.guest.clone(),
        agent: origin.agent.clone(),
        origin: snapshot::Origin { verb, sandbox: spec.id.clone() },
        generation: agent.generation(),
        startup_done: origin.startup_done,
        created_unix_s: since_epoch.as_secs(),
    }
}

/// Has the machine run the image's `true`: what a first program needs of the disk, and what the agent makes for one, is in
/// the RAM of every clone then.
async fn rehearse(agent: &Agent) -> Result<(), AgentError> {
    match agent.rehearse().await {
        // Its clones are slower, and otherwise the same.
        Err(AgentError::Refused { message, .. }) => {
            tracing::warn!(message, "the rehearsal did not succeed");
            Ok(())
        }
        done => done,
    }
}

/// What was written while a sandbox stood still.
struct Cut {
    new: NewSnapshot,
    ram_bytes: u64,
    disk_bytes: u64,
}

enum Source {
    Shared(std::fs::File),
    Private(u32, std::fs::File),
}

/// The root file system, where it can be linked. A copy of it would cost more than it is worth, as long as the template has it.
fn add_rootfs(new: &mut NewSnapshot, rootfs: &File, at_template: bool) -> Result<(), snapshot::Error> {
    let probe = new.path().join(template::ROOTFS_FILE);
    if at_template {
        if let Err(error) = snapshot::disk::link(rootfs, &probe) {
            tracing::info!(%error, "the root file system is not in the snapshot: it stays the template's");
            return Ok(());
        }
        std::fs::remove_file(&probe).map_err(|source| snapshot::Error::Io {
            action: "remove",
            path: probe,
            source,
        })?;
    }
    new.add_link(FileName::Rootfs, rootfs, None).map(drop)
}

/// The folder that a snapshot's folder is in.
fn parent(target: &Path) -> &Path {
    target.parent().unwrap_or(target)
}

fn allocated(file: &std::fs::File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    // In units of 512 bytes whatever the file system's are (stat(2)).
    file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}
