//! What the host has done to the machine: configured, frozen, resumed from a snapshot, thawed.
//!
//! ```text
//! control door ──request──► Phase (pure: may it be done now?) ──► Acts (does it) ──► Phase entered, answer
//! ```
//!
//! Configure and Resume are checked as a whole before anything is changed, and what they changed is undone when a later
//! step fails. The last parts of a clone's resume (ids, hooks) are best effort, and the answer tells how each went.

mod clock;
mod freezer;
mod hooks;
mod identity;
mod parts;
mod phase;
mod program;
mod scratch;
mod ssh_keys;

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use envd_proto::control::{
    Configure, Error as WireError, Freeze, Rehearsed, Resume, Resumed, Stats, error::Code, resume::Kind,
};

use crate::network::{self, Plan};
use crate::sandbox::Sandbox;
use parts::Parts;

pub(crate) use freezer::Freezer;
use identity::BootId;
pub use phase::{Lifecycle, Misplaced, Phase};
pub(crate) use ssh_keys::SshKeys;

/// The least that a host gives to the kernel's random state: what the kernel's own pool holds.
const MIN_SEED: usize = 32;

/// How long a change of a file in the container has: it may lie on a file system whose server is frozen.
const FILE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the tenant's file system has to be written, or to be made larger.
const SYNC_DEADLINE: Duration = Duration::from_secs(60);

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Its kind.
    pub code: Code,
    /// What was expected, and what was found.
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// As the wire has it.
    pub fn into_wire(self) -> WireError {
        WireError { code: self.code.into(), message: self.message }
    }
}

impl From<Misplaced> for Refusal {
    fn from(misplaced: Misplaced) -> Self {
        Self::new(Code::FailedPrecondition, misplaced.to_string())
    }
}

/// What the control door can have done. The machine does it; tests note that it was asked.
pub trait Acts: Send + Sync {
    /// The sandbox that it is done to.
    fn sandbox(&self) -> &Arc<Sandbox>;
    /// Makes it somebody's.
    fn configure(&self, configure: Configure) -> impl Future<Output = Result<(), Refusal>> + Send;
    /// Holds its processes, and writes its files out where that is asked for.
    fn freeze(&self, freeze: Freeze) -> impl Future<Output = Result<(), Refusal>> + Send;
    /// Tells it who it is after a restore.
    fn resume(&self, resume: Resume) -> impl Future<Output = Result<Resumed, Refusal>> + Send;
    /// Runs processes that do nothing, the way that a client's goes.
    fn rehearse(&self) -> impl Future<Output = Result<Rehearsed, Refusal>> + Send;
    /// Lets its processes go on.
    fn thaw(&self, first_of_clone: bool) -> impl Future<Output = Result<(), Refusal>> + Send;
    /// What it uses.
    fn stats(&self) -> impl Future<Output = Result<Stats, Refusal>> + Send;
}

/// A Configure that makes sense.
#[derive(Debug)]
struct Checked {
    configure: Configure,
    network: Option<Plan>,
}

impl Checked {
    fn parse(configure: Configure) -> Result<Self, Refusal> {
        let invalid = |message: String| Refusal::new(Code::Invalid, message);
        for (name, value) in &configure.env {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(invalid(format!("environment: {name:?} cannot be a variable's name")));
            }
            if value.contains('\0') {
                return Err(invalid(format!("environment: the value of {name} has a NUL byte")));
            }
        }
        crate::hostname::check(&configure.hostname).map_err(|error| invalid(error.to_string()))?;
        let network = configure.network.as_ref().map(Plan::parse).transpose();
        let network = network.map_err(|error| invalid(error.to_string()))?;
        Ok(Self { configure, network })
    }
}

/// The real machine.
#[derive(Debug)]
pub struct Machine {
    sandbox: Arc<Sandbox>,
    boot_id: Arc<BootId>,
}

