//! The sandboxes of this machine: started, found again after a restart, ended.
//!
//! Each is a `host-shim run --spec` process of its own session and its folder below `sandboxes/`; the gateway may die and
//! come back without them noticing. The order of writes makes every moment one that a restart can go on from:
//! a record is kept (`Starting`) before its shim is started, becomes `Running` before the client learns the id, `Ending`
//! before its shim is told to end, and goes after the folder is gone.

mod admission;
mod folder;
mod keeper;
pub(crate) mod lookup;
mod shim;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use sandbox_folder::client::{SandboxClient, Stream, connect_hybrid};
use sandbox_folder::spec::{AcceleratorChoice, SandboxSpec};
use sandbox_folder::{SandboxId, Start, VSOCK_SOCKET};
use tokio::process::ChildStdout;
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::ApiError;
use crate::config::{Capacity, Config};
use crate::identity::generate_token;
use crate::store::{SandboxRecord, Stage, Store, StoreError, Team};

use admission::Admission;
use keeper::{Keeper, clear};
use shim::{Shim, StartError};

/// What a client asks for, checked as far as the request alone allows.
#[derive(Clone, Debug)]
pub struct NewSandbox {
    /// A template's id, alias or name with a tag, as the client wrote it.
    pub template: String,
    /// Time until it is ended.
    pub timeout: Duration,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every process.
    pub env: BTreeMap<String, String>,
    /// Whether envd calls need a token.
    pub secure: bool,
    /// Whether requests to its ports need no token.
    pub public_traffic: bool,
}

/// A sandbox that runs.
#[derive(Debug)]
pub struct Sandbox {
    /// Its folder.
    pub dir: PathBuf,
    id: SandboxId,
    record: Mutex<SandboxRecord>,
    gone: watch::Sender<bool>,
    /// Why it could not be ended, the last time that it was tried.
    failed: watch::Sender<Option<String>>,
    /// Its end was asked for.
    kill: Notify,
    /// Its time was changed.
    moved: Notify,
    /// Held while its record is changed, on disk and here.
    changing: tokio::sync::Mutex<()>,
}

impl Sandbox {
    /// A sandbox in the folder `dir`.
    pub fn new(dir: PathBuf, record: SandboxRecord) -> Self {
        Self {
            dir,
            id: record.id.clone(),
            record: Mutex::new(record),
            gone: watch::Sender::new(false),
            failed: watch::Sender::new(None),
            kill: Notify::new(),
            moved: Notify::new(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    /// What is known about it.
    pub fn record(&self) -> SandboxRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens a stream to a door of its agent.
    pub async fn dial(&self, door: u32) -> io::Result<Stream> {
        connect_hybrid(&self.dir.join(VSOCK_SOCKET), door).await
    }

    /// A client of its agent, with its token.
    pub fn client(&self) -> SandboxClient {
        client(&self.dir, &self.record())
    }

    /// Returns once it is gone.
    pub async fn gone(&self) {
        // The sender lives as long as `self`.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Asks for its end, and waits for it.
    async fn end(&self) -> Result<(), ApiError> {
        let outcome = self.ended_or_failed();
        self.kill.notify_one();
        outcome.await
    }

    /// Waits until it is gone, or a try to end it has failed from now on.
    fn ended_or_failed(&self) -> impl Future<Output = Result<(), ApiError>> + '_ {
        let mut failed = self.failed.subscribe();
        async move {
            tokio::select! {
                biased;
                () = self.gone() => Ok(()),
                _ = failed.changed() => {
                    let reason = failed.borrow().clone().unwrap_or_default();
                    let message = format!("the sandbox {} cannot be ended yet, it is tried again: {reason}", self.id);
                    Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message))
                }
            }
        }
    }

    fn set(&self, record: SandboxRecord) {
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    fn set_stage(&self, stage: Stage) {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).stage = stage;
    }
}

/// The sandboxes of this machine. Dropping it ends none of them: whoever opens the data folder next finds them again.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    _closing: DropGuard,
    // One gateway for each data folder; the kernel releases it with this process, however that ends.
    _lock: File,
}

/// What the keepers have in common.
#[derive(Debug)]
struct Shared {
    config: Config,
    store: Store,
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
    admission: Arc<Admission>,
    closing: CancellationToken,
}

