//! Sandboxes that wait for somebody: restored, held still, nobody's.
//!
//! ```text
//! record: parked ─► shim: run --park ─► in the pool ── taken ─► POST /configure ─► record: a team's, Running
//!                        ▲                  │ template replaced, room needed, shim dead
//!                        └── refill         └─► ended; its record goes after its folder
//! ```
//!
//! A parked sandbox takes room of the machine and of no team; creates that find no room end some of them. Each has a task
//! that owns its shim. A restarted gateway finds them again; one that was taken, and is no team's yet, it ends.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sandbox_folder::SandboxId;
use sandbox_folder::calls::ConfigureRequest;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::admission::Admitted;
use super::keeper::{EndError, Keeper, Life, Next};
use super::shim::Shim;
use super::start::{Source, new_record};
use super::{Came, Fleet, NewSandbox, Sandbox, Shared, end_after, folder, lookup, own_env};
use crate::ApiError;
use crate::config::{Capacity, Config};
use crate::identity::{TeamId, hex};
use crate::store::{ParkedRecord, SandboxRecord, Stage, Team};

/// The largest pool. Each parked sandbox is three processes, and its RAM is promised.
const MAX_POOL: u32 = 1000;

/// How often a full pool looks whether its template was replaced, and one without room whether there is some.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Between tries to park one after the first has failed; doubled by each one more.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(300);

/// Until a parked sandbox is somebody's. It takes milliseconds; the machine may be busy, the template's commands may be slow.
const CONFIGURE_DEADLINE: Duration = Duration::from_secs(300);

/// `--pool TEMPLATE=N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSize {
    /// The template's name.
    pub template: String,
    /// Sandboxes that wait.
    pub count: u32,
}

impl FromStr for PoolSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected TEMPLATE=N with N from 1 to {MAX_POOL}, got {text:?}");
        let (template, count) = text.split_once('=').ok_or_else(expected)?;
        let count = count.parse().ok().filter(|count| (1..=MAX_POOL).contains(count)).ok_or_else(expected)?;
        template.parse::<template::TemplateName>().map_err(|error| error.to_string())?;
        Ok(Self { template: template.to_owned(), count })
    }
}

/// The sandboxes that wait.
#[derive(Debug, Default)]
pub(super) struct Pools {
    parked: Mutex<Vec<Parked>>,
    /// How many are to wait, by template.
    wanted: Mutex<BTreeMap<String, usize>>,
    /// One was taken or has ended; for each pool.
    changed: Mutex<BTreeMap<String, Arc<Notify>>>,
}

/// One that waits. Dropped, it is ended.
#[derive(Debug)]
struct Parked {
    record: ParkedRecord,
    take: oneshot::Sender<oneshot::Sender<Given>>,
}

/// What the task of a parked sandbox gives away.
#[derive(Debug)]
struct Given {
    shim: Shim,
    admitted: Admitted,
}

impl Pools {
    fn parked(&self) -> MutexGuard<'_, Vec<Parked>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wanted(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, template: &str) -> Arc<Notify> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(changed.entry(template.to_owned()).or_default())
    }

    fn count(&self, template: &str) -> usize {
        self.parked().iter().filter(|one| one.record.template == template).count()
    }

    /// The one that has waited longest, if the template is what it was.
    fn pop(&self, template: &str, stamp: &str) -> Option<Parked> {
        let mut parked = self.parked();
        let fits = |one: &Parked| one.record.template == template && one.record.stamp == stamp;
        let place = parked.iter().position(fits)?;
        let one = parked.remove(place);
        drop(parked);
        self.changed(template).notify_one();
        Some(one)
    }

    /// Ends those that are not wanted.
    fn retain(&self, wanted: impl FnMut(&Parked) -> bool) {
        // They are told outside the lock.
        let gone: Vec<Parked> = {
            let mut wanted = wanted;
            self.parked().extract_if(.., |one| !wanted(one)).collect()
        };
        for one in &gone {
            tracing::info!(sandbox = %one.record.id, template = one.record.template, "a parked sandbox is not wanted any more");
        }
    }
}

