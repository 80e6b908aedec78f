//! One sandbox, from its folder to its end.
//!
//! ```text
//!              ┌─ boot ──► Hello, Configure, start and ready command ─┐
//!  start ──plan┤                                                      ├─► Sandbox ──► stop, finish
//!              └─ restore ──► Resume, [park, configure], Thaw ────────┘      │ ▲
//!                   ▲                                                        ▼ │
//!                   └────────────────────── a folder ◄── pause │ snapshot, fork ┘
//! ```

mod fit;
mod ground;
mod host;
mod start;
mod take;

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sandbox_folder::calls::{ConfigureRequest, Taken};
use sandbox_folder::client::{Dial, SandboxClient};
use sandbox_folder::network::{NetworkReport, NetworkRequest};
use sandbox_folder::spec::SandboxSpec;
use sandbox_folder::{API_SOCKET, End, Event, Lifecycle, Start, State, VSOCK_SOCKET};
use template::{NewTemplate, SNAPSHOTS, TemplateName};
use tokio::net::UnixListener;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::agent::{Agent, AgentError};
use crate::api::{Call, Stop};
use crate::channel::Channel;
use crate::dir::SandboxDir;
use crate::snapshot::{SnapshotFolder, Verb};
use crate::spec::CheckedSpec;
use crate::timings::Timings;
use crate::{Error, api, network, startup, vsock_server};

use fit::Plan;
use ground::{Ground, LAST_WORDS_DEADLINE, Last, describe_end};
use host::Host;
use start::Purpose;
use take::{Kept, Take};

/// How long the VM may take to power off beyond the grace of its processes.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(10);

/// How long the answers to the last calls may take to be read.
const ANSWERS_DEADLINE: Duration = Duration::from_secs(1);

/// How often it is tried whether there is space again, while a machine waits for it.
const SPACE_INTERVAL: Duration = Duration::from_secs(1);

/// How long what opens a stream is waited for before a sandbox is held still.
const HOLD_DEADLINE: Duration = Duration::from_secs(1);

/// How long a stream to the agent may take to be opened. A busy machine takes seconds; a hostile one takes for ever, and a
/// call that changes the channel would wait as long.
const DIAL_DEADLINE: Duration = Duration::from_secs(60);

/// Calls on `api.sock` that wait for the one before them.
const CALL_QUEUE: usize = 8;

/// What happens on the way to a running sandbox, for whoever watches.
pub trait Watch {
    /// A step begins.
    fn step(&self, what: &str);
    /// Something that the user should know, and that is no error.
    fn notice(&self, what: &str);
}

/// What a sandbox is started for.
#[derive(Debug)]
pub enum Aim {
    /// To be somebody's.
    Run,
    /// To wait until it is made somebody's ([`Sandbox::configure`]).
    Park,
    /// To go on where it was paused.
    Resume(Arc<SnapshotFolder>),
}

/// How a guest ended that nobody had asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered itself off.
    PoweredOff,
    /// Its kernel, its agent or its VMM failed; in a sentence.
    Crashed(String),
}

/// A sandbox that somebody may use.
pub struct Sandbox {
    ground: Ground,
    spec: CheckedSpec,
    cache: PathBuf,
    channel: Arc<RwLock<Channel>>,
    agent: Agent,
    serving: Option<Serving>,
    stop: watch::Sender<Stop>,
    calls: Option<mpsc::Receiver<Call>>,
}

impl Sandbox {
    /// Brings a sandbox to life in `dir`. Whatever goes wrong, nothing of it is left but a caller's folder.
    ///
    /// `cache` keeps what can be found out again; `cancel` ends the attempt.
    pub async fn start(
        dir: SandboxDir,
        spec: CheckedSpec,
        aim: Aim,
        cache: &Path,
        cancel: &CancellationToken,
        watch: &dyn Watch,
    ) -> Result<Self, Error> {
        let mut ground = Ground::new(dir, &spec)?;
        let resumed = matches!(aim, Aim::Resume(_));
        let parked = matches!(aim, Aim::Park);
        let started = tokio::select! {
            started = begin(&mut ground, &spec, aim, cache, watch) => started,
            () = cancel.cancelled() => Err(Error::Interrupted),
        };
        let (channel, agent) = match started {
            Ok(started) => started,
            Err(error) => return Err(fail(ground, error, resumed).await),
        };
        let mut sandbox = Self {
            ground,
            spec,
            cache: cache.to_owned(),
            channel: Arc::new(RwLock::new(channel)),
            agent,
            serving: None,
            stop: watch::Sender::new(None),
            calls: None,
        };
        let ready = tokio::select! {
            ready = sandbox.become_ready(parked, resumed, watch) => ready,
            () = cancel.cancelled() => Err(Error::Interrupted),
        };
        match ready {
            Ok(()) => Ok(sandbox),
            Err(error) => Err(fail(sandbox.ground, error, resumed).await),
        }
    }

