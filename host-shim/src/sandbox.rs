//! One sandbox, from its folder to its end.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use envd_proto::FIRST_GENERATION;
use envd_proto::control::{Configure, Hello};
use sandbox_folder::client::{Dial, SandboxClient};
use sandbox_folder::spec::AcceleratorChoice;
use sandbox_folder::{API_SOCKET, End, Event, Lifecycle, STATE_VERSION, State, VSOCK_SOCKET};
use tokio::net::UnixListener;
use tokio::process::Child;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::agent::{Agent, AgentError};
use crate::api::Stop;
use crate::channel::{self, Channel};
use crate::dir::SandboxDir;
use crate::reaper::Reaper;
use crate::spec::CheckedSpec;

use crate::timings::Timings;
use crate::vmm::kvm_probe::{self, Kvm};
use crate::vmm::{self, Accelerator, VmSpec, Vmm, qemu};
use crate::{Error, api, scratch, tools, vsock_server};

/// How long the VM may take to power off beyond the grace of its processes.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(10);

/// How long a failed agent may take to power its machine off, so that its last words arrive.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(3);

/// What happens on the way to a running sandbox, for whoever watches.
pub trait Watch {
    /// A step begins.
    fn step(&self, what: &str);
    /// Something that the user should know, and that is no error.
    fn notice(&self, what: &str);
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
    channel: Arc<Channel>,
    agent: Agent,
    token: Option<String>,
    serving: Vec<AbortOnDropHandle<()>>,
    stop: watch::Sender<Stop>,
}

/// What a sandbox stands on; there from the beginning to the end, whatever fails between.
struct Ground {
    dir: SandboxDir,
    reaper: Reaper,
    state: State,
    changes: watch::Sender<State>,
    timings: Timings,
    vmm: Option<Vmm>,
    helper: Option<Child>,
}

impl Sandbox {
    /// Boots and configures a sandbox in `dir`. Whatever goes wrong, nothing of it is left but a caller's folder.
    ///
    /// `cache` keeps what can be found out again; `cancel` ends the attempt.
    pub async fn boot(
        dir: SandboxDir,
        spec: CheckedSpec,
        cache: &Path,
        cancel: &CancellationToken,
        watch: &dyn Watch,
    ) -> Result<Self, Error> {
        let mut ground = Ground::new(dir, &spec)?;
        let booted = tokio::select! {
            booted = ground.boot(&spec, cache, watch) => booted,
            () = cancel.cancelled() => Err(Error::Interrupted),
        };
        let (channel, agent) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                let message = error.to_string();
                tracing::error!(message, "the sandbox did not start");
                ground.finish(End::Failed { message }).await?;
                return Err(error);
            }
        };
        let stop = watch::Sender::new(None);
        let mut sandbox = Self {
            ground,
            channel: Arc::new(channel),
            agent,
            token: spec.access_token,
            serving: Vec::new(),
            stop,
        };
        if let Err(error) = sandbox.serve() {
            sandbox.finish(End::Failed { message: error.to_string() }).await?;
            return Err(error);
        }
        Ok(sandbox)
    }

    /// Its state.
    pub fn state(&self) -> &State {
        &self.ground.state
    }

    /// How long its start took.
    pub fn timings(&mut self) -> &mut Timings {
        &mut self.ground.timings
    }

    /// A client of it, with the token that it may need.
    pub fn client(&self) -> SandboxClient {
        let client = SandboxClient::new(self.dial());
        match &self.token {
            Some(token) => client.with_token(token),
            None => client,
        }
    }

    /// Tells when somebody asked for its end by `api.sock`, and with which grace.
    pub fn stop_requested(&self) -> watch::Receiver<Stop> {
        self.stop.subscribe()
    }

    /// Waits for the VM's end, or the agent's, and says how it came. Cancel safe.
    pub async fn ended(&mut self) -> GuestEnd {
        let Some(vmm) = &mut self.ground.vmm else { return GuestEnd::Crashed("the VM is gone".to_owned()) };
        let reason = tokio::select! {
            status = vmm.wait() => return describe_end(status, vmm).await,
            reason = self.agent.ended() => reason,
        };
        // A machine that ends closes its connection first: the VMM's status says more.
        match tokio::time::timeout(LAST_WORDS_DEADLINE, vmm.wait()).await {
            Ok(status) => describe_end(status, vmm).await,
            Err(_) => GuestEnd::Crashed(format!("the agent is gone: {reason}")),
        }
    }

    /// Ends it in order: its processes get SIGTERM, after `grace` SIGKILL, the machine powers off. `hurry` skips the rest.
    pub async fn stop(mut self, grace: Duration, hurry: impl Future<Output = ()>) -> Result<(), Error> {
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
            done = tokio::time::timeout(grace + POWER_OFF_DEADLINE, power_off) => {
                if done.is_err() {
                    tracing::warn!("the machine did not power off in time");
                }
            }
            () = hurry => tracing::info!("the rest of the grace was skipped"),
        }
        self.finish(End::Stopped).await
    }

    /// Ends it at once.
    pub async fn finish(mut self, end: End) -> Result<(), Error> {
        self.serving.clear();
        self.ground.finish(end).await
    }

    fn dial(&self) -> Dial {
        let channel = Arc::clone(&self.channel);
        Arc::new(move |port| {
            let channel = Arc::clone(&channel);
            Box::pin(async move { channel.dial(port).await })
        })
    }

    fn serve(&mut self) -> Result<(), Error> {
        let listen = |name: &str| -> Result<UnixListener, Error> {
            let path = self.ground.dir.file(name);
            UnixListener::bind(&path).map_err(Error::io("listen on", path))
        };
        let api = api::serve(listen(API_SOCKET)?, self.ground.changes.subscribe(), self.stop.clone());
        let vsock = vsock_server::serve(listen(VSOCK_SOCKET)?, self.dial());
        self.serving =
            vec![AbortOnDropHandle::new(tokio::spawn(api)), AbortOnDropHandle::new(tokio::spawn(vsock))];
        Ok(())
    }
}

