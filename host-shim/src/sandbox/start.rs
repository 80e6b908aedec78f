//! How a machine comes to life: booted, or restored as a clone or as the sandbox that was paused.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use envd_channel::control::Framing;
use envd_proto::FIRST_GENERATION;
use envd_proto::control::resume::Kind;
use envd_proto::control::{Configure, Hello, Resume, Resumed};
use sandbox_folder::{Event, Start};
use template::ROOTFS_FILE;

use super::Watch;
use super::ground::{Ground, Origin};
use super::host::Host;
use crate::agent::{Agent, AgentError, printable};
use crate::channel::{self, Channel};
use crate::dir::{BASE, SCRATCH, SCRATCH_OVERLAY, VMM, VMM_LOG};
use crate::snapshot::{self, FileName, GuestMemory, SnapshotFolder};
use crate::spec::CheckedSpec;
use crate::vmm::{
    Boot, Files, Kind as VmmKind, Netdev, Place, Scratch, SnapshotFiles, VmSpec, Vmm, parts, qemu,
};
use crate::{Error, network, scratch};

/// Random bytes for the guest's kernel: as many as its pool takes at once.
const SEED_BYTES: usize = 64;

/// Parts and hooks of a Resume that are looked at. There are a dozen parts; of more hooks than that the agent's log tells.
const MAX_PARTS: usize = 64;

/// Parts of a Resume without which a clone must not run: it would draw its source's random numbers, or serve its clients.
const VITAL_PARTS: [&str; 4] = ["seed", "session", "network", "scratch"];

/// What a machine is restored for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Somebody's sandbox, at once.
    Clone,
    /// A sandbox for somebody who is not known yet.
    Park,
    /// The sandbox that was paused.
    Same,
}

impl Ground {
    /// Boots and configures a machine. With `park` it waits for its Configure.
    pub(super) async fn boot(
        &mut self,
        spec: &CheckedSpec,
        host: &Host,
        park: bool,
        watch: &dyn Watch,
    ) -> Result<(Channel, Agent), Error> {
        let guest = host.guest(spec)?;
        let disk = self.dir.file(SCRATCH);
        scratch::make(&disk, spec.disk_mib, &spec.id)?;
        self.timings.end("scratch");
        let boot = Boot {
            kernel: host.kernel.clone(),
            guest_image: host.guest_image.clone(),
            profile: spec.profile,
            init: spec.init.clone(),
            volumes: spec.volumes.clone(),
        };
        watch.step("booting the virtual machine");
        let mut prepared = self.launch(spec, host, Some(boot), Scratch::Raw(disk), None).await?;
        self.boot_vm(spec.boot_timeout).await?;

        let waiting_for = Cell::new("the agent's connection");
        let ready = async {
            let control = prepared.control().await?;
            waiting_for.set("the agent's Hello");
            let framing = prepared.control_framing();
            let handshake = async {
                let greeted = Agent::handshake(control, framing, FIRST_GENERATION).await?;
                waiting_for.set("the start of the stream multiplexer");
                Ok::<_, AgentError>(greeted)
            };
            let channel = async { prepared.open(FIRST_GENERATION).await.map_err(AgentError::Io) };
            tokio::try_join!(handshake, channel)
        };
        let ((agent, hello), channel) = self.while_alive(spec.boot_timeout, &waiting_for, ready).await?;
        self.timings.end_boot(&hello);
        self.origin = Some(Origin {
            key: host.key.clone(),
            guest,
            agent: agent_version(&hello),
            startup_done: false,
            base: None,
        });
        self.state.start = Some(Start::Booted);
        self.hello(&hello)?;
        if park {
            self.state.phases = self.timings.phases().to_vec();
            self.enter(Event::Parked)?;
            return Ok((channel, agent));
        }

        watch.step("configuring the sandbox");
        if let Err(error) = agent.configure(self.configure(spec)).await {
            return Err(self.explain(error.into()).await);
        }
        self.timings.end("configure");
        Ok((channel, agent))
    }