    async fn become_ready(&mut self, parked: bool, resumed: bool, watch: &dyn Watch) -> Result<(), Error> {
        if parked {
            // The way of the first call of a tenant, as far as it goes without one.
            let client = self.client();
            let waiting_for = Cell::new("the agent's answer to a client");
            let health =
                async { client.health().await.map_err(|error| AgentError::Io(io::Error::other(error))) };
            self.ground.while_alive(self.spec.boot_timeout, &waiting_for, health).await?;
            return self.listen().map(|listeners| self.serve(listeners));
        }
        // Whoever talks to the sandbox, or resumes it one day, finds here what it is.
        self.ground.dir.write_spec(&effective(&self.spec), false)?;
        // What can fail comes before the snapshot of a paused one is used up.
        let early = if resumed { Some(self.listen()?) } else { None };
        self.go(watch).await?;
        let listeners = match early {
            Some(listeners) => listeners,
            None => self.listen()?,
        };
        self.serve(listeners);
        Ok(())
    }

    /// The last steps to a sandbox that is somebody's.
    async fn go(&mut self, watch: &dyn Watch) -> Result<(), Error> {
        self.ground.thaw(&self.agent).await?;
        let template = self.spec.template.as_ref().map(|template| template.template().runtime.clone());
        if let Some(origin) = &mut self.ground.origin
            && !origin.startup_done
            && let Some(runtime) = template
        {
            if runtime.start_command.is_some() || runtime.ready_command.is_some() {
                watch.step("starting what the template starts");
                let client = client(&self.channel, self.spec.access_token.as_deref());
                let started = tokio::select! {
                    started = startup::run(&client, &runtime) => started.map_err(Error::from),
                    end = ended(&mut self.ground, &self.agent, &self.channel) => Err(match end {
                        GuestEnd::PoweredOff => Error::Ended { reason: "the guest powered off before it was ready".to_owned() },
                        GuestEnd::Crashed(reason) => Error::Ended { reason },
                    }),
                };
                started?;
                self.ground.timings.end("startup");
            }
            if let Some(origin) = &mut self.ground.origin {
                origin.startup_done = true;
            }
        }
        self.ground.state.phases = self.ground.timings.phases().to_vec();
        self.ground.enter(Event::Configured)?;
        if self.ground.state.start == Some(Start::Resumed) {
            // From here on the snapshot is of the past: going on from it again would be another life of the same sandbox.
            self.ground.dir.use_up_snapshot()?;
        }
        Ok(())
    }

    /// Its state.
    pub fn state(&self) -> &State {
        &self.ground.state
    }

    /// How long its start took.
    pub fn timings(&mut self) -> &mut Timings {
        &mut self.ground.timings
    }

    /// How long it may live from when it is somebody's.
    pub fn timeout(&self) -> Option<Duration> {
        self.spec.timeout
    }

    /// A client of it, with the token that it may need.
    pub fn client(&self) -> SandboxClient {
        client(&self.channel, self.spec.access_token.as_deref())
    }

    /// Tells when somebody asked for its end by `api.sock`, and with which grace.
    pub fn stop_requested(&self) -> watch::Receiver<Stop> {
        self.stop.subscribe()
    }

    /// The owner's calls; once.
    pub fn take_calls(&mut self) -> Option<mpsc::Receiver<Call>> {
        self.calls.take()
    }

    /// Waits for the VM's end, or the agent's, or that of the channel to it, and says how it came. Cancel safe.
    pub async fn ended(&mut self) -> GuestEnd {
        ended(&mut self.ground, &self.agent, &self.channel).await
    }