impl Ground {
    fn new(dir: SandboxDir, spec: &CheckedSpec) -> Result<Self, Error> {
        let reaper = Reaper::start(dir.path())?;
        let state = State {
            schema_version: STATE_VERSION,
            id: spec.id.clone(),
            phase: Lifecycle::Created,
            shim_pid: std::process::id(),
            vmm_pid: None,
            accelerator: None,
            channel: None,
            agent_version: None,
            phases: Vec::new(),
            labels: spec.labels.clone(),
            end: None,
        };
        dir.write_state(&state)?;
        let changes = watch::Sender::new(state.clone());
        Ok(Self { dir, reaper, state, changes, timings: Timings::default(), vmm: None, helper: None })
    }

    async fn boot(
        &mut self,
        spec: &CheckedSpec,
        cache: &Path,
        watch: &dyn Watch,
    ) -> Result<(Channel, Agent), Error> {
        watch.step("preparing the sandbox");
        let qemu = qemu::find()?;
        let kernel = tools::kernel(spec.kernel.as_deref())?;
        let guest_image = tools::guest_image(spec.guest_image.as_deref())?;
        let scratch = self.dir.file("scratch.ext4");
        scratch::make(&scratch, spec.disk_mib, &spec.id)?;
        self.timings.end("scratch");
        let accelerator = choose(spec.accelerator, &qemu, &kernel, cache, watch).await?;
        self.timings.end("probe");
        let sockets = self.dir.file("vmm");
        std::fs::create_dir(&sockets).map_err(Error::io("make the folder", &sockets))?;
        let mut prepared = channel::Prepared::new(spec.channel, &sockets).await?;
        self.helper = prepared.helper.take();
        self.state.accelerator = Some(accelerator.name().to_owned());
        self.state.channel = Some(prepared.name().to_owned());
        let vm = VmSpec {
            kernel,
            guest_image,
            rootfs: absolute(spec.template.rootfs())?,
            scratch,
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            accelerator,
            wiring: prepared.wiring.clone(),
            profile: spec.profile,
            init: spec.init.clone(),
            volumes: spec.volumes.clone(),
        };
        self.timings.end("channel");

        watch.step("booting the virtual machine");
        let fds = std::mem::take(&mut prepared.fds);
        let vmm = self.vmm.insert(qemu::launch(&qemu, &vm, fds, self.dir.file("console.log"))?);
        self.state.vmm_pid = vmm.pid();
        self.enter(Event::Spawned)?;
        let (agent, hello, channel) = self.wait_ready(prepared, spec.boot_timeout).await?;
        self.timings.end_boot(&hello);
        self.state.agent_version =
            Some(hello.agent_version.chars().filter(|c| !c.is_control()).take(64).collect());
        self.enter(Event::Hello)?;

        watch.step("configuring the sandbox");
        let configured = agent.configure(configure(spec)).await;
        if let Err(error) = configured {
            return Err(self.explain(error).await);
        }
        self.timings.end("configure");
        self.state.phases = self.timings.phases().to_vec();
        self.enter(Event::Configured)?;
        Ok((channel, agent))
    }