    /// Restores a machine. A clone's processes may go on already; the others stand still until [`Ground::thaw`].
    pub(super) async fn restore(
        &mut self,
        spec: &CheckedSpec,
        host: &Host,
        snapshot: Arc<SnapshotFolder>,
        purpose: Purpose,
        watch: &dyn Watch,
    ) -> Result<(Channel, Agent), Error> {
        watch.step("restoring the virtual machine");
        let made = snapshot.manifest().description.clone();
        let file = |name| open_file(&snapshot, name);
        let (ram, state, base) = (file(FileName::Ram)?, file(FileName::State)?, file(FileName::Scratch)?);
        let disk_mib = spec.disk_mib.max(made.machine.disk_mib);
        let grow = disk_mib > made.machine.disk_mib;
        let ram_base = ram.try_clone().map_err(Error::io("share", snapshot.path()))?;
        let (scratch, scratch_base) = match host.vmm.kind {
            VmmKind::Qemu => (self.overlay(&snapshot, &base)?, Some(base)),
            VmmKind::Firecracker => (self.copy(&base, made.machine.disk_mib, disk_mib)?, None),
        };
        self.timings.end("scratch");
        let files = SnapshotFiles { ram, state, scratch_base };
        let mut prepared = self.launch(spec, host, None, scratch, Some(files)).await?;
        if snapshot.has_delta() {
            // Before the devices, which look for the state of their queues in the RAM.
            if let Err(error) = self.vmm()?.made().await {
                return Err(self.explain(error).await);
            }
            let pid = self.vmm()?.pid().ok_or(AgentError::Ended)?;
            let delta = Arc::clone(&snapshot);
            blocking(move || delta.apply_delta(&GuestMemory::of(pid, &ram_base)?)).await?;
            self.timings.end("delta");
        }
        if let Err(error) = self.vmm()?.load().await {
            return Err(self.explain(error).await);
        }
        self.timings.end("load");
        let vmm = self.vmm()?;
        let mut going = vmm.resume().await;
        if grow && going.is_ok() {
            going = vmm.resize_scratch(disk_mib << 20).await;
        }
        if let Err(error) = going {
            return Err(self.explain(error).await);
        }
        self.origin = Some(Origin {
            key: made.key,
            guest: made.guest,
            agent: made.agent,
            startup_done: made.startup_done,
            base: Some(snapshot),
        });

        let mut request = match purpose {
            Purpose::Same => resume(Kind::Same, None)?,
            Purpose::Clone | Purpose::Park => resume(Kind::Clone, Some(self.configure(spec)))?,
        };
        // What else its start needs comes after it, and cannot undo what its processes do. One that was paused stands still
        // until nothing can fail any more, so that its snapshot stays what it is.
        request.thaw = purpose == Purpose::Clone;
        if let Some(configure) = request.configure.as_mut().filter(|_| grow) {
            configure.scratch_bytes = disk_mib << 20;
        }
        let waiting_for = Cell::new("the agent's connection");
        let resumed = async {
            let control = prepared.control().await?;
            let agent = match prepared.control_framing() {
                Framing::Records => Agent::restored(control, made.generation),
                // It dials again, and says who it was.
                framing => Agent::handshake(control, framing, made.generation).await?.0,
            };
            waiting_for.set("the agent's answer to the Resume");
            let (hello, resumed) = agent.resume(request).await?;
            waiting_for.set("the start of the stream multiplexer");
            let channel = prepared.open(agent.generation()).await?;
            Ok((agent, hello, resumed, channel))
        };
        let resumed = self.while_alive(spec.boot_timeout, &waiting_for, resumed).await;
        let (agent, hello, resumed, channel) = resumed?;
        self.timings.end("resume");
        check(&resumed)?;
        self.thawed = resumed.thawed;
        self.state.start = Some(if purpose == Purpose::Same { Start::Resumed } else { Start::Cloned });
        self.hello(&hello)?;
        if purpose == Purpose::Park {
            watch.step("rehearsing");
            match agent.rehearse().await {
                Ok(()) => {}
                // It will be slower, and is a sandbox like any other.
                Err(AgentError::Refused { message, .. }) => {
                    tracing::warn!(message, "the rehearsal did not succeed");
                }
                Err(error) => return Err(self.explain(error.into()).await),
            }
            self.timings.end("rehearse");
            self.state.phases = self.timings.phases().to_vec();
            self.enter(Event::Parked)?;
        }
        Ok((channel, agent))
    }

    /// Makes a parked machine what `spec` says. It stands still until [`Ground::thaw`].
    pub(super) async fn adopt(
        &mut self,
        spec: &CheckedSpec,
        channel: &mut Channel,
        agent: &Agent,
    ) -> Result<(), Error> {
        if self.state.start == Some(Start::Booted) {
            let done = agent.configure(self.configure(spec)).await;
            return match done {
                Ok(()) => Ok(()),
                Err(error) => Err(self.explain(error.into()).await),
            };
        }
        let mut request = resume(Kind::Clone, Some(self.configure(spec)))?;
        request.thaw = true;
        let again = async {
            channel.end().await;
            let (hello, resumed) = agent.resume(request).await?;
            channel.reopen(agent.generation()).await?;
            Ok((hello, resumed))
        };
        let waiting_for = Cell::new("the agent's answer to the Resume");
        let (hello, resumed) = self.while_alive(spec.boot_timeout, &waiting_for, again).await?;
        check(&resumed)?;
        self.thawed = resumed.thawed;
        self.state.generation = Some(hello.generation);
        Ok(())
    }