    /// Makes a parked sandbox somebody's.
    pub async fn configure(&mut self, request: ConfigureRequest, watch: &dyn Watch) -> Result<(), Error> {
        if self.ground.state.phase != Lifecycle::Parked {
            let phase = self.ground.state.phase;
            return Err(Error::Conflict(format!(
                "only a parked sandbox can be configured, this one is {phase:?}"
            )));
        }
        let mut spec = self.spec.clone();
        spec.configure(request)?;
        // Before anything of it is done: nothing fails for want of space after its processes go on.
        self.ground.dir.write_spec(&effective(&spec), false)?;
        let adopted = {
            let mut channel = self.channel.write().await;
            self.ground.adopt(&spec, &mut channel, &self.agent).await
        };
        if let Err(error) = adopted {
            if let Err(error) = self.ground.dir.write_spec(&effective(&self.spec), false) {
                tracing::warn!(%error, "spec.json is of a Configure that failed");
            }
            return Err(error);
        }
        self.ground.state.id = spec.id.clone();
        self.ground.state.labels = spec.labels.clone();
        self.spec = spec;
        self.go(watch).await
    }

    /// Writes the sandbox down and ends it: `DIR/snapshot` is whole when this returns. One that cannot be paused goes on.
    pub async fn pause(&mut self) -> Result<Taken, Error> {
        if self.ground.dir.is_ephemeral() {
            let reason =
                "its folder goes with its command: only a sandbox that was started to stay can be paused";
            return Err(Error::Conflict(reason.to_owned()));
        }
        self.ground.enter(Event::Pause)?;
        let target = self.ground.dir.snapshot();
        let folder = self.ground.dir.path().to_owned();
        let rootfs = Arc::clone(&self.spec.rootfs);
        let written = self.ground.dir.write_spec(&effective(&self.spec), true);
        let taken = match written {
            Ok(()) => {
                let take = Take {
                    verb: Verb::Pause,
                    target: &target,
                    unfinished: &folder,
                    rootfs: Some(rootfs),
                    cache: &self.cache,
                };
                let _held = self.hold_calls().await;
                self.ground.take(&self.spec, &mut self.agent, take).await
            }
            Err(error) => Err(error),
        };
        match taken {
            Ok(kept) => Ok(kept.taken),
            Err(error) => {
                self.ground.not_paused();
                Err(error)
            }
        }
    }

    /// Makes a template of the running sandbox, whose sandboxes go on from here.
    pub async fn snapshot(&mut self, path: &Path) -> Result<Taken, Error> {
        self.must_run()?;
        let (templates, name) = named(path)?;
        let Some(template) = &self.spec.template else {
            return Err(Error::Conflict("the sandbox's template is gone".to_owned()));
        };
        let mut template = template.template().clone();
        template.snapshot_only = true;
        template.machine = template::Machine {
            cpus: self.spec.cpus,
            memory_mib: self.spec.memory_mib,
            disk_mib: self.spec.disk_mib,
        };
        template.rootfs.digest = self.spec.rootfs_digest.clone();
        self.ground.reaper.sweeps(&templates);
        let new = NewTemplate::begin(&templates, &name)?;
        let source = Arc::clone(&self.spec.rootfs);
        let rootfs = new.rootfs();
        start::blocking(move || crate::snapshot::disk::link_or_copy(&source, &rootfs)).await?;
        let snapshots = new.path().join(SNAPSHOTS);
        std::fs::create_dir(&snapshots).map_err(Error::io("make the folder", &snapshots))?;
        let taken = self.keep(Verb::Snapshot, &snapshots, &templates).await?.taken;
        new.publish(&template)?;
        Ok(taken)
    }