impl Machine {
    /// The machine of this sandbox.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox, boot_id: Arc::default() }
    }

    /// Runs a job inside the sandbox's root, which may hang.
    async fn inside<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let deadline = FILE_DEADLINE;
        tokio::time::timeout(deadline, self.sandbox.root().run(job)).await.unwrap_or_else(|_| {
            let message =
                format!("the container's file system did not answer within {} s", deadline.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, message))
        })
    }

    /// Network, hostname, clock and resolv.conf, or none of them.
    async fn establish(
        &self,
        checked: &Checked,
        unix_time_ns: i64,
        parts: &mut Parts,
    ) -> Result<(), Refusal> {
        let mut undo = Undo::default();
        let done = self.establish_each(checked, unix_time_ns, &mut undo, parts).await;
        if done.is_err() {
            self.undo(undo).await;
        }
        done
    }

    async fn establish_each(
        &self,
        Checked { configure, network }: &Checked,
        unix_time_ns: i64,
        undo: &mut Undo,
        parts: &mut Parts,
    ) -> Result<(), Refusal> {
        let internal = |what: &'static str| {
            move |error: io::Error| Refusal::new(Code::Internal, format!("{what}: {error}"))
        };
        // Those that are not asked for are told too, as done.
        for name in ["network", "hostname", "clock"] {
            parts.took(name, Duration::ZERO);
        }
        if let Some(plan) = network.clone() {
            let applied = parts.time("network", self.inside(move || network::apply(&plan))).await;
            undo.network = Some(applied.map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Refusal::new(Code::Invalid, format!("network: {error}")),
                _ => Refusal::new(Code::Internal, format!("network: {error}")),
            })?);
        }
        if !configure.hostname.is_empty() {
            let hostname = configure.hostname.clone();
            let before = parts.time("hostname", self.inside(move || crate::hostname::set(&hostname))).await;
            undo.hostname = Some(before.map_err(internal("setting the hostname"))?);
        }
        if unix_time_ns != 0 {
            let set = parts.time("clock", async { clock::set(unix_time_ns) }).await;
            undo.clock = Some(set.map_err(internal("setting the clock"))?);
        }
        if let Some(text) = network.as_ref().and_then(network::resolv_conf).map(str::to_owned) {
            let writing = self.inside(move || crate::replace::replace("/etc/resolv.conf", &text, 0o644));
            parts.time("network", writing).await.map_err(internal("the DNS servers"))?;
        }
        // What cannot be written of these costs no more than the file, and is told in the log.
        if let Some(before) = undo.hostname.clone() {
            let hostname = configure.hostname.clone();
            let writing = self.inside(move || {
                crate::hostname::write_files(&hostname, &before);
                Ok(())
            });
            if let Err(error) = parts.time("hostname", writing).await {
                crate::log::warn(format_args!("writing the hostname's files: {error}"));
            }
        }
        Ok(())
    }

    /// Gives the scratch disk's file system its size. The work goes on where this gives up waiting for the kernel.
    async fn grow_scratch(&self, bytes: u64) -> io::Result<()> {
        let growing = tokio::task::spawn_blocking(move || {
            scratch::grow(Path::new(crate::guest::SCRATCH), bytes, scratch::DEADLINE)
        });
        let deadline = scratch::DEADLINE + SYNC_DEADLINE;
        match tokio::time::timeout(deadline, growing).await {
            Ok(grown) => grown.map_err(io::Error::other)?,
            Err(_) => {
                let message = format!("the file system was not made larger within {} s", deadline.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, message))
            }
        }
    }

    async fn undo(&self, undo: Undo) {
        if let Some(clock) = undo.clock {
            clock.restore();
        }
        if let Some(hostname) = undo.hostname {
            let restored = self.inside(move || Ok(rustix::system::sethostname(&hostname)?)).await;
            if let Err(error) = restored {
                crate::log::error(format_args!("setting the hostname back: {error}"));
            }
        }
        if let Some(network) = undo.network {
            let _ = self
                .inside(move || {
                    network.undo();
                    Ok(())
                })
                .await;
        }
    }

    /// Freezes or thaws on a thread outside the container, whose /proc shows the agent.
    async fn hold(&self, hold: bool) -> io::Result<()> {
        let Some(freezer) = self.sandbox.freezer().cloned() else {
            let message = "the agent has no cgroups here, so it cannot hold processes still";
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        };
        let done = tokio::task::spawn_blocking(move || match hold {
            true => freezer.freeze(freezer::DEADLINE),
            false => freezer.thaw(),
        });
        done.await.map_err(io::Error::other)?
    }

    /// What is done to the files of a machine that is held: those who begin a life in it find them so.
    async fn settle(&self, freeze: Freeze) -> io::Result<()> {
        if freeze.strip_ssh_host_keys {
            self.inside(ssh_keys::strip).await?;
            // Many will begin here.
            let boot_id = Arc::clone(&self.boot_id);
            if let Err(error) = self.inside(move || boot_id.prepare()).await {
                crate::log::warn(format_args!("preparing the boot id of clones: {error}"));
            }
        }
        if freeze.skip_sync {
            return Ok(());
        }
        let sync = self.sandbox.root().run(|| Ok(rustix::fs::syncfs(std::fs::File::open("/")?)?));
        tokio::time::timeout(SYNC_DEADLINE, sync).await.unwrap_or_else(|_| {
            let message = format!("the file system was not written within {} s", SYNC_DEADLINE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, message))
        })
    }
}