    /// Waits for the Hello and the channel, as long as the VM lives and the deadline allows.
    async fn wait_ready(
        &mut self,
        mut prepared: channel::Prepared,
        deadline: Duration,
    ) -> Result<(Agent, Hello, Channel), Error> {
        let Some(vmm) = &mut self.vmm else { return Err(AgentError::Ended.into()) };
        let waiting_for = std::cell::Cell::new("the agent's connection");
        let ready = async {
            let control = prepared.control().await?;
            waiting_for.set("the agent's Hello");
            let framing = prepared.control_framing();
            let handshake = async {
                let (agent, hello) = Agent::handshake(control, framing, FIRST_GENERATION).await?;
                waiting_for.set("the start of the stream multiplexer");
                Ok::<_, AgentError>((agent, hello))
            };
            let ((agent, hello), channel) =
                tokio::try_join!(handshake, async { prepared.open().await.map_err(AgentError::Io) })?;
            Ok::<_, AgentError>((agent, hello, channel))
        };
        tokio::select! {
            // Its last message may have arrived together with its end, and says more.
            biased;
            ready = ready => match ready {
                Ok(ready) => Ok(ready),
                Err(error) => Err(self.explain(error).await),
            },
            status = vmm.wait() => {
                let console = vmm.last_words().await;
                Err(Error::Boot { reason: vmm::cause_of_end(status?, &console), console })
            }
            () = tokio::time::sleep(deadline) => {
                let console = vmm.last_words().await;
                Err(Error::BootTimeout { deadline, waiting_for: waiting_for.get(), console })
            }
        }
    }

    /// An agent's failure with what the console says about it.
    async fn explain(&mut self, error: AgentError) -> Error {
        let Some(vmm) = &mut self.vmm else { return error.into() };
        let status = tokio::time::timeout(LAST_WORDS_DEADLINE, vmm.wait()).await;
        let console = vmm.last_words().await;
        let reason = match (error, status) {
            // A connection that ended with its machine: the machine's end is the cause.
            (AgentError::Ended | AgentError::Io(_), Ok(Ok(status))) => vmm::cause_of_end(status, &console),
            (error, _) => error.to_string(),
        };
        Error::Boot { reason, console }
    }

    fn enter(&mut self, event: Event) -> Result<(), Error> {
        self.state.phase =
            self.state.phase.after(event).map_err(|error| Error::invalid("request", error.to_string()))?;
        tracing::info!(phase = ?self.state.phase, vmm_pid = self.state.vmm_pid, "the sandbox's life goes on");
        self.dir.write_state(&self.state)?;
        self.changes.send_replace(self.state.clone());
        Ok(())
    }

    async fn finish(mut self, end: End) -> Result<(), Error> {
        // Every step is tried: a folder that cannot be removed must not leave a VM behind, nor the reverse.
        let mut first = Ok(());
        if let Some(vmm) = &mut self.vmm {
            first = first.and(vmm.kill().await);
            vmm.last_words().await;
        }
        if let Some(helper) = &mut self.helper {
            first = first.and(vmm::end(helper).await);
        }
        self.state.vmm_pid = None;
        self.state.end = Some(end);
        first = first.and(self.enter(Event::Ended));
        first = first.and(self.dir.finish());
        match first {
            Ok(()) => self.reaper.release(),
            // The reaper tries again once this process is gone.
            Err(error) => Err(error),
        }
    }
}

async fn describe_end(status: Result<ExitStatus, Error>, vmm: &mut Vmm) -> GuestEnd {
    let words = vmm.last_words().await;
    match status {
        Ok(status) if status.success() && !words.contains("Kernel panic") => GuestEnd::PoweredOff,
        Ok(status) => GuestEnd::Crashed(vmm::cause_of_end(status, &words)),
        Err(error) => GuestEnd::Crashed(error.to_string()),
    }
}

async fn choose(
    choice: AcceleratorChoice,
    qemu: &Path,
    kernel: &Path,
    cache: &Path,
    watch: &dyn Watch,
) -> Result<Accelerator, Error> {
    match choice {
        AcceleratorChoice::Kvm => Ok(Accelerator::Kvm),
        AcceleratorChoice::Tcg => Ok(Accelerator::Tcg),
        AcceleratorChoice::Auto => {
            match kvm_probe::probe(qemu, kernel, cache).await? {
                Kvm::Works => Ok(Accelerator::Kvm),
                Kvm::Unusable(reason) => {
                    tracing::info!(reason, "KVM cannot be used");
                    watch.notice(&format!("no KVM ({reason}): the sandbox runs emulated (TCG), slower and not a security boundary"));
                    Ok(Accelerator::Tcg)
                }
            }
        }
    }
}

fn configure(spec: &CheckedSpec) -> Configure {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Configure {
        sandbox_id: spec.id.to_string(),
        template_id: spec.template.template().rootfs.digest.to_string(),
        hostname: spec.hostname.clone(),
        env: spec.env.clone().into_iter().collect(),
        default_user: spec.user.clone(),
        default_workdir: spec.workdir.clone(),
        access_token: spec.access_token.clone(),
        unix_time_ns: i64::try_from(since_epoch.as_nanos()).unwrap_or(0),
        ..Configure::default()
    }
}

fn absolute(path: PathBuf) -> Result<PathBuf, Error> {
    std::path::absolute(&path).map_err(Error::io("resolve", path))
}
