//! The fleet, with a script in host-shim's place: what is kept, found again, ended and refused.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::process::{Pid, Signal, kill_process};
use sandbox_folder::SandboxId;
use template::{DataDir, Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};
use tiffin_gateway::ApiError;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::fleet::{Fleet, NewSandbox, OpenError, Sandbox};
use tiffin_gateway::store::{Stage, Store, Team};

#[path = "fleet/pool.rs"]
mod pool;
#[path = "fleet/sleep.rs"]
mod sleep;
#[path = "fleet/snapshots.rs"]
mod snapshots;

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A data folder with the template `base`, and what fleets on it start.
struct Host {
    dir: tempfile::TempDir,
    capacity: Capacity,
}

impl Host {
    fn new() -> Self {
        // Short: sockets must fit into their addresses.
        let dir = tempfile::Builder::new().prefix("fleet").tempdir_in("/tmp").unwrap();
        let host = Self { dir, capacity: Capacity::UNLIMITED };
        host.template("base", RuntimeConfig::default());
        host
    }

    fn template(&self, name: &str, runtime: RuntimeConfig) {
        let new = NewTemplate::begin(&self.data().templates(), &name.parse().unwrap()).unwrap();
        fs::write(new.rootfs(), b"rootfs").unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        let template = Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "base".into(), digest: digest.parse().unwrap() },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
            runtime,
            machine: Machine { cpus: 2, memory_mib: 256, disk_mib: 16 },
            snapshot_only: false,
        };
        new.publish(&template).unwrap();
    }

    fn data(&self) -> DataDir {
        DataDir::resolve(Some(&self.dir.path().join("d"))).unwrap()
    }

    fn folder(&self, id: &SandboxId) -> PathBuf {
        self.data().sandboxes().join(id.as_str())
    }

    fn store(&self) -> Store {
        Store::open(&self.data().path().join("gateway.db")).unwrap()
    }

    async fn team(&self, name: &str, quota: Capacity) -> Team {
        self.store().create_team(name, quota).await.unwrap()
    }

    async fn open(&self) -> Arc<Fleet> {
        self.try_open().await.unwrap()
    }

    async fn try_open(&self) -> Result<Arc<Fleet>, OpenError> {
        Fleet::open(config_of(self), self.store()).await
    }

    /// A gateway that is killed with SIGKILL after `work`: its tasks stop wherever they are.
    fn killed_after<T: Send>(&self, work: impl AsyncFnOnce(Arc<Fleet>) -> T) -> T {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let done = runtime.block_on(async { work(self.open().await).await });
        runtime.shutdown_timeout(PATIENCE);
        done
    }

    /// Processes whose command line names this host's folder, and their children.
    fn processes(&self) -> Vec<String> {
        let needle = self.dir.path().to_str().unwrap();
        let stat = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie is dead: it waits for whoever adopted it.
        let dead = |pid| stat(pid).rsplit(')').next().unwrap_or("").trim_start().starts_with('Z');
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let Some(pid) = entry.unwrap().file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains(needle) && !dead(pid) {
                found.push(format!("{pid}: {command}"));
            }
        }
        found
    }

    async fn assert_nothing_left(&self) {
        assert_eq!(self.store().sandboxes().await.unwrap(), []);
        let folders = fs::read_dir(self.data().sandboxes()).map(|entries| entries.count()).unwrap_or(0);
        assert_eq!(folders, 0, "folders are left");
        assert_eq!(self.processes(), [""; 0]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // After a failure: what was started ends with its folder's name.
        for line in self.processes() {
            let pid = line.split(':').next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
            let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

fn request(script: &[(&str, &str)]) -> NewSandbox {
    NewSandbox {
        template: "base".into(),
        timeout: Duration::from_secs(3600),
        metadata: [("who".to_owned(), "test".to_owned())].into(),
        env: script.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        secure: true,
        public_traffic: true,
        life: Default::default(),
    }
}

async fn create(fleet: &Fleet, team: &Team, script: &[(&str, &str)]) -> Result<Arc<Sandbox>, ApiError> {
    in_time(fleet.create(team, request(script))).await
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it ends")
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

fn spec(host: &Host, id: &SandboxId) -> serde_json::Value {
    serde_json::from_slice(&fs::read(host.folder(id).join("spec.json")).unwrap()).unwrap()
}

fn pid(host: &Host, id: &SandboxId, field: &str) -> Option<Pid> {
    let state = fs::read(host.folder(id).join("state.json")).ok()?;
    let state: serde_json::Value = serde_json::from_slice(&state).ok()?;
    Pid::from_raw(i32::try_from(state[field].as_i64()?).ok()?)
}

#[tokio::test]
async fn a_sandbox_is_made_kept_and_killed() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let before = Timestamp::now();
    let made = create(&fleet, &team, &[("A", "1"), ("E2B_SANDBOX", "mine")]).await.unwrap();
    let record = made.record();
    let id = record.id.clone();
    assert_eq!((record.stage, record.agent_version.as_str()), (Stage::Running, "0.6.13"));
    assert_eq!((record.cpus, record.memory_mib, record.disk_mib), (2, 256, 16));
    assert_eq!((record.template.as_str(), record.alias.as_deref()), ("base", Some("base")));
    assert!(
        record.started_at >= before && record.end_at == record.started_at + SignedDuration::from_hours(1)
    );
    assert_eq!(host.store().sandboxes().await.unwrap(), std::slice::from_ref(&record));
    assert_eq!(fleet.used(), Capacity { sandboxes: 1, cpus: 2, memory_mib: 256 });
    assert_eq!(fleet.all().len(), 1);

    let spec = spec(&host, &id);
    let env: BTreeMap<String, String> = serde_json::from_value(spec["env"].clone()).unwrap();
    let expected =
        [("A", "1"), ("E2B_SANDBOX", "true"), ("E2B_SANDBOX_ID", id.as_str()), ("E2B_TEMPLATE_ID", "base")];
    assert_eq!(env, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert_eq!(spec["access_token"].as_str(), record.access_token.as_deref());
    assert!(record.access_token.is_some() && record.traffic_token.is_none());
    assert_eq!(fs::metadata(host.folder(&id)).unwrap().permissions().mode() & 0o777, 0o700);
    let shim = pid(&host, &id, "shim_pid").unwrap();
    let session = rustix::process::getsid(Some(shim)).unwrap();
    assert_eq!(session, shim, "a session of its own");

    assert!(in_time(fleet.kill(&id)).await.unwrap());
    assert!(fleet.get(&id).is_none() && !in_time(fleet.kill(&id)).await.unwrap());
    in_time(made.gone()).await;
    assert_eq!(fleet.used(), Capacity::default());
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn what_a_client_may_choose_about_tokens_it_gets() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let open = NewSandbox { secure: false, public_traffic: false, ..request(&[]) };
    let record = in_time(fleet.create(&team, open)).await.unwrap().record();
    assert!(record.access_token.is_none() && record.traffic_token.is_some());
    assert!(spec(&host, &record.id).get("access_token").is_none());
    in_time(fleet.kill(&record.id)).await.unwrap();
}

#[tokio::test]
async fn a_failed_start_is_told_in_the_shims_words_and_leaves_nothing() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    for (start, expected) in [
        ("fail", "the sandbox did not start: the guest's kernel gave up"),
        ("crash", "the sandbox did not start: host-shim ended without a word (signal: 9 (SIGKILL))"),
    ] {
        let error = create(&fleet, &team, &[("FAKE_START", start)]).await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.message.as_str()), (500, expected));
        until("the VMM is gone", async || host.processes().is_empty()).await;
        host.assert_nothing_left().await;
    }
    for (env, expected) in
        [(("", "x"), "expected names without '='"), (("a=b", ""), "got \"a=b\""), (("a", "\0"), "has a NUL")]
    {
        let error = create(&fleet, &team, &[env]).await.unwrap_err();
        assert!(error.status.as_u16() == 400 && error.message.contains(expected), "{error}");
    }
    let unknown = NewSandbox { template: "none".into(), ..request(&[]) };
    let error = fleet.create(&team, unknown).await.unwrap_err();
    assert_eq!((error.status.as_u16(), error.message.as_str()), (404, "Template \"none\" not found"));
    assert_eq!(fleet.used(), Capacity::default());
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let config = Config { host_shim: "/no/host-shim".into(), ..config_of(&host) };
    let fleet = Fleet::open(config, host.store()).await.unwrap();
    let error = create(&fleet, &team, &[]).await.unwrap_err();
    assert!(error.message.contains("cannot start /no/host-shim: No such file"), "{error}");
    host.assert_nothing_left().await;
}

fn config_of(host: &Host) -> Config {
    Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        domain: "localhost".into(),
        data: host.data(),
        host_shim: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_shim.py"),
        image_builder: "/nonexistent".into(),
        kernel: None,
        guest_image: None,
        channel: Default::default(),
        allow_emulation: true,
        capacity: host.capacity,
        builds: Default::default(),
    }
}