/// What was before the steps that are done.
#[derive(Debug, Default)]
struct Undo {
    network: Option<network::Undo>,
    hostname: Option<Vec<u8>>,
    clock: Option<clock::Before>,
}

impl Acts for Machine {
    fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    async fn configure(&self, configure: Configure) -> Result<(), Refusal> {
        let checked = Checked::parse(configure)?;
        let taken = || Refusal::new(Code::FailedPrecondition, crate::sandbox::AlreadyConfigured.to_string());
        if self.sandbox.session().is_some() {
            return Err(taken());
        }
        if checked.configure.scratch_bytes > 0 {
            let grown = self.grow_scratch(checked.configure.scratch_bytes).await;
            grown.map_err(|error| Refusal::new(Code::Internal, format!("the scratch disk: {error}")))?;
        }
        self.establish(&checked, checked.configure.unix_time_ns, &mut Parts::default()).await?;
        // As a service on somebody's machine it finds that one's.
        if std::process::id() == 1
            && let Err(error) = self.inside(identity::ensure_machine_id).await
        {
            crate::log::warn(format_args!("writing the machine-id: {error}"));
        }
        self.sandbox.configure(checked.configure).map_err(|_| taken())
    }

    async fn freeze(&self, freeze: Freeze) -> Result<(), Refusal> {
        self.hold(true).await.map_err(|error| match error.kind() {
            io::ErrorKind::Unsupported => Refusal::new(Code::Unsupported, error.to_string()),
            _ => Refusal::new(Code::Internal, format!("freezing: {error}")),
        })?;
        if let Err(error) = self.settle(freeze).await {
            if let Err(error) = self.hold(false).await {
                crate::log::error(format_args!("thawing after a freeze that failed: {error}"));
            }
            return Err(Refusal::new(Code::Internal, format!("freezing: {error}")));
        }
        Ok(())
    }

    async fn resume(&self, resume: Resume) -> Result<Resumed, Refusal> {
        let invalid = |message: String| Refusal::new(Code::Invalid, message);
        let clone = resume.kind() == Kind::Clone;
        let checked = match (clone, resume.configure) {
            (true, Some(configure)) => Some(Checked::parse(configure)?),
            (true, None) => return Err(invalid("a clone's Resume needs a whole Configure".to_owned())),
            (false, Some(_)) => return Err(invalid("only a clone's Resume has a Configure".to_owned())),
            (false, None) => None,
        };
        if !(MIN_SEED..=envd_sys::MAX_SEED).contains(&resume.seed.len()) {
            let (got, most) = (resume.seed.len(), envd_sys::MAX_SEED);
            return Err(invalid(format!("the seed has {got} bytes: expected {MIN_SEED} to {most}")));
        }
        if resume.unix_time_ns <= 0 {
            return Err(invalid(format!("the time {} is not after 1970", resume.unix_time_ns)));
        }
        // First, since everything after it may want random bytes.
        let mut parts = Parts::default();
        parts
            .time("seed", async { envd_sys::seed_random(&resume.seed) })
            .await
            .map_err(|error| Refusal::new(Code::Internal, format!("seeding the kernel: {error}")))?;
        let Some(checked) = checked else {
            parts
                .time("clock", async { clock::set(resume.unix_time_ns) })
                .await
                .map_err(|error| Refusal::new(Code::Internal, format!("setting the clock: {error}")))?;
            return Ok(Resumed { parts: parts.into_wire(), ..Resumed::default() });
        };
        self.establish(&checked, resume.unix_time_ns, &mut parts).await?;
        let scratch_bytes = checked.configure.scratch_bytes;
        let sandbox_id = checked.configure.sandbox_id.clone();
        parts.time("session", async { self.sandbox.replace_session(checked.configure) }).await;
        parts.attempt("machine-id", self.inside(identity::renew_machine_id)).await;
        let boot_id = Arc::clone(&self.boot_id);
        parts.attempt("boot-id", self.inside(move || boot_id.renew())).await;
        if scratch_bytes > 0 {
            parts.attempt("scratch", self.grow_scratch(scratch_bytes)).await;
        }
        let env = [
            format!("TIFFIN_SANDBOX_ID={}", sandbox_id.replace('\0', "")),
            format!("TIFFIN_GENERATION={}", resume.generation),
            "TIFFIN_RESUME_KIND=clone".to_owned(),
        ];
        let hooks = parts.time("hooks", hooks::run(&self.sandbox, &env)).await;
        Ok(Resumed { parts: parts.into_wire(), hooks, thawed: false })
    }

