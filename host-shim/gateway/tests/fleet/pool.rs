//! Pools: parked sandboxes are given away, made anew, found again, and never lost.

use std::fs;
use std::sync::Arc;

use rustix::process::{Signal, kill_process};
use template::RuntimeConfig;
use tiffin_gateway::config::Capacity;
use tiffin_gateway::fleet::{Came, Fleet, PoolSize};
use tiffin_gateway::store::Stage;

use super::{Host, create, in_time, pid, spec, until};

fn pool(count: u32) -> [PoolSize; 1] {
    [PoolSize { template: "base".into(), count }]
}

async fn full(fleet: &Fleet, count: usize) {
    until("the pool is full", async || fleet.parked() == count).await;
}

fn came(fleet: &Fleet, how: Came) -> u64 {
    fleet.starts().into_iter().find(|(one, _)| *one == how).unwrap().1
}

async fn end_all(fleet: &Fleet, host: &Host) {
    fleet.start_pools(&[]);
    for sandbox in fleet.all() {
        assert!(in_time(fleet.kill(sandbox.id())).await.unwrap());
    }
    until("nothing is left", async || {
        host.store().parked().await.unwrap().is_empty() && host.processes().is_empty()
    })
    .await;
    until("all room is free", async || fleet.used() == Capacity::default()).await;
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_create_takes_a_parked_sandbox_and_another_is_parked() {
    let host = Host::new();
    let team = host.team("a", Capacity { sandboxes: 2, ..Capacity::UNLIMITED }).await;
    let fleet = host.open().await;
    fleet.start_pools(&pool(1));
    full(&fleet, 1).await;
    let parked = host.store().parked().await.unwrap().remove(0);
    assert_eq!(fleet.used().sandboxes, 1, "it takes room of the machine");
    assert!(fleet.all().is_empty() && fleet.get(&parked.id).is_none(), "and is nobody's");
    assert!(spec(&host, &parked.id).get("access_token").is_none());

    let made = create(&fleet, &team, &[("A", "1")]).await.unwrap();
    let record = made.record();
    assert_eq!((made.id(), record.stage, came(&fleet, Came::FromPool)), (&parked.id, Stage::Running, 1));
    assert_eq!(record.agent_version, "0.6.13");
    let told = spec(&host, made.id());
    assert_eq!(told["access_token"].as_str(), record.access_token.as_deref());
    assert!(record.access_token.is_some());
    assert_eq!(host.store().sandboxes().await.unwrap(), std::slice::from_ref(&record));
    full(&fleet, 1).await;
    assert_ne!(host.store().parked().await.unwrap()[0].id, parked.id);

    // One is asked for that its team may not have: it stays parked.
    create(&fleet, &team, &[]).await.unwrap();
    full(&fleet, 1).await;
    let before = host.store().parked().await.unwrap();
    assert_eq!(create(&fleet, &team, &[]).await.unwrap_err().status.as_u16(), 429);
    assert_eq!((fleet.parked(), host.store().parked().await.unwrap()), (1, before));
    end_all_but_pool(&fleet).await;
    // It is like any other: it can be paused and goes on.
    let made = create(&fleet, &team, &[]).await.unwrap();
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    end_all(&fleet, &host).await;
}

async fn end_all_but_pool(fleet: &Arc<Fleet>) {
    for sandbox in fleet.all() {
        assert!(in_time(fleet.kill(sandbox.id())).await.unwrap());
    }
}

#[tokio::test]
async fn a_parked_sandbox_that_fails_is_ended_and_the_create_succeeds() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    fleet.start_pools(&pool(2));
    full(&fleet, 2).await;
    for word in ["fail", "crash", "done"] {
        let made = create(&fleet, &team, &[("FAKE_CONFIGURE", word)]).await.unwrap();
        assert_eq!(made.record().stage, Stage::Running, "{word}");
    }
    assert!(came(&fleet, Came::Booted) >= 1, "what is no use in the pool is started");
    assert_eq!(came(&fleet, Came::FromPool), 0);
    // One that dies while it waits is replaced.
    full(&fleet, 2).await;
    let victim = host.store().parked().await.unwrap().remove(0);
    kill_process(pid(&host, &victim.id, "shim_pid").unwrap(), Signal::KILL).unwrap();
    until("it is gone", async || !host.folder(&victim.id).exists()).await;
    full(&fleet, 2).await;
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn a_template_that_was_replaced_is_not_given_from_the_pool() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    fleet.start_pools(&pool(1));
    full(&fleet, 1).await;
    let old = host.store().parked().await.unwrap().remove(0);
    host.template("base", RuntimeConfig { workdir: "/new".into(), ..RuntimeConfig::default() });
    let made = create(&fleet, &team, &[]).await.unwrap();
    assert!(*made.id() != old.id && came(&fleet, Came::FromPool) == 0);
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn parked_sandboxes_make_room_for_whoever_needs_it() {
    let mut host = Host::new();
    host.capacity.memory_mib = 600;
    host.template("other", RuntimeConfig::default());
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    fleet.start_pools(&pool(2));
    full(&fleet, 2).await;
    let other = tiffin_gateway::fleet::NewSandbox { template: "other".into(), ..super::request(&[]) };
    for _ in 0..2 {
        in_time(fleet.create(&team, other.clone())).await.unwrap();
    }
    assert_eq!(
        (fleet.parked(), fleet.used().memory_mib),
        (0, 512),
        "the pool is not filled where there is no room"
    );
    end_all(&fleet, &host).await;
}

#[test]
fn a_restart_finds_the_pool_again_and_ends_what_was_taken_half_way() {
    let host = Host::new();
    let (team, parked) = host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        fleet.start_pools(&pool(3));
        full(&fleet, 3).await;
        (team, host.store().parked().await.unwrap())
    });
    // Of the three: one was told what it is, and the gateway died before it was its team's; one has died.
    let api = host.folder(&parked[0].id).join("api.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(sandbox_folder::api::ApiClient::unix(api).configure(&serde_json::json!({}))).unwrap();
    kill_process(pid(&host, &parked[1].id, "shim_pid").unwrap(), Signal::KILL).unwrap();
    // One whose folder was not made yet.
    let mut none = parked[0].clone();
    none.id = "none1".parse().unwrap();
    runtime.block_on(host.store().put_parked(&none)).unwrap();
    drop(runtime);
    host.killed_after(async |fleet| {
        assert_eq!((fleet.parked(), fleet.used().sandboxes), (1, 1));
        let left: Vec<_> = host.store().parked().await.unwrap().into_iter().map(|one| one.id).collect();
        assert_eq!(left, [parked[2].id.clone()]);
        assert!(!host.folder(&parked[0].id).exists() && !host.folder(&parked[1].id).exists());
        let made = create(&fleet, &team, &[]).await.unwrap();
        assert_eq!(*made.id(), parked[2].id);
        in_time(fleet.kill(made.id())).await.unwrap();
    });
    // Where no pool is wanted any more, none is kept.
    host.killed_after(async |fleet| {
        fleet.start_pools(&pool(2));
        full(&fleet, 2).await;
    });
    host.killed_after(async |fleet| {
        assert_eq!(fleet.parked(), 2);
        end_all(&fleet, &host).await;
    });
    assert!(fs::read_dir(host.data().sandboxes()).unwrap().next().is_none());
}

#[test]
fn a_gateway_that_is_killed_while_it_parks_leaves_what_the_next_one_ends() {
    let host = Host::new();
    host.killed_after(async |fleet| {
        fleet.start_pools(&pool(5));
        until("one is being parked", async || !host.store().parked().await.unwrap().is_empty()).await;
    });
    host.killed_after(async |fleet| {
        end_all(&fleet, &host).await;
    });
}