#[tokio::test]
async fn a_vmm_that_dies_is_noticed_at_once() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    for victim in ["vmm_pid", "shim_pid"] {
        let made = create(&fleet, &team, &[]).await.unwrap();
        kill_process(pid(&host, made.id(), victim).unwrap(), Signal::KILL).unwrap();
        in_time(made.gone()).await;
        assert!(fleet.get(made.id()).is_none());
        until("the processes are gone", async || host.processes().is_empty()).await;
        host.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_client_that_gives_up_leaves_nothing() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let giving_up =
        tokio::time::timeout(Duration::ZERO, fleet.create(&team, request(&[("FAKE_START", "silent")])));
    assert!(giving_up.await.is_err());
    let waiting = {
        let (fleet, team) = (Arc::clone(&fleet), team.clone());
        tokio::spawn(async move { fleet.create(&team, request(&[("FAKE_START", "silent")])).await })
    };
    until("its VMM runs", async || {
        let records = host.store().sandboxes().await.unwrap();
        records.iter().any(|record| pid(&host, &record.id, "vmm_pid").is_some())
    })
    .await;
    assert_eq!(fleet.used().sandboxes, 1, "what is being started counts");
    waiting.abort();
    until("nothing is left", async || {
        host.store().sandboxes().await.unwrap().is_empty() && host.processes().is_empty()
    })
    .await;
    until("its room is free", async || fleet.used() == Capacity::default()).await;
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_shim_that_does_not_listen_is_killed_with_all_of_its_own() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[("FAKE_STOP", "deaf")]).await.unwrap();
    assert!(in_time(fleet.kill(made.id())).await.unwrap());
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn the_time_of_a_sandbox_can_be_moved_and_runs_out() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let short = NewSandbox { timeout: Duration::from_millis(1), ..request(&[]) };
    let gone = in_time(fleet.create(&team, short)).await.unwrap();
    in_time(gone.gone()).await;
    let made = create(&fleet, &team, &[]).await.unwrap();
    let later = Timestamp::now() + SignedDuration::from_hours(2);
    assert!(fleet.set_end(made.id(), later).await.unwrap());
    assert_eq!(made.record().end_at, later);
    assert_eq!(host.store().sandboxes().await.unwrap()[0].end_at, later);
    assert!(fleet.set_end(made.id(), Timestamp::now()).await.unwrap());
    in_time(made.gone()).await;
    assert!(!fleet.set_end(made.id(), later).await.unwrap());
    host.assert_nothing_left().await;
}