    /// The tenant's processes go on: it is somebody's sandbox. A booted one was not held.
    pub(super) async fn thaw(&mut self, agent: &Agent) -> Result<(), Error> {
        if self.state.start != Some(Start::Booted) && !self.thawed {
            if let Err(error) = agent.thaw().await {
                return Err(self.explain(error.into()).await);
            }
            self.timings.end("thaw");
        }
        Ok(())
    }

    /// The scratch disk of a machine of QEMU's: what differs from the snapshot's.
    fn overlay(&self, snapshot: &SnapshotFolder, base: &File) -> Result<Scratch, Error> {
        self.link_base(snapshot);
        let overlay = self.dir.file(SCRATCH_OVERLAY);
        let device_bytes = snapshot.manifest().description.machine.disk_mib << 20;
        match snapshot.file(FileName::ScratchOverlay) {
            Some(of_snapshot) => drop(snapshot::disk::copy_sparse(of_snapshot, &overlay)?),
            None => {
                let base_bytes = base.metadata().map_err(Error::io("read", &overlay))?.len();
                snapshot::disk::overlay(&overlay, device_bytes, base_bytes)?;
            }
        }
        Ok(Scratch::Overlay(overlay))
    }

    /// The scratch disk of a machine of Firecracker's, which knows no overlays. It finds the size that the machine knows when it
    /// is restored, and the larger one when it is told of it.
    fn copy(&self, base: &File, known_mib: u64, mib: u64) -> Result<Scratch, Error> {
        let disk = self.dir.file(SCRATCH);
        snapshot::disk::copy_sparse(base, &disk)?;
        let sized =
            File::options().write(true).open(&disk).and_then(|file| file.set_len(mib.max(known_mib) << 20));
        sized.map_err(Error::io("grow", &disk))?;
        Ok(Scratch::Raw(disk))
    }

    /// Has a machine that is launched boot, where that takes the VMM's ear.
    async fn boot_vm(&mut self, deadline: Duration) -> Result<(), Error> {
        let booted = {
            let vmm = self.vmm()?;
            tokio::time::timeout(deadline, vmm.boot()).await
        };
        match booted {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.explain(error).await),
            Err(_) => {
                let console = self.vmm()?.last_words().await;
                Err(Error::BootTimeout { deadline, waiting_for: "the start of the machine", console })
            }
        }
    }

    async fn launch(
        &mut self,
        spec: &CheckedSpec,
        host: &Host,
        boot: Option<Boot>,
        scratch: Scratch,
        snapshot: Option<SnapshotFiles>,
    ) -> Result<channel::Prepared, Error> {
        let sockets = self.dir.file(VMM);
        std::fs::create_dir(&sockets).map_err(Error::io("make the folder", &sockets))?;
        let mut prepared = channel::Prepared::new(host.vmm.kind, spec.channel, &sockets).await?;
        self.helper = prepared.helper.take();
        self.reset = prepared.reset();
        self.state.accelerator = Some(host.accelerator.name().to_owned());
        self.state.channel = Some(prepared.name().to_owned());
        self.timings.end("channel");
        let (tap, netdev) = self.network(spec).await?;
        let vm = VmSpec {
            boot,
            // The very file that the spec was checked with: its template may have been replaced since.
            rootfs: format!("/proc/self/fd/{}", qemu::ROOTFS_FD).into(),
            scratch,
            disks: parts::pack(&spec.disks, &sockets)?,
            network: netdev,
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            accelerator: host.accelerator,
            wiring: prepared.wiring.clone(),
        };
        let rootfs = spec.rootfs.try_clone().map_err(Error::io("share", "the root file system"))?;
        self.link_rootfs(&rootfs);
        let files = Files { rootfs, snapshot, tap, channel: std::mem::take(&mut prepared.fds) };
        let place = Place {
            sockets,
            console_log: self.dir.file("console.log"),
            vmm_log: self.dir.file(VMM_LOG),
            id: spec.id.clone(),
        };
        let vmm = Vmm::launch(&host.vmm, &host.key.vmm_version, &vm, files, place).await?;
        self.state.vmm_pid = self.vmm.insert(vmm).pid();
        self.enter(Event::Spawned)?;
        Ok(prepared)
    }

    /// Makes the network afresh, the same for every guest: the TAP for its VMM, and what is behind its device.
    async fn network(&mut self, spec: &CheckedSpec) -> Result<(Option<OwnedFd>, Netdev), Error> {
        match spec.network.start().await? {
            Some((network, tap)) => {
                if network.guest_resolvers().is_empty() {
                    tracing::warn!(
                        "this host has no resolver that others can ask: the sandbox has none (--dns)"
                    );
                }
                self.network = Some(network);
                self.timings.end("network");
                Ok((Some(tap), Netdev::Tap))
            }
            None if spec.network == network::Plan::Slirp => Ok((None, Netdev::Slirp)),
            // Of this one there is no snapshot, whose clone could have a network.
            None if spec.has_extras() => Ok((None, Netdev::Absent)),
            None => Ok((None, Netdev::Nothing)),
        }
    }

    /// What the agent is told of the sandbox.
    fn configure(&self, spec: &CheckedSpec) -> Configure {
        Configure { network: self.network.as_ref().map(network::of_guest), ..configure(spec) }
    }

    /// Links in the sandbox's own folder, so that its snapshots share the base's files also when the snapshot is replaced or
    /// removed while it runs. Where there can be no link a later snapshot copies them.
    fn link_base(&self, snapshot: &SnapshotFolder) {
        let base = self.dir.file(BASE);
        let linked = std::fs::create_dir(&base).and_then(|()| {
            for name in [FileName::Ram, FileName::Scratch] {
                if let Some(file) = snapshot.file(name) {
                    snapshot::disk::link(file, &base.join(name.as_str()))?;
                }
            }
            Ok(())
        });
        if let Err(error) = linked {
            tracing::info!(%error, "the snapshot's files cannot be linked: this sandbox's own would be copies");
        }
    }

    /// As [`Ground::link_base`], for the file that the VMM reads.
    fn link_rootfs(&self, rootfs: &File) {
        let base = self.dir.file(BASE);
        let linked = match std::fs::create_dir(&base) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            _ => snapshot::disk::link(rootfs, &base.join(ROOTFS_FILE)).map_err(Into::into),
        };
        if let Err(error) = linked {
            tracing::info!(%error, "the root file system cannot be linked: it is the template's as long as that has it");
        }
    }

    fn hello(&mut self, hello: &Hello) -> Result<(), Error> {
        self.state.agent_version = Some(agent_version(hello).version);
        self.state.generation = Some(hello.generation);
        self.enter(Event::Hello)
    }
}