impl Fleet {
    /// Keeps so many sandboxes of templates parked from now on, and none of others. Those of an earlier gateway count.
    pub fn start_pools(&self, pools: &[PoolSize]) {
        let shared = &self.shared;
        // Of a template that is named twice, the last one counts.
        let wanted = pools.iter().map(|pool| (pool.template.clone(), pool.count as usize)).collect();
        let before = std::mem::replace(&mut *shared.pools.wanted(), wanted);
        let now = shared.pools.wanted().clone();
        shared.pools.retain(|one| now.contains_key(&one.record.template));
        for template in before.keys() {
            shared.pools.changed(template).notify_one();
        }
        for template in now.into_keys().filter(|template| !before.contains_key(template)) {
            let refill = Arc::clone(shared).refill(template);
            let closing = shared.closing.clone();
            tokio::spawn(async move { closing.run_until_cancelled(refill).await });
        }
    }

    /// How many sandboxes wait in pools.
    pub fn parked(&self) -> usize {
        self.shared.pools.parked().len()
    }
}

impl Shared {
    /// Keeps a pool full, one after the other, for as long as it is wanted.
    async fn refill(self: Arc<Self>, template: String) {
        let changed = self.pools.changed(&template);
        let mut retry = FIRST_RETRY;
        loop {
            let wanted = self.pools.wanted().get(&template).copied().unwrap_or_default();
            let mut left = wanted;
            self.pools.retain(|one| {
                let ours = one.record.template == template;
                let kept = !ours || left > 0;
                left = left.saturating_sub(usize::from(ours));
                kept
            });
            if wanted == 0 {
                return;
            }
            let pause = match self.refill_one(&template, wanted).await {
                Ok(true) => {
                    retry = FIRST_RETRY;
                    continue;
                }
                Ok(false) => LOOK_INTERVAL,
                Err(error) => {
                    tracing::warn!(template, %error, ?retry, "no sandbox is parked, which is tried again");
                    let pause = retry;
                    retry = (retry * 2).min(LAST_RETRY);
                    // Whoever takes one meanwhile does not make it succeed.
                    tokio::time::sleep(pause).await;
                    continue;
                }
            };
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Parks one if it is missing; whether it was, and there is room.
    async fn refill_one(self: &Arc<Self>, template: &str, wanted: usize) -> Result<bool, ApiError> {
        let source = self.template(template).await?;
        self.pools.retain(|one| one.record.template != template || one.record.stamp == source.stamp);
        if self.pools.count(template) >= wanted {
            return Ok(false);
        }
        let need =
            Capacity { sandboxes: 1, cpus: source.machine.cpus, memory_mib: source.machine.memory_mib };
        let Some(admitted) = self.admission.spare(need) else { return Ok(false) };
        self.park(source, admitted).await.map(|()| true)
    }

    async fn template(&self, name: &str) -> Result<Source, ApiError> {
        let (config, wanted) = (self.config.clone(), name.to_owned());
        let find = move || {
            let (name, folder) = lookup::of_machine(&config.data, &wanted)?;
            Source::of_template(&config, name.to_string(), name.to_string(), &folder)
        };
        tokio::task::spawn_blocking(find).await.map_err(ApiError::internal)?
    }

    async fn park(self: &Arc<Self>, source: Source, admitted: Admitted) -> Result<(), ApiError> {
        let id = SandboxId::generate_here().map_err(ApiError::internal)?;
        let dir = self.config.data.sandboxes().join(id.as_str());
        let record = ParkedRecord {
            id: id.clone(),
            template: source.id.clone(),
            stamp: source.stamp.clone(),
            cpus: source.machine.cpus,
            memory_mib: source.machine.memory_mib,
        };
        // What it is before it is anybody's: what it is told then goes on top of it.
        let nobody = Team {
            id: TeamId(String::new()),
            name: String::new(),
            quota: Capacity::UNLIMITED,
            rate: None,
            disk_mib: 0,
        };
        let unasked = NewSandbox { public_traffic: true, ..NewSandbox::default() };
        let spec =
            self.spec(&new_record(&nobody, id.clone(), &source, &unasked)?, &source.path, BTreeMap::new());
        self.store.put_parked(&record).await?;
        let parked = match self.start(&dir, spec, true).await {
            Ok((mut shim, stdout)) => match shim.ready(stdout).await {
                Ok(_) => Ok(shim),
                Err(error) => match shim.end().await {
                    Ok(()) => Err(error.to_string()),
                    // Its record stays: the next gateway ends it.
                    Err(stuck) => return Err(ApiError::internal(format!("{error}; {stuck}"))),
                },
            },
            Err(error) => Err(error.to_string()),
        };
        match parked {
            Ok(shim) => {
                tracing::info!(sandbox = %id, template = record.template, "a sandbox is parked");
                self.hold(record, Given { shim, admitted });
                Ok(())
            }
            Err(reason) => {
                self.clear_parked(&id).await.map_err(ApiError::internal)?;
                Err(ApiError::internal(reason))
            }
        }
    }

    /// Puts one into its pool, with a task that watches it.
    fn hold(self: &Arc<Self>, record: ParkedRecord, mut given: Given) {
        let (take, taken) = oneshot::channel::<oneshot::Sender<Given>>();
        let shared = Arc::clone(self);
        let id = record.id.clone();
        self.pools.parked().push(Parked { record, take });
        tokio::spawn(async move {
            let closing = shared.closing.clone();
            tokio::select! {
                taker = taken => {
                    // Without one it is not wanted any more.
                    if let Ok(taker) = taker {
                        match taker.send(given) {
                            Ok(()) => return,
                            Err(back) => given = back,
                        }
                    }
                }
                how = given.shim.ended() => {
                    tracing::warn!(sandbox = %id, how, "a parked sandbox ended by itself");
                    let template = {
                        let mut parked = shared.pools.parked();
                        let place = parked.iter().position(|one| one.record.id == id);
                        place.map(|place| parked.remove(place).record.template)
                    };
                    if let Some(template) = template {
                        shared.pools.changed(&template).notify_one();
                    }
                }
                () = closing.cancelled() => return,
            }
            shared.discard(&id, given).await;
        });
    }

    /// Ends one; nothing of it is left.
    async fn discard(&self, id: &SandboxId, mut given: Given) {
        let ended = match given.shim.end().await {
            Ok(()) => self.clear_parked(id).await,
            Err(error) => Err(EndError::Processes(error)),
        };
        if let Err(error) = ended {
            tracing::error!(sandbox = %id, %error, "a parked sandbox cannot be ended; the next start tries again");
        }
    }

    async fn clear_parked(&self, id: &SandboxId) -> Result<(), EndError> {
        folder::remove(&self.config.data.sandboxes().join(id.as_str())).await.map_err(EndError::Folder)?;
        Ok(self.store.remove_parked(id).await?)
    }

    /// Makes a parked sandbox a team's, if one waits for that; one that fails is ended, and the next one taken.
    pub(super) async fn take_parked(
        self: &Arc<Self>,
        team: &Team,
        source: &Source,
        request: &NewSandbox,
        given_up: &CancellationToken,
    ) -> Result<Option<Arc<Sandbox>>, ApiError> {
        let need =
            Capacity { sandboxes: 1, cpus: source.machine.cpus, memory_mib: source.machine.memory_mib };
        // Before one is taken out, whose place is filled at once.
        self.admission.check(team, need)?;
        while let Some(Parked { record, take }) = self.pools.pop(&source.id, &source.stamp) {
            let (taker, given) = oneshot::channel();
            // Its task may have ended it just now.
            let Some(mut given) = (match take.send(taker) {
                Ok(()) => given.await.ok(),
                Err(_) => None,
            }) else {
                continue;
            };
            given.admitted = match given.admitted.give(team) {
                Ok(admitted) => admitted,
                Err((admitted, refusal)) => {
                    self.hold(record, Given { admitted, ..given });
                    return Err(refusal);
                }
            };
            let fresh = new_record(team, record.id.clone(), source, request)?;
            match self.configure(fresh, request).await {
                Ok(ready) => return self.give(ready, given, given_up).await.map(Some),
                Err(reason) => {
                    tracing::warn!(sandbox = %record.id, reason, "a parked sandbox could not be given away");
                    self.discard(&record.id, given).await;
                }
            }
        }
        Ok(None)
    }

    /// Tells a parked sandbox what it is.
    async fn configure(
        &self,
        mut record: SandboxRecord,
        request: &NewSandbox,
    ) -> Result<SandboxRecord, String> {
        let mut env = request.env.clone();
        env.extend(own_env(&record));
        let wish = ConfigureRequest {
            env,
            access_token: record.access_token.clone(),
            ..ConfigureRequest::default()
        };
        let wish = serde_json::to_value(wish).map_err(|error| error.to_string())?;
        let dir = self.config.data.sandboxes().join(record.id.as_str());
        let api = super::ApiClient::unix(dir.join(super::API_SOCKET));
        let state = match tokio::time::timeout(CONFIGURE_DEADLINE, api.configure(&wish)).await {
            Ok(state) => state.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("not done within {} s", CONFIGURE_DEADLINE.as_secs())),
        };
        record.agent_version = state["agent_version"].as_str().unwrap_or_default().to_owned();
        record.stage = Stage::Running;
        record.started_at = jiff::Timestamp::now();
        record.end_at = end_after(record.started_at, request.timeout).unwrap_or(record.end_at);
        Ok(record)
    }

    async fn give(
        self: &Arc<Self>,
        record: SandboxRecord,
        given: Given,
        given_up: &CancellationToken,
    ) -> Result<Arc<Sandbox>, ApiError> {
        let id = record.id.clone();
        if let Err(error) = self.store.give_parked(&record).await {
            self.discard(&id, given).await;
            return Err(error.into());
        }
        let dir = self.config.data.sandboxes().join(id.as_str());
        let sandbox = Arc::new(Sandbox::new(dir, record));
        let life = Life::Awake { shim: given.shim, _admitted: given.admitted };
        let keeper = Keeper::new(Arc::clone(self), Arc::clone(&sandbox), life)
            .ok_or_else(|| ApiError::internal("a fresh sandbox has a keeper"))?;
        tracing::info!(sandbox = %id, "a parked sandbox is given away");
        self.came(Came::FromPool);
        self.sandboxes().insert(id, Arc::clone(&sandbox));
        tokio::spawn(keeper.run(Next::Keep));
        if given_up.is_cancelled() {
            sandbox.kill.notify_one();
        }
        Ok(sandbox)
    }

    /// Ends parked sandboxes where a team's needs their room; `admit` waits until they are gone.
    pub(super) fn make_room(&self, team: &Team, need: Capacity) {
        if !self.admission.lacks(team, need) {
            return;
        }
        let mut freed = Capacity::default();
        self.pools.retain(|one| {
            let enough = self.admission.fits_without(freed, need);
            if !enough {
                freed = freed.plus(room(&one.record));
            }
            enough
        });
    }

    /// Finds the parked sandboxes of an earlier gateway again.
    pub(super) async fn recover_parked(self: &Arc<Self>, parked: Vec<ParkedRecord>) {
        for record in parked {
            let dir = self.config.data.sandboxes().join(record.id.as_str());
            match Shim::find(&dir).await {
                Ok(Some(shim)) => {
                    let admitted = self.admission.count(&TeamId(String::new()), room(&record));
                    let given = Given { shim, admitted };
                    let info = super::ApiClient::unix(dir.join(super::API_SOCKET)).info().await;
                    if info.is_ok_and(|info| info["phase"] == "parked") {
                        tracing::info!(sandbox = %record.id, "found a parked sandbox again");
                        self.hold(record, given);
                    } else {
                        tracing::info!(sandbox = %record.id, "ending a sandbox that was parked or taken half-way");
                        self.discard(&record.id, given).await;
                    }
                }
                Ok(None) => {
                    if let Err(error) = self.clear_parked(&record.id).await {
                        tracing::error!(sandbox = %record.id, %error, "a parked sandbox that is dead cannot be forgotten");
                    }
                }
                Err(error) => {
                    tracing::error!(sandbox = %record.id, %error, "a parked sandbox cannot be found again; the next start tries again");
                }
            }
        }
    }
}

fn room(record: &ParkedRecord) -> Capacity {
    Capacity { sandboxes: 1, cpus: record.cpus, memory_mib: record.memory_mib }
}

/// What a template is now, and how sandboxes of it are started: one that was parked from something else is of no use.
pub(super) fn stamp(config: &Config, template: &Path) -> std::io::Result<String> {
    let file = std::fs::metadata(template.join(template::TEMPLATE_FILE))?;
    let now = (
        (file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.len()),
        (&config.kernel, &config.guest_image, config.channel, config.allow_emulation),
    );
    Ok(hex(&Sha256::digest(format!("{now:?}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_a_template_and_a_number() {
        let parsed: PoolSize = "base=3".parse().unwrap();
        assert_eq!(parsed, PoolSize { template: "base".into(), count: 3 });
        for bad in ["base", "base=", "base=0", "base=1001", "base=x", "=3", "../x=1", "a=b=1"] {
            assert!(bad.parse::<PoolSize>().is_err(), "{bad}");
        }
    }
}
