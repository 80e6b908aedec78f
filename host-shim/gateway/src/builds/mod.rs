//! Builds of templates, for the teams' clients.
//!
//! ```text
//! POST /v3/templates          a record: Waiting        the client sends the files of COPY steps   (files)
//! POST /v2/templates/…/builds/…   Queued ──► Building ──► Ready, and the tags move to it
//!                               │  one queue     │ image-builder, a process     (runner, process)
//!                               │                └──► Error, with the step that it points at
//! GET  …/status                 log, by the number of entries that the client has              (log)
//!
//! builds/<template>.<build>/   its request, until it has ended, and its log
//! templates/<template>.<build>/   what sandboxes start from      images: build.tiffin.invalid/<template>:<build>
//! ```
//!
//! The order of writes makes every moment one that a restart goes on from: a request is on the disk before its record says
//! Queued; what was being built is begun again (the steps that were done are in the builder's cache), but not for ever; a
//! tag moves when its template is whole. What no record and no sandbox needs any more is removed by [`Builds::sweep`], which knows
//! it by the folder under `builds/`: that one is made first and goes last.

mod fetch;
mod files;
mod limits;
pub(crate) mod log;
mod name;
mod process;
mod queue;
mod registry;
pub(crate) mod request;
mod runner;
mod sweep;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use template::TemplateFolder;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ApiError;
use crate::config::{Capacity, Config};
use crate::identity::TeamId;
use crate::store::{
    BuildReason, BuildRecord, BuildStage, Requested, Store, StoreError, Team, TemplateRecord,
};

pub(crate) use fetch::fetch;
pub use files::{Address, Expected, Uploads};
pub use limits::{BuildLimits, BuildsConfig, Isolation};
pub use log::{LogEntry, LogLevel};
pub(crate) use name::checked_tags;
pub use name::{BuildId, DEFAULT_TAG, TemplateId, Wanted, folder, of_folder};
pub use registry::RegistryUrl;
pub use request::BuildStart;

use limits::Folders;
use queue::{Queued, State};
use request::{Base, Wish};
use runner::Request;

/// Builds that wait for their turn, of all teams.
const MAX_QUEUE: usize = 500;

/// Seconds after which a place in the queue may be free.
const RETRY_SECONDS: u32 = 30;

/// A build that was asked for and not begun by then is given up.
const WAITING_LIFE: Duration = Duration::from_secs(24 * 3600);

/// The user of sandboxes, whom every base is given, and where its commands begin.
const USER: &str = "user";
const HOME: &str = "/home/user";

/// The size of sandboxes where the client does not say: E2B's.
const DEFAULT_CPUS: u32 = 2;
const DEFAULT_MEMORY_MIB: u64 = 1024;
const DEFAULT_DISK_MIB: u64 = 4096;

/// The smallest and largest sizes; a team's quota is another limit.
const MIN_MEMORY_MIB: u64 = 128;
const MAX_DISK_MIB: u64 = 64 << 10;

/// The size of sandboxes that a client asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// RAM in MiB.
    pub memory_mib: Option<u64>,
    /// Disk in MiB that sandboxes can write.
    pub free_disk_mib: Option<u64>,
}

/// A build that was asked for.
#[derive(Clone, Debug)]
pub struct Begun {
    /// The template.
    pub template: TemplateRecord,
    /// The build.
    pub build: BuildId,
    /// The tags that it will have.
    pub tags: Vec<String>,
}

/// The builds of this machine. Dropping it ends none: [`Builds::close`] does.
#[derive(Debug)]
pub struct Builds {
    /// Files that clients sent.
    pub uploads: Uploads,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    store: Store,
    folders: Folders,
    state: Mutex<State>,
    tasks: TaskTracker,
    closing: CancellationToken,
    /// Held while what nobody needs is looked for and removed.
    sweeping: tokio::sync::Mutex<()>,
}

/// The builds could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system refused.
    #[error("the folders of builds and uploads in the data folder: {0}")]
    Io(#[from] io::Error),
}