    /// What its network does, after a change where one is asked for. A change holds also after a pause.
    pub async fn network(&mut self, change: Option<NetworkRequest>) -> Result<NetworkReport, Error> {
        let Some(mut network) = self.ground.network.take() else {
            let reason =
                "the sandbox has no network with rules: it was started without --network user or tap";
            return Err(Error::Conflict(reason.to_owned()));
        };
        let mut spec = self.spec.clone();
        let planned = change.map(|change| {
            spec.asked.network = change.over(&spec.asked.network);
            network::Plan::of(&spec.asked.network)
        });
        let changed = match planned {
            None => Ok(None),
            // First what is told to whoever resumes it: what fails has changed nothing.
            Some(Ok(plan)) => self.ground.dir.write_spec(&effective(&spec), false).map(|()| Some(plan)),
            Some(Err(error)) => Err(error),
        };
        let plan = match changed {
            Ok(plan) => plan,
            Err(error) => {
                self.ground.network = Some(network);
                return Err(error);
            }
        };
        let rules = match &plan {
            Some(network::Plan::Filtered(_, rules)) => Some(rules.clone()),
            _ => None,
        };
        let work = move || {
            let done = rules.map_or(Ok(()), |rules| network.change(&rules)).and_then(|()| network.report());
            Ok((network, done))
        };
        let (network, done) = network::blocking(work).await?;
        self.ground.network = Some(network);
        match (done, plan) {
            (Ok(report), plan) => {
                if let Some(plan) = plan {
                    self.spec = spec;
                    self.spec.network = plan;
                }
                Ok(network::report(self.spec.asked.network.clone(), report))
            }
            (Err(error), plan) => {
                if plan.is_some()
                    && let Err(error) = self.ground.dir.write_spec(&effective(&self.spec), false)
                {
                    tracing::warn!(%error, "spec.json has the rules of a change that failed");
                }
                Err(error.into())
            }
        }
    }

    /// Writes a snapshot to `path` that other sandboxes go on from, and says how they are started.
    pub async fn fork(&mut self, path: &Path) -> Result<Taken, Error> {
        self.must_run()?;
        if path.exists() {
            return Err(Error::invalid("path", format!("{} is there already", path.display())));
        }
        let unfinished = path.parent().unwrap_or(path);
        let take = Take { verb: Verb::Fork, target: path, unfinished, rootfs: None, cache: &self.cache };
        let _held = self.hold_calls().await;
        let Kept { folder, mut taken } = self.ground.take(&self.spec, &mut self.agent, take).await?;
        taken.spec = Some(SandboxSpec {
            id: None,
            hostname: None,
            access_token: None,
            labels: Default::default(),
            cpus: Some(self.spec.cpus),
            memory_mib: Some(self.spec.memory_mib),
            disk_mib: Some(self.spec.disk_mib),
            vmm: self.ground.vmm()?.kind().choice(),
            snapshot: Some(folder.path().to_owned()),
            ..effective(&self.spec)
        });
        Ok(taken)
    }

    /// Writes a snapshot of a template's machine to the folder `snapshots` of the template, which is in `unfinished` where
    /// the template is being written too.
    pub async fn keep(
        &mut self,
        verb: Verb,
        snapshots: &Path,
        unfinished: &Path,
    ) -> Result<KeptTemplate, Error> {
        let Some(origin) = &self.ground.origin else { return Err(AgentError::Ended.into()) };
        let target = snapshots.join(origin.key.folder_name());
        let take = Take { verb, target: &target, unfinished, rootfs: None, cache: &self.cache };
        let _held = self.hold_calls().await;
        let kept = self.ground.take(&self.spec, &mut self.agent, take).await?;
        Ok(KeptTemplate { path: kept.folder.path().to_owned(), taken: kept.taken })
    }

    /// Ends it in order: its processes get SIGTERM, after `grace` SIGKILL, the machine powers off. `hurry` skips the rest.
    pub async fn stop(mut self, grace: Duration, hurry: impl Future<Output = ()>) -> Result<(), Error> {
        // Nothing of a parked machine is anybody's, and its processes cannot act on a signal.
        let parked = self.ground.state.phase == Lifecycle::Parked;
        self.ground.enter(Event::Stop)?;
        let agent = &self.agent;
        let vmm = &mut self.ground.vmm;
        let power_off = async {
            match agent.shutdown(grace).await {
                // A machine that powers off at once may take its answer with it.
                Ok(()) | Err(AgentError::Ended | AgentError::Io(_)) => {}
                Err(error) => return tracing::warn!(%error, "the agent did not shut down"),
            }
            if let Some(vmm) = vmm {
                let _ = vmm.wait().await;
            }
        };
        tokio::select! {
            done = tokio::time::timeout(grace + POWER_OFF_DEADLINE, power_off), if !parked => {
                if done.is_err() {
                    tracing::warn!("the machine did not power off in time");
                }
            }
            () = hurry, if !parked => tracing::info!("the rest of the grace was skipped"),
            else => {}
        }
        self.finish(End::Stopped).await
    }