    async fn rehearse(&self) -> Result<Rehearsed, Refusal> {
        // A clone's Thaw does this beside the first exec.
        let _ = self.sandbox.ssh_keys().look(&self.sandbox).await;
        crate::doors::rehearse(&self.sandbox).await
    }

    async fn thaw(&self, first_of_clone: bool) -> Result<(), Refusal> {
        let thawed = self.hold(false).await;
        thawed.map_err(|error| Refusal::new(Code::Internal, format!("thawing: {error}")))?;
        if first_of_clone {
            let sandbox = Arc::clone(&self.sandbox);
            tokio::spawn(async move { sandbox.ssh_keys().ensure(&sandbox).await });
        }
        Ok(())
    }

    async fn stats(&self) -> Result<Stats, Refusal> {
        self.sandbox
            .metrics()
            .stats(&self.sandbox)
            .await
            .map_err(|error| Refusal::new(Code::Internal, format!("reading what the machine uses: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;
    use crate::spawner::Spawner;
    use envd_proto::control::{Interface, Network};

    #[tokio::test]
    async fn a_request_that_makes_no_sense_changes_nothing() {
        let (socket, _spawner) = Spawner::socketpair().unwrap();
        let sandbox = Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None);
        let machine = Machine::new(Arc::clone(&sandbox));
        let hostname = rustix::system::uname().nodename().to_owned();
        let env = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
        let network = Network { interfaces: vec![Interface::default()], ..Network::default() };
        for bad in [
            Configure { env: env("A=B", ""), ..Configure::default() },
            Configure { env: env("A", "\0"), ..Configure::default() },
            Configure { hostname: "a b".into(), ..Configure::default() },
            Configure { hostname: "changed".into(), network: Some(network), ..Configure::default() },
        ] {
            let resume = Resume {
                kind: Kind::Clone.into(),
                generation: 2,
                seed: vec![1; 32],
                unix_time_ns: 1,
                configure: Some(bad.clone()),
                thaw: false,
            };
            assert_eq!(machine.configure(bad).await.unwrap_err().code, Code::Invalid);
            assert_eq!(machine.resume(resume).await.unwrap_err().code, Code::Invalid);
        }
        let same = Resume { kind: Kind::Same.into(), generation: 2, seed: vec![1; 32], ..Resume::default() };
        for bad in [
            Resume { unix_time_ns: 0, ..same.clone() },
            Resume { seed: vec![1; 31], unix_time_ns: 1, ..same.clone() },
            Resume { configure: Some(Configure::default()), unix_time_ns: 1, ..same.clone() },
            Resume { kind: Kind::Clone.into(), unix_time_ns: 1, ..same },
        ] {
            assert_eq!(machine.resume(bad).await.unwrap_err().code, Code::Invalid);
        }
        assert!(sandbox.session().is_none());
        assert_eq!(rustix::system::uname().nodename(), &*hostname);
        // Nobody to hold: told, not pretended.
        assert_eq!(machine.freeze(Freeze::default()).await.unwrap_err().code, Code::Unsupported);
    }
}