impl Builds {
    /// Goes on with what an earlier gateway has left. The data folder must be this gateway's alone.
    pub async fn open(config: Config, store: Store) -> Result<Self, OpenError> {
        let folders = Folders::of(&config.data);
        std::fs::create_dir_all(&folders.builds)?;
        let uploads = Uploads::open(folders.uploads.clone())?;
        let shared = Arc::new(Shared {
            config,
            store,
            folders,
            state: Mutex::new(State { queue: VecDeque::new(), running: Default::default() }),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            sweeping: tokio::sync::Mutex::default(),
        });
        for build in shared.store.builds().await? {
            shared.recover(build).await?;
        }
        shared.sweep().await;
        shared.schedule();
        Ok(Self { uploads, shared })
    }

    /// Begins a build: its client sends files, then starts it.
    pub async fn request(
        &self,
        team: &Team,
        name: &str,
        tags: &[String],
        size: Size,
    ) -> Result<Begun, ApiError> {
        let (name, tags) = name::requested(team, name, tags)?;
        let (cpus, memory_mib, disk_mib) = checked_size(team, size)?;
        let shared = &self.shared;
        let limits = shared.store.build_limits(&team.id).await?;
        let fresh = TemplateId::generate().map_err(ApiError::internal)?;
        let build = BuildId::generate().map_err(ApiError::internal)?;
        let mut may_expire = true;
        loop {
            let (id, owner, its_tags) = (build.clone(), team.id.clone(), tags.clone());
            let record = move |template: &TemplateId| BuildRecord {
                id,
                template: template.clone(),
                team: owner,
                stage: BuildStage::Waiting,
                tags: its_tags,
                cpus,
                memory_mib,
                disk_mib,
                attempts: 0,
                requested_at: Timestamp::now(),
                finished_at: None,
                reason: None,
                digest: None,
            };
            let full = |what: String| {
                let message =
                    format!("{what}: see `tiffin-gateway teams builds`, or delete what is not needed");
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
            };
            match shared.store.request_build(&team.id, &name, fresh.clone(), limits, record).await? {
                Requested::Begun(template) => return Ok(Begun { template, build, tags }),
                Requested::Templates => {
                    return Err(full(format!(
                        "the team has {} templates, as many as it may have",
                        limits.templates
                    )));
                }
                Requested::Builds if may_expire => {
                    may_expire = false;
                    shared.expire().await?;
                }
                Requested::Builds => {
                    return Err(full(format!(
                        "the team has {} builds that have not ended, as many as it may have",
                        limits.queued
                    )));
                }
            }
        }
    }