    /// Ends it at once.
    pub async fn finish(mut self, end: End) -> Result<(), Error> {
        let serving = self.serving.take().map(Serving::end);
        let ended = self.ground.finish(Last::Ended(end)).await;
        drained(serving).await;
        ended
    }

    /// Ends what runs of a sandbox that was [paused](Sandbox::pause).
    pub async fn finish_paused(mut self) -> Result<(), Error> {
        let serving = self.serving.take().map(Serving::end);
        let paused = self.ground.finish(Last::Paused).await;
        drained(serving).await;
        paused
    }

    /// Lets new calls wait for as long as the sandbox stands still; its agent would refuse them.
    async fn hold_calls(&self) -> Option<OwnedRwLockWriteGuard<Channel>> {
        let held = Arc::clone(&self.channel).write_owned();
        // A stream that is not opened in this time is the sandbox's own trouble.
        tokio::time::timeout(HOLD_DEADLINE, held).await.ok()
    }

    fn must_run(&self) -> Result<(), Error> {
        match self.ground.state.phase {
            Lifecycle::Running => Ok(()),
            phase => Err(Error::Conflict(format!("the sandbox is {phase:?}, and must be running for that"))),
        }
    }

    fn listen(&self) -> Result<Listeners, Error> {
        let listen = |name: &str| -> Result<UnixListener, Error> {
            let path = self.ground.dir.file(name);
            UnixListener::bind(&path).map_err(Error::io("listen on", path))
        };
        Ok(Listeners { api: listen(API_SOCKET)?, vsock: listen(VSOCK_SOCKET)? })
    }

    fn serve(&mut self, listeners: Listeners) {
        let (calls, received) = mpsc::channel(CALL_QUEUE);
        self.calls = Some(received);
        let end = CancellationToken::new();
        let (state, stop) = (self.ground.changes.subscribe(), self.stop.clone());
        let api = api::serve(listeners.api, state, stop, calls, end.clone());
        let vsock = vsock_server::serve(listeners.vsock, dial(&self.channel));
        let [api, vsock] = [tokio::spawn(api), tokio::spawn(vsock)].map(AbortOnDropHandle::new);
        self.serving = Some(Serving { api, vsock, end });
    }
}

/// What serves the sockets of a sandbox's folder.
struct Serving {
    api: AbortOnDropHandle<()>,
    vsock: AbortOnDropHandle<()>,
    end: CancellationToken,
}

impl Serving {
    /// Takes no more calls, and cuts clients of the agent off.
    fn end(self) -> AbortOnDropHandle<()> {
        self.end.cancel();
        self.vsock.abort();
        self.api
    }
}

/// Gives those who have called the time to get their answers.
async fn drained(api: Option<AbortOnDropHandle<()>>) {
    if let Some(api) = api {
        // Whoever does not read its answer is not waited for.
        let _ = tokio::time::timeout(ANSWERS_DEADLINE, api).await;
    }
}

/// The sockets of a sandbox's folder.
struct Listeners {
    api: UnixListener,
    vsock: UnixListener,
}

/// What a sandbox is, for whoever starts it again.
fn effective(spec: &CheckedSpec) -> SandboxSpec {
    SandboxSpec { id: Some(spec.id.clone()), ..spec.asked.clone() }
}

/// A snapshot of a template's machine.
#[derive(Debug)]
pub struct KeptTemplate {
    /// Its folder.
    pub path: PathBuf,
    /// What taking it cost.
    pub taken: Taken,
}

async fn begin(
    ground: &mut Ground,
    spec: &CheckedSpec,
    aim: Aim,
    cache: &Path,
    watch: &dyn Watch,
) -> Result<(Channel, Agent), Error> {
    watch.step("preparing the sandbox");
    spec.network.check()?;
    let host = Host::find(spec, cache, watch).await?;
    ground.timings.end("probe");
    let (plan, purpose) = match aim {
        Aim::Resume(snapshot) => {
            fit::check_resume(&snapshot, &host)?;
            (Plan::Clone(snapshot), Purpose::Same)
        }
        Aim::Run => (fit::plan(spec, &host, watch)?, Purpose::Clone),
        Aim::Park => (fit::plan(spec, &host, watch)?, Purpose::Park),
    };
    match plan {
        Plan::Boot(why) => {
            ground.state.booted_because = why;
            ground.boot(spec, &host, purpose == Purpose::Park, watch).await
        }
        Plan::Clone(snapshot) => {
            ground.timings.end("snapshot");
            ground.restore(spec, &host, snapshot, purpose, watch).await
        }
    }
}