/// Work that blocks, beside the runtime's only thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, snapshot::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn open_file(snapshot: &SnapshotFolder, name: FileName) -> Result<File, Error> {
    let file = snapshot.file(name).ok_or_else(|| {
        let reason = format!("{} has no {name:?}", snapshot.path().display());
        Error::invalid("snapshot", reason)
    })?;
    // A reader of its own: the VMM reads the device state from where the descriptor stands.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    File::open(path).map_err(Error::io("open", snapshot.path()))
}

fn resume(kind: Kind, configure: Option<Configure>) -> Result<Resume, Error> {
    let mut seed = vec![0; SEED_BYTES];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("read random bytes from", "getrandom(2)")(error.into()))?;
    Ok(Resume {
        kind: kind.into(),
        generation: 0,
        seed,
        unix_time_ns: unix_time_ns(),
        configure,
        thaw: false,
    })
}

/// What failed in a Resume: told, and where the sandbox would not be its own, an error.
fn check(resumed: &Resumed) -> Result<(), Error> {
    for part in resumed.parts.iter().take(MAX_PARTS) {
        let (name, error) = (printable(&part.name), printable(&part.error));
        tracing::debug!(part = name, us = part.duration_us, "a part of the Resume is done");
        if part.error.is_empty() {
            continue;
        }
        tracing::warn!(part = name, error, "a part of the Resume failed");
        if VITAL_PARTS.contains(&name.as_str()) {
            let reason = format!("its {name} could not be renewed: {error}");
            return Err(Error::Boot { reason, console: String::new() });
        }
    }
    for hook in resumed.hooks.iter().filter(|hook| !hook.error.is_empty()).take(MAX_PARTS) {
        let (hook, error) = (printable(&hook.name), printable(&hook.error));
        tracing::warn!(hook, error, "a hook of the image failed");
    }
    Ok(())
}

fn agent_version(hello: &Hello) -> snapshot::AgentVersion {
    snapshot::AgentVersion {
        version: hello.agent_version.chars().filter(|c| !c.is_control()).take(64).collect(),
        protocol: hello.protocol_version,
    }
}

fn configure(spec: &CheckedSpec) -> Configure {
    Configure {
        sandbox_id: spec.id.to_string(),
        template_id: spec.rootfs_digest.to_string(),
        hostname: spec.hostname.clone(),
        env: spec.env.clone().into_iter().collect(),
        default_user: spec.user.clone(),
        default_workdir: spec.workdir.clone(),
        access_token: spec.access_token.clone(),
        unix_time_ns: unix_time_ns(),
        ..Configure::default()
    }
}

fn unix_time_ns() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_nanos()).unwrap_or(0)
}