    /// Puts a build into the queue.
    pub async fn start(
        &self,
        team: &Team,
        template: &TemplateId,
        build: &BuildId,
        wanted: BuildStart,
    ) -> Result<(), ApiError> {
        let shared = &self.shared;
        let record = shared.store.build(&team.id, template, build).await?.ok_or_else(|| no_build(build))?;
        let again = || {
            ApiError::new(
                StatusCode::CONFLICT,
                format!("the build {build} was begun already: ask for another"),
            )
        };
        if record.stage != BuildStage::Waiting {
            return Err(again());
        }
        let wish = wanted.checked()?;
        let (base, user, workdir) = shared.base(team, &wish).await?;
        let steps = wish.steps(runner::BASE_NAME, &user, workdir);
        let request = Request { base, no_cache: wish.no_cache, steps, credentials: wish.credentials.clone() };
        let dir = shared.folders.builds.join(folder(template, build));
        let hashes: Vec<String> = wish.files.iter().map(|(_, hash)| hash.clone()).collect();
        let linked = self.uploads.link(&team.id, &hashes, &dir.join("files")).map_err(ApiError::internal)?;
        if let Some(missing) = linked {
            let step = wish.files.iter().find(|(_, hash)| *hash == missing).map_or(0, |(step, _)| *step);
            let message =
                format!("step {step}: the files {missing} were not sent, or went since: build again");
            return Err(ApiError::bad_request(message));
        }
        let limits = shared.store.build_limits(&team.id).await?;
        let shared = Arc::clone(shared);
        // On a task of its own: a client that goes away leaves no build between its record and the queue.
        let work = async move {
            {
                let mut state = shared.state();
                if state.queue.len() >= MAX_QUEUE {
                    let message = format!("{MAX_QUEUE} builds wait already: try again later");
                    return Err(
                        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).retry_after(RETRY_SECONDS)
                    );
                }
                if state.knows(&record.id) {
                    return Err(again_taken(&record.id));
                }
                // Its place; the worker takes it only once it is marked as kept.
                state.queue.push_back(Queued { record: record.clone(), limits, kept: false });
            }
            let written = tokio::task::spawn_blocking(move || request.write(&dir)).await;
            let written = written.map_err(io::Error::other).flatten();
            let mut queued = record.clone();
            queued.stage = BuildStage::Queued;
            let kept = match written {
                Ok(()) => shared.store.put_build(&queued).await.map_err(ApiError::internal),
                Err(error) => Err(ApiError::internal(format!("a build's request: {error}"))),
            };
            match kept {
                Ok(true) => {
                    shared.state().keep(queued);
                    shared.schedule();
                    Ok(())
                }
                other => {
                    shared.state().remove(&record.id);
                    other.and(Err(no_build(&record.id)))
                }
            }
        };
        tokio::spawn(work).await.map_err(ApiError::internal)?
    }

    /// What is known of a build, with entries of its log from that number on.
    pub async fn status(
        &self,
        team: &TeamId,
        template: &TemplateId,
        build: &BuildId,
        from: usize,
        limit: usize,
        least: LogLevel,
    ) -> Result<(BuildRecord, Vec<LogEntry>, Vec<LogEntry>), ApiError> {
        let shared = &self.shared;
        let record = shared.store.build(team, template, build).await?.ok_or_else(|| no_build(build))?;
        let open = shared.state().running.get(build).map(|running| Arc::clone(&running.log));
        let path = shared.folders.builds.join(folder(template, build)).join(runner::LOG);
        let failed = record.stage == BuildStage::Error;
        let read = move || {
            let entries = match open {
                Some(log) => log.page(from, limit, least),
                None => log::page(&path, from, limit, least),
            };
            let last = if failed { log::tail(&path, LAST_ENTRIES)? } else { Vec::new() };
            Ok::<_, io::Error>((entries?, last))
        };
        let read = tokio::task::spawn_blocking(read).await.map_err(ApiError::internal)?;
        let (entries, last) = read.map_err(ApiError::internal)?;
        Ok((record, entries, last))
    }

    /// Ends a build that has not ended; returns when nothing of it runs any more.
    pub async fn cancel(
        &self,
        team: &TeamId,
        template: &TemplateId,
        build: &BuildId,
    ) -> Result<(), ApiError> {
        let shared = &self.shared;
        let record = shared.store.build(team, template, build).await?.ok_or_else(|| no_build(build))?;
        if !record.stage.is_active() {
            return Ok(());
        }
        let gone = shared.stop(build);
        match gone {
            Some(gone) => gone.cancelled().await,
            None => {
                shared.fail(record, BuildReason { message: CANCELLED.to_owned(), step: None }).await?;
            }
        }
        Ok(())
    }

    /// Deletes a template; running sandboxes keep it, and builds of it are ended.
    pub async fn delete(&self, template: &TemplateId) -> Result<(), ApiError> {
        let shared = Arc::clone(&self.shared);
        let template = template.clone();
        let work = async move {
            let ended: Vec<_> = shared
                .store
                .delete_template(&template)
                .await?
                .iter()
                .filter_map(|build| shared.stop(build))
                .collect();
            for gone in ended {
                gone.cancelled().await;
            }
            shared.sweep().await;
            Ok(())
        };
        tokio::spawn(work).await.map_err(ApiError::internal)?
    }

    /// Removes what no record and no sandbox needs any more.
    pub async fn sweep(&self) {
        self.shared.sweep().await;
    }

    /// Ends what is being built, and begins nothing more. The next gateway goes on with it.
    pub async fn close(&self) {
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

/// Entries that explain an error.
const LAST_ENTRIES: usize = 10;

/// Why a build has ended that somebody did not want any more.
const CANCELLED: &str = "the build was cancelled";

fn again_taken(build: &BuildId) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, format!("the build {build} is being begun already"))
}