/// Ends what there is of a sandbox that did not start. A paused one that could not be resumed is still paused.
async fn fail(ground: Ground, error: Error, resumed: bool) -> Error {
    let message = error.to_string();
    tracing::error!(message, "the sandbox did not start");
    let still_paused = resumed && ground.dir.snapshot().exists();
    let last = match (still_paused, &error) {
        (true, _) => Last::StillPaused,
        // Nothing failed: somebody has asked for it.
        (false, Error::Interrupted) => Last::Ended(End::Stopped),
        (false, _) => Last::Ended(End::Failed { message }),
    };
    match ground.finish(last).await {
        Ok(()) => error,
        Err(error) => error,
    }
}

async fn ended(ground: &mut Ground, agent: &Agent, channel: &RwLock<Channel>) -> GuestEnd {
    let Some(vmm) = &mut ground.vmm else { return GuestEnd::Crashed("the VM is gone".to_owned()) };
    let mut stalled = vmm.stalled();
    let reason = loop {
        tokio::select! {
            status = vmm.wait() => return describe_end(status, vmm).await,
            reason = agent.ended() => break format!("the agent is gone: {reason}"),
            reason = broken(channel) => break format!("the channel to the agent broke: {reason}"),
            () = wait_stalled(&mut stalled) => {
                tracing::warn!("the sandbox stands still: there is no space for what it writes");
                if let Err(error) = vmm.resume().await {
                    tracing::warn!(%error, "the sandbox cannot go on");
                }
            }
        }
    };
    // A machine that ends closes its connection first: the VMM's status says more.
    match tokio::time::timeout(LAST_WORDS_DEADLINE, vmm.wait()).await {
        Ok(status) => describe_end(status, vmm).await,
        Err(_) => GuestEnd::Crashed(reason),
    }
}

/// Returns when no client can reach the agent any more.
async fn broken(channel: &RwLock<Channel>) -> String {
    let broken = channel.read().await.broken();
    if let Some(mut broken) = broken
        && let Ok(reason) = broken.wait_for(Option::is_some).await
    {
        return reason.clone().unwrap_or_default();
    }
    // It was ended, or cannot break as a whole.
    std::future::pending().await
}

/// Returns when it is time to try whether there is space again for a machine that stands still for want of it.
async fn wait_stalled(stalled: &mut watch::Receiver<bool>) {
    ground::stands_still(stalled).await;
    tokio::time::sleep(SPACE_INTERVAL).await;
}

fn dial(channel: &Arc<RwLock<Channel>>) -> Dial {
    let channel = Arc::clone(channel);
    Arc::new(move |port| {
        let channel = Arc::clone(&channel);
        Box::pin(async move {
            let channel = channel.read().await;
            let late = || io::Error::new(io::ErrorKind::TimedOut, "the agent did not take the stream");
            tokio::time::timeout(DIAL_DEADLINE, channel.dial(port)).await.unwrap_or_else(|_| Err(late()))
        })
    })
}

fn client(channel: &Arc<RwLock<Channel>>, token: Option<&str>) -> SandboxClient {
    let client = SandboxClient::new(dial(channel));
    match token {
        Some(token) => client.with_token(token),
        None => client,
    }
}

/// The folder and the name of a template that is to be made.
fn named(path: &Path) -> Result<(PathBuf, TemplateName), Error> {
    let expected =
        || Error::invalid("path", format!("expected the path of a new template, got {}", path.display()));
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(expected)?;
    let name = name.parse().map_err(|error| Error::invalid("template name", format!("{error}")))?;
    if path.exists() {
        return Err(Error::invalid("path", format!("{} is there already", path.display())));
    }
    Ok((path.parent().ok_or_else(expected)?.to_owned(), name))
}
