//! Snapshots of a running sandbox: it is held still, its RAM and disk are cut, and it goes on, or is paused.
//!
//! ```text
//!  Freeze ─► stop ─► devices, RAM, disk ─► cont ─► Thaw ─► sync, rename      snapshot, fork, template
//!                    └ links to the base before it   └──── not for pause: sync, rename, then the VMM's end
//! ```
//!
//! Firecracker writes RAM and devices by itself, and cuts the guest's connections: between its `cont` and the Thaw the agent
//! dials again.
//!
//! The folder appears by rename when everything of it is on disk. A failure at any step lets the sandbox go on as it was.

use std::cell::Cell;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envd_channel::control::Framing;
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
use crate::vmm::{Capture, Kind, Prepare, Ram};

/// How long an agent whose connections were cut may take to dial again: its guest is told when it goes on, and it dials at
/// once and then every 2 seconds at least.
const REATTACH_DEADLINE: Duration = Duration::from_secs(30);

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
        agent: &mut Agent,
        take: Take<'_>,
    ) -> Result<Kept, Error> {
        let channel = self.state.channel.as_deref().unwrap_or("no channel");
        if !["serial", "hybrid-vsock"].contains(&channel) {
            return Err(Error::Conflict(format!(
                "a sandbox with the channel {channel} cannot be snapshotted: start it with --channel serial"
            )));
        }
        spec.refuse_extras("snapshotted")?;
        let vmm = self.vmm()?.kind();
        let Some(origin) = &self.origin else { return Err(AgentError::Ended.into()) };
        let description = describe(origin, spec, vmm, agent, take.verb);
        let base = origin.base.clone();
        let target = take.target.to_owned();
        let at_template = spec.rootfs_is_at_template();
        self.reaper.sweeps(take.unfinished);
        let prepare = self.vmm()?.prepare_capture()?;
        // All that can be done while the sandbox runs.
        let new = blocking(move || {
            // What a killed one has left.
            snapshot::sweep(parent(&target))?;
            let mut new = NewSnapshot::begin(&target)?;
            match (&prepare, &base) {
                (Prepare::Base, Some(base)) => drop(new.add_base(base)?),
                (Prepare::Base, None) => {}
                (Prepare::Copy(ram), _) => drop(new.add_copy(FileName::Ram, ram)?),
                (Prepare::Empty, _) => drop(new.create(FileName::Ram)?),
            }
            if let Some(rootfs) = take.rootfs {
                let of_base = base.as_ref().and_then(|base| base.file(FileName::Rootfs));
                match (of_base, &prepare) {
                    (Some(_), Prepare::Base) => {}
                    (Some(rootfs), _) => drop(new.add_link(FileName::Rootfs, rootfs, None)?),
                    (None, _) => add_rootfs(&mut new, &rootfs, at_template)?,
                }
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
        let Cut { mut new, ram_bytes, disk_bytes } = cut?;
        going?;

        let durability = if take.verb == Verb::Fork { Durability::Volatile } else { Durability::Synced };
        let cache = take.cache.to_owned();
        let published = blocking(move || {
            // All of a RAM that a VMM has written by itself is data.
            let ram_bytes = match ram_bytes {
                Some(bytes) => bytes,
                None => new.thin_ram()?,
            };
            Ok((new.publish(description, durability, Some(&cache))?, ram_bytes))
        });
        let (folder, ram_bytes) = match published.await {
            Ok(published) => published,
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
    async fn go_on(&mut self, agent: &mut Agent) -> Result<(), Error> {
        let disconnected = self.vmm()?.take_disconnected();
        let Some(reset) = self.reset.clone().filter(|_| disconnected) else {
            self.vmm()?.resume().await?;
            return Ok(agent.thaw().await?);
        };
        reset.cut_streams();
        let door = reset.listen();
        // Whatever fails: a machine that stands still is nobody's.
        self.vmm()?.resume().await?;
        let mut door = door?;
        // The tenant is frozen: whoever dials now is the agent.
        let generation = agent.generation();
        let waiting_for = Cell::new("the agent's next connection");
        let again = async {
            let control = door.accept().await?;
            Ok(Agent::handshake(control, Framing::Lines, generation).await?.0)
        };
        match self.while_alive(REATTACH_DEADLINE, &waiting_for, again).await {
            Ok(again) => *agent = again,
            // A capture that failed at its very beginning has cut nothing.
            Err(Error::BootTimeout { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(agent.thaw().await?)
    }

    /// Stops the CPUs and writes what must not change meanwhile.
    async fn cut(&mut self, mut new: NewSnapshot) -> Result<Cut, Error> {
        let disk = [SCRATCH_OVERLAY, SCRATCH].map(|name| self.dir.file(name));
        let vmm = self.vmm()?;
        vmm.pause().await?;
        let path = new.path().to_owned();
        if vmm.writes_captures() {
            drop(new.create(FileName::State)?);
        }
        let share = |file: &File| file.try_clone().map_err(Error::io("share", "the guest's RAM"));
        let source = match vmm.capture(&path).await? {
            Capture::Written => Source::Written,
            Capture::Read { devices, ram } => {
                new.add_bytes(FileName::State, &devices)?;
                match ram {
                    Ram::Shared(file) => Source::Shared(share(file)?),
                    Ram::Private { base, pid } => Source::Private(pid, share(base)?),
                }
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
            let (ram_bytes, name, file) = match source {
                Source::Written => (None, FileName::Scratch, open(&raw)?),
                Source::Shared(file) => (Some(new.add_ram(&file)?.data), FileName::Scratch, open(&raw)?),
                Source::Private(pid, base) => {
                    let saved = new.add_ram_delta(&GuestMemory::of(pid, &base)?)?;
                    let bytes = saved.data_pages * snapshot::PAGE_SIZE;
                    (Some(bytes), FileName::ScratchOverlay, open(&overlay)?)
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

fn describe(origin: &Origin, spec: &CheckedSpec, vmm: Kind, agent: &Agent, verb: Verb) -> Description {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Description {
        key: origin.key.clone(),
        machine: SnapshotMachine::of(spec, vmm),
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
    /// Unknown where the VMM has written it.
    ram_bytes: Option<u64>,
    disk_bytes: u64,
}

enum Source {
    /// It is where it belongs.
    Written,
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