/// 404 for a build that is not there, or another team's: the two look the same.
fn no_build(build: &BuildId) -> ApiError {
    ApiError::not_found(format!("Build \"{build}\" doesn't exist or you don't have access to it"))
}

fn checked_size(team: &Team, size: Size) -> Result<(u32, u64, u64), ApiError> {
    let cpus = size.cpus.unwrap_or(DEFAULT_CPUS.min(team.quota.cpus.max(1)));
    let memory = size.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB.min(team.quota.memory_mib.max(MIN_MEMORY_MIB)));
    let disk = size.free_disk_mib.unwrap_or(0).max(DEFAULT_DISK_MIB);
    let limits = [
        ("cpuCount", u64::from(cpus), 1, u64::from(team.quota.cpus)),
        ("memoryMB", memory, MIN_MEMORY_MIB, team.quota.memory_mib),
        ("minFreeDiskMb", disk, 0, MAX_DISK_MIB),
    ];
    for (name, value, least, most) in limits {
        if !(least..=most).contains(&value) {
            return Err(ApiError::bad_request(format!("invalid {name} {value}: expected {least} to {most}")));
        }
    }
    let need = Capacity { sandboxes: 1, cpus, memory_mib: memory };
    debug_assert!(need.fits(Capacity::UNLIMITED));
    Ok((cpus, memory, disk))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image that a build begins with, who its steps begin as, and where.
    async fn base(
        &self,
        team: &Team,
        wish: &Wish,
    ) -> Result<(String, String, Option<&'static str>), ApiError> {
        let name = match &wish.base {
            Base::Image(image) => return Ok((image.clone(), USER.to_owned(), Some(HOME))),
            Base::Template(name) => name,
        };
        let shown: String = name.chars().take(64).collect();
        let unknown = || {
            ApiError::bad_request(format!("fromTemplate: the template {shown:?} is not there, or not yours"))
        };
        let own = match Wanted::parse(team, name) {
            Some(wanted) => self.store.tagged(&team.id, wanted.name.as_str(), wanted.tag()).await?,
            None => None,
        };
        let (data, wanted) = (self.config.data.clone(), name.clone());
        let found = match own {
            Some((template, build)) => {
                let image = name::image(&template.id, &build.id);
                let path = self.config.data.templates().join(folder(&template.id, &build.id));
                let open = tokio::task::spawn_blocking(move || TemplateFolder::open(&path)).await;
                let runtime = open.map_err(ApiError::internal)?.map_err(|_| {
                    let message =
                        format!("fromTemplate: the template {shown:?} is not on this machine: build it here");
                    ApiError::bad_request(message)
                })?;
                (image, runtime.template().runtime.user.clone())
            }
            None => {
                let find = move || crate::fleet::lookup::of_machine(&data, &wanted);
                let found = tokio::task::spawn_blocking(find).await.map_err(ApiError::internal)?;
                let (_, template) = found.map_err(|_| unknown())?;
                let template = template.template();
                // By its digest: the name may stand for another image by now.
                let reference = &template.image.reference;
                let name = reference.split_once('@').map_or(reference.as_str(), |(name, _)| name);
                (format!("{name}@{}", template.image.digest), template.runtime.user.clone())
            }
        };
        let (image, user) = found;
        Ok((image, if user.is_empty() { "root".to_owned() } else { user }, None))
    }
}