#[test]
fn a_killed_gateway_is_followed_by_one_that_goes_on() {
    let host = Host::new();
    let (kept, dead, short) = host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        let kept = create(&fleet, &team, &[]).await.unwrap();
        let dead = create(&fleet, &team, &[]).await.unwrap();
        let short = create(&fleet, &team, &[]).await.unwrap();
        assert!(
            matches!(host.try_open().await, Err(OpenError::Served { .. })),
            "one gateway for each folder"
        );
        (kept.record(), dead.record(), short.record())
    });
    let shim = pid(&host, &dead.id, "shim_pid").unwrap();
    kill_process(shim, Signal::KILL).unwrap();
    let named = format!("{}:", shim.as_raw_nonzero());
    while host.processes().iter().any(|line| line.starts_with(&named)) {
        std::thread::yield_now();
    }
    // What a sandbox of a lost database leaves, and what a stranger does.
    let lost = host.data().sandboxes().join("lost1");
    fs::create_dir(&lost).unwrap();
    fs::write(lost.join("lock"), "kept\n").unwrap();

    host.killed_after(async |fleet| {
        let mut ids: Vec<_> = fleet.all().iter().map(|sandbox| sandbox.id().clone()).collect();
        ids.sort();
        let mut expected = vec![kept.id.clone(), short.id.clone()];
        expected.sort();
        assert_eq!(ids, expected);
        assert_eq!(fleet.get(&kept.id).unwrap().record(), kept);
        assert_eq!(fleet.used().sandboxes, 2);
        assert!(!lost.exists() && !host.folder(&dead.id).exists());
        // Its time runs out while no gateway is there.
        fleet.set_end(&short.id, Timestamp::now() + SignedDuration::from_millis(1)).await.unwrap();
    });
    host.killed_after(async |fleet| {
        if let Some(short) = fleet.get(&short.id) {
            in_time(short.gone()).await;
        }
        let kept = fleet.get(&kept.id).unwrap();
        // Also of one that was found again, the end is noticed by itself.
        kill_process(pid(&host, kept.id(), "vmm_pid").unwrap(), Signal::KILL).unwrap();
        in_time(kept.gone()).await;
        host.assert_nothing_left().await;
    });
}