/// The fleet could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another gateway has the data folder.
    #[error("another tiffin-gateway serves {}: stop that one first, or use another --data-dir", path.display())]
    Served {
        /// The data folder.
        path: PathBuf,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file in question.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Fleet {
    /// Finds the sandboxes of an earlier gateway again: running ones are adopted, those that were being started or ended
    /// are ended, what is left of dead ones is removed.
    pub async fn open(config: Config, store: Store) -> Result<Arc<Self>, OpenError> {
        let lock = lock(&config)?;
        let closing = CancellationToken::new();
        let shared = Arc::new(Shared {
            admission: Admission::new(config.capacity),
            config,
            store,
            sandboxes: Mutex::default(),
            closing: closing.clone(),
        });
        let records = shared.store.sandboxes().await?;
        let known: BTreeSet<String> = records.iter().map(|record| record.id.to_string()).collect();
        let found = records.into_iter().map(|record| Arc::clone(&shared).recover(record));
        futures::future::join_all(found).await;

        let sandboxes = shared.config.data.sandboxes();
        let folder = sandboxes.clone();
        let swept =
            tokio::task::spawn_blocking(move || folder::sweep(&folder, |name| known.contains(name))).await;
        swept
            .map_err(io::Error::other)
            .flatten()
            .map_err(|source| OpenError::Io { path: sandboxes, source })?;
        Ok(Arc::new(Self { shared, _closing: closing.drop_guard(), _lock: lock }))
    }

    /// Starts a sandbox; returns when it is configured and kept. Dropped before that, it ends what it has begun.
    pub async fn create(&self, team: &Team, request: NewSandbox) -> Result<Arc<Sandbox>, ApiError> {
        let given_up = CancellationToken::new();
        let guard = given_up.clone().drop_guard();
        let work = Arc::clone(&self.shared).create(team.clone(), request, given_up);
        // On a task of its own: what was begun is finished or cleaned up, also when the client goes away.
        let made = tokio::spawn(work).await.map_err(ApiError::internal)?;
        guard.disarm();
        made
    }

    /// The sandbox of that id, whosever it is.
    pub fn get(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        self.shared.sandboxes().get(id).cloned()
    }

    /// Every sandbox, by id.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.shared.sandboxes().values().cloned().collect()
    }

    /// Takes in a sandbox that is started and ended elsewhere: its requests are forwarded, and that is all.
    pub fn hold(&self, sandbox: Arc<Sandbox>) {
        self.shared.sandboxes().insert(sandbox.id().clone(), sandbox);
    }

    /// What sandboxes use, those that are being started or ended among them.
    pub fn used(&self) -> Capacity {
        self.shared.admission.used()
    }

    /// Moves its end; it is kept when this returns. Whether there was such a sandbox.
    pub async fn set_end(&self, id: &SandboxId, end_at: Timestamp) -> Result<bool, ApiError> {
        let Some(sandbox) = self.get(id) else { return Ok(false) };
        let store = self.shared.store.clone();
        // On a task of its own: a client that goes away must not release the record while it is being written.
        let work = async move {
            let _changing = sandbox.changing.lock().await;
            let mut record = sandbox.record();
            if record.stage != Stage::Running {
                return Ok(false);
            }
            record.end_at = end_at;
            store.put_sandbox(&record).await?;
            sandbox.set(record);
            sandbox.moved.notify_one();
            Ok(true)
        };
        tokio::spawn(work)
            .await
            .map_err(ApiError::internal)?
            .map_err(|error: StoreError| ApiError::internal(error))
    }

    /// Ends it at once; nothing of it is left when this returns. Whether there was such a sandbox.
    pub async fn kill(&self, id: &SandboxId) -> Result<bool, ApiError> {
        let Some(sandbox) = self.get(id) else { return Ok(false) };
        sandbox.end().await.map(|()| true)
    }
}