#[test]
fn a_found_sandbox_is_killed_however_it_resists() {
    let host = Host::new();
    let ids = host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        let meek = create(&fleet, &team, &[]).await.unwrap();
        let deaf = create(&fleet, &team, &[("FAKE_STOP", "deaf")]).await.unwrap();
        [meek.id().clone(), deaf.id().clone()]
    });
    host.killed_after(async |fleet| {
        for id in &ids {
            assert!(in_time(fleet.kill(id)).await.unwrap());
        }
        host.assert_nothing_left().await;
    });
}

#[test]
fn what_a_killed_gateway_left_half_way_is_ended() {
    let host = Host::new();
    host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        let record_of = |script: &'static str| {
            let (fleet, team) = (Arc::clone(&fleet), team.clone());
            tokio::spawn(async move { create(&fleet, &team, &[("FAKE_START", script)]).await })
        };
        // In the boot.
        record_of("silent");
        until("its VMM runs", async || {
            let records = host.store().sandboxes().await.unwrap();
            records.iter().any(|record| pid(&host, &record.id, "vmm_pid").is_some())
        })
        .await;
        // Ready and not given to its team; asked to end and still there.
        for stage in [Stage::Starting, Stage::Ending] {
            let mut record = create(&fleet, &team, &[]).await.unwrap().record();
            record.stage = stage;
            host.store().put_sandbox(&record).await.unwrap();
        }
        // Before its folder was made, and before its shim was started.
        for (id, folder) in [("none1", false), ("none2", true)] {
            let mut record = fleet.all()[0].record();
            record.stage = Stage::Starting;
            record.id = id.parse().unwrap();
            if folder {
                fs::create_dir(host.folder(&record.id)).unwrap();
                fs::write(host.folder(&record.id).join("spec.json"), "{}").unwrap();
            }
            host.store().put_sandbox(&record).await.unwrap();
        }
        assert_eq!(host.store().sandboxes().await.unwrap().len(), 5);
    });
    host.killed_after(async |fleet| {
        assert!(fleet.all().is_empty());
        assert_eq!(fleet.used(), Capacity::default());
        host.assert_nothing_left().await;
    });
}

#[tokio::test]
async fn quotas_hold_for_what_is_being_started_too() {
    let host = Host::new();
    let team = host.team("small", Capacity { sandboxes: 3, ..Capacity::UNLIMITED }).await;
    let fleet = host.open().await;
    let all = futures::future::join_all((0..10).map(|_| create(&fleet, &team, &[]))).await;
    let refused: Vec<_> = all.iter().filter_map(|made| made.as_ref().err()).collect();
    assert_eq!(refused.len(), 7);
    for error in refused {
        assert_eq!((error.status.as_u16(), error.retry_after), (429, None));
        assert_eq!(error.message, "team \"small\" may have 3 concurrent sandboxes: 3 used, 1 more asked");
    }
    let other = host.team("other", Capacity::UNLIMITED).await;
    create(&fleet, &other, &[]).await.unwrap();
    let first = fleet.all().into_iter().find(|sandbox| sandbox.record().team == team.id).unwrap();
    in_time(fleet.kill(first.id())).await.unwrap();
    create(&fleet, &team, &[]).await.unwrap();
    for sandbox in fleet.all() {
        in_time(fleet.kill(sandbox.id())).await.unwrap();
    }
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_create_waits_for_the_room_of_one_that_ends() {
    let mut host = Host::new();
    host.capacity.memory_mib = 300;
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let first = create(&fleet, &team, &[]).await.unwrap();
    let (second, killed) = tokio::join!(create(&fleet, &team, &[]), in_time(fleet.kill(first.id())));
    assert!(killed.unwrap());
    let second = second.unwrap();
    in_time(fleet.kill(second.id())).await.unwrap();
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn twenty_at_once() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = futures::future::join_all((0..20).map(|_| create(&fleet, &team, &[]))).await;
    assert!(made.iter().all(Result::is_ok));
    assert_eq!(fleet.all().len(), 20);
    let kills = fleet.all().into_iter().map(|sandbox| {
        let fleet = Arc::clone(&fleet);
        async move { fleet.kill(sandbox.id()).await.unwrap() }
    });
    assert!(in_time(futures::future::join_all(kills)).await.into_iter().all(|killed| killed));
    host.assert_nothing_left().await;
}