impl Shared {
    fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Arc<Sandbox>>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: &SandboxId) {
        self.sandboxes().remove(id);
    }

    /// Goes on with what an earlier gateway has left.
    async fn recover(self: Arc<Self>, record: SandboxRecord) {
        let (id, stage) = (record.id.clone(), record.stage);
        let dir = self.config.data.sandboxes().join(id.as_str());
        let shim = match Shim::find(&dir).await {
            Ok(Some(shim)) => shim,
            Ok(None) => {
                tracing::info!(sandbox = %id, ?stage, "forgetting a sandbox that is dead");
                if let Err(error) = clear(&self.store, &dir, &id).await {
                    tracing::error!(sandbox = %id, %error, "a dead sandbox cannot be forgotten; the next start tries again");
                }
                return;
            }
            Err(error) => {
                tracing::error!(sandbox = %id, %error, "a sandbox cannot be found again; the next start tries again");
                return;
            }
        };
        let admitted = self.admission.count(&record.team, need(&record));
        let sandbox = Arc::new(Sandbox::new(dir, record));
        let keeper = Keeper { shared: Arc::clone(&self), sandbox: Arc::clone(&sandbox), shim, admitted };
        self.sandboxes().insert(id.clone(), Arc::clone(&sandbox));
        if stage == Stage::Running {
            tracing::info!(sandbox = %id, "found a running sandbox again");
            tokio::spawn(keeper.run());
            return;
        }
        tracing::info!(sandbox = %id, ?stage, "ending a sandbox that was left half-way");
        tokio::spawn(keeper.finish());
        // One that resists stays listed, and is tried again; it must not hold up the start.
        let _ = sandbox.ended_or_failed().await;
    }

    async fn create(
        self: Arc<Self>,
        team: Team,
        request: NewSandbox,
        given_up: CancellationToken,
    ) -> Result<Arc<Sandbox>, ApiError> {
        check_env(&request.env)?;
        let found = lookup::find(&self.config, &self.store, &team, &request.template).await?;
        let lookup::Found { id: name, alias, folder: template } = found;
        let machine = template.template().machine;
        let need = Capacity { sandboxes: 1, cpus: machine.cpus, memory_mib: machine.memory_mib };
        let admitted = tokio::select! {
            admitted = self.admission.admit(&team, need) => admitted?,
            () = given_up.cancelled() => return Err(nobody_waits()),
        };
        let token = || generate_token().map_err(ApiError::internal);
        let now = Timestamp::now();
        let mut record = SandboxRecord {
            id: SandboxId::generate_here().map_err(ApiError::internal)?,
            team: team.id,
            stage: Stage::Starting,
            template: name.clone(),
            alias: Some(alias),
            metadata: request.metadata,
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            disk_mib: machine.disk_mib,
            agent_version: String::new(),
            access_token: request.secure.then(token).transpose()?,
            traffic_token: (!request.public_traffic).then(token).transpose()?,
            started_at: now,
            end_at: end_after(now, request.timeout)?,
        };
        let id = record.id.clone();
        let dir = self.config.data.sandboxes().join(id.as_str());
        self.store.put_sandbox(&record).await.map_err(ApiError::internal)?;
        let spec = self.spec(&record, template.path(), request.env);
        let (mut shim, stdout) = match self.start(&dir, spec).await {
            Ok(started) => started,
            Err(error) => {
                if let Err(error) = clear(&self.store, &dir, &id).await {
                    tracing::error!(sandbox = %id, %error, "a sandbox that did not start cannot be forgotten");
                }
                return Err(did_not_start(&id, error));
            }
        };
        let ready = tokio::select! {
            ready = shim.ready(stdout) => ready.map_err(|error| did_not_start(&id, error)),
            () = given_up.cancelled() => Err(nobody_waits()),
        };
        let kept = match ready {
            Ok(ready) => {
                let now = Timestamp::now();
                let (start, why) = (ready.start.map(Start::name), ready.booted_because);
                tracing::info!(sandbox = %id, template = %name, start, why, "a sandbox is ready");
                record.stage = Stage::Running;
                record.agent_version = ready.agent_version.unwrap_or_default();
                record.started_at = now;
                record.end_at = end_after(now, request.timeout).unwrap_or(record.end_at);
                self.store.put_sandbox(&record).await.map_err(ApiError::internal)
            }
            Err(error) => Err(error),
        };
        let sandbox = Arc::new(Sandbox::new(dir, record));
        let keeper = Keeper { shared: Arc::clone(&self), sandbox: Arc::clone(&sandbox), shim, admitted };
        if let Err(error) = kept {
            tokio::spawn(keeper.finish());
            // The cause is told, whatever became of the cleaning up: that goes on.
            let _ = sandbox.ended_or_failed().await;
            return Err(error);
        }
        self.sandboxes().insert(id.clone(), Arc::clone(&sandbox));
        tokio::spawn(keeper.run());
        if given_up.is_cancelled() {
            sandbox.kill.notify_one();
        }
        Ok(sandbox)
    }

    async fn start(&self, dir: &Path, spec: SandboxSpec) -> Result<(Shim, ChildStdout), StartError> {
        let folder = dir.to_owned();
        let written = tokio::task::spawn_blocking(move || folder::write(&folder, &spec)).await;
        let stderr = written
            .map_err(io::Error::other)
            .flatten()
            .map_err(|source| StartError::Folder { path: dir.to_owned(), source })?;
        Shim::start(&self.config, dir, stderr)
            .map_err(|source| StartError::Spawn { program: self.config.host_shim.clone(), source })
    }

    fn spec(&self, record: &SandboxRecord, template: &Path, env: BTreeMap<String, String>) -> SandboxSpec {
        let mut spec = SandboxSpec::new(template);
        spec.id = Some(record.id.clone());
        spec.kernel = self.config.kernel.clone();
        spec.guest_image = self.config.guest_image.clone();
        spec.cpus = Some(record.cpus);
        spec.memory_mib = Some(record.memory_mib);
        spec.disk_mib = Some(record.disk_mib);
        spec.channel = self.config.channel;
        spec.accelerator = match self.config.allow_emulation {
            true => AcceleratorChoice::Auto,
            false => AcceleratorChoice::Kvm,
        };
        spec.access_token = record.access_token.clone();
        spec.env = env;
        for (name, value) in [
            ("E2B_SANDBOX", "true"),
            ("E2B_SANDBOX_ID", record.id.as_str()),
            ("E2B_TEMPLATE_ID", &record.template),
        ] {
            spec.env.insert(name.to_owned(), value.to_owned());
        }
        spec
    }
}

/// The client's variables, as bytes: they travel to the agent in one message, with the template's and some more.
const MAX_ENV: usize = envd_proto::limits::MAX_CONTROL_MESSAGE / 2;

fn check_env(env: &BTreeMap<String, String>) -> Result<(), ApiError> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            let reason = format!("envVars: expected names without '=' and NUL, got {name:?}");
            return Err(ApiError::bad_request(reason));
        }
        if value.contains('\0') {
            return Err(ApiError::bad_request(format!("envVars: the value of {name:?} has a NUL byte")));
        }
    }
    let size: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if size > MAX_ENV {
        return Err(ApiError::bad_request(format!("envVars: {size} bytes, at most {MAX_ENV} allowed")));
    }
    Ok(())
}

fn end_after(start: Timestamp, timeout: Duration) -> Result<Timestamp, ApiError> {
    let end =
        jiff::SignedDuration::try_from(timeout).ok().and_then(|timeout| start.checked_add(timeout).ok());
    end.ok_or_else(|| ApiError::bad_request(format!("timeout: {} s is too long", timeout.as_secs())))
}

fn need(record: &SandboxRecord) -> Capacity {
    Capacity { sandboxes: 1, cpus: record.cpus, memory_mib: record.memory_mib }
}

fn client(dir: &Path, record: &SandboxRecord) -> SandboxClient {
    let client = SandboxClient::unix(dir.join(VSOCK_SOCKET));
    match &record.access_token {
        Some(token) => client.with_token(token),
        None => client,
    }
}

fn did_not_start(id: &SandboxId, error: impl std::fmt::Display) -> ApiError {
    tracing::error!(sandbox = %id, %error, "a sandbox did not start");
    let words = error.to_string();
    let message = match words.starts_with("the sandbox ") {
        true => words,
        false => format!("the sandbox did not start: {words}"),
    };
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}

/// For the log of the server alone: its client is gone.
fn nobody_waits() -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "the request was given up while its sandbox was being started",
    )
}

fn lock(config: &Config) -> Result<File, OpenError> {
    let path = config.data.path().join("gateway.lock");
    let io = |source| OpenError::Io { path: path.clone(), source };
    fs::create_dir_all(config.data.path()).map_err(io)?;
    let open = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Served { path: config.data.path().to_owned() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}
