//! Snapshots and forks: what is left when somebody is killed, and what a team may have.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tiffin_gateway::config::Capacity;
use tiffin_gateway::fleet::NewSandbox;

use super::{Host, create, in_time, pid, request, spec, until};

const HOUR: Duration = Duration::from_secs(3600);

/// Folders of snapshots.
fn folders(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.data().path().join("snapshots")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// What sandboxes wrote for the gateway, and it has not taken.
fn written(host: &Host) -> usize {
    let sandboxes = fs::read_dir(host.data().sandboxes()).into_iter().flatten();
    let entries = sandboxes.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("fork-")).count()
}

#[tokio::test]
async fn a_snapshot_or_fork_that_fails_leaves_nothing() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    for (word, status) in [("fail", 500), ("full", 507), ("crash", 500), ("done", 500)] {
        let made = create(&fleet, &team, &[("FAKE_SNAPSHOT", word), ("FAKE_FORK", word)]).await.unwrap();
        let error = in_time(fleet.snapshot(&made, Some("n"))).await.unwrap_err();
        assert_eq!(error.status.as_u16(), status, "{word}: {error}");
        let died = word == "crash" || word == "done";
        if died {
            in_time(made.gone()).await;
        }
        let error = in_time(fleet.fork(&made, 2, HOUR)).await.unwrap_err();
        assert_eq!(error.status.as_u16(), if died { 404 } else { status }, "{word}: {error}");
        assert_eq!((folders(&host).len(), written(&host)), (0, 0), "{word}");
        assert!(fleet.snapshots(&team.id).await.unwrap().is_empty());
        in_time(fleet.kill(made.id())).await.unwrap();
    }
    // Each fork fails by itself; what they were started from goes.
    let made = create(&fleet, &team, &[]).await.unwrap();
    let mut changed = spec(&host, made.id());
    changed["env"]["FAKE_START"] = "fail".into();
    fs::write(host.folder(made.id()).join("spec.json"), changed.to_string()).unwrap();
    let forks = in_time(fleet.fork(&made, 3, HOUR)).await.unwrap();
    assert_eq!(forks.len(), 3);
    until("what was written is gone", async || written(&host) == 0).await;
    for sandbox in fleet.all() {
        in_time(fleet.kill(sandbox.id())).await.unwrap();
    }
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_kill_ends_a_sandbox_that_is_being_snapshotted() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[("FAKE_SNAPSHOT", "wait")]).await.unwrap();
    let taking = {
        let (fleet, made) = (Arc::clone(&fleet), Arc::clone(&made));
        tokio::spawn(async move { fleet.snapshot(&made, None).await })
    };
    assert!(in_time(fleet.kill(made.id())).await.unwrap());
    assert!(in_time(taking).await.unwrap().is_err());
    assert!(folders(&host).is_empty());
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn snapshots_count_for_their_teams_disk() {
    let host = Host::new();
    let team = host.team("small", Capacity::UNLIMITED).await;
    // The RAM of a snapshot that is being written, and little more.
    host.store().set_disk_quota(&team.id, 257).await.unwrap();
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[("FAKE_SNAPSHOT", "wait")]).await.unwrap();
    let other = create(&fleet, &team, &[]).await.unwrap();
    let (taken, refused) = tokio::join!(in_time(fleet.snapshot(&made, None)), async {
        // Its shim was asked, so the room is taken.
        let waits = host.folder(made.id()).join("waits");
        until("it waits", async || waits.exists()).await;
        let refused = in_time(fleet.fork(&other, 1, HOUR)).await;
        fs::write(host.folder(made.id()).join("go"), "").unwrap();
        refused
    });
    assert_eq!(refused.unwrap_err().status.as_u16(), 429);
    let taken = taken.unwrap();
    assert!(
        taken.disk_bytes > 0 && taken.disk_bytes < 1 << 20,
        "what it shares counts for nobody: {taken:?}"
    );
    in_time(fleet.snapshot(&other, None)).await.unwrap();
    for snapshot in fleet.snapshots(&team.id).await.unwrap() {
        assert!(in_time(fleet.delete_snapshot(&team.id, snapshot.id.as_str())).await.unwrap());
    }
    assert!(folders(&host).is_empty());
    for sandbox in fleet.all() {
        in_time(fleet.kill(sandbox.id())).await.unwrap();
    }
    host.assert_nothing_left().await;
}

#[test]
fn a_gateway_that_is_killed_while_a_snapshot_or_fork_is_made_leaves_nothing_of_it() {
    let host = Host::new();
    let (team, kept, ids) = host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        let plain = create(&fleet, &team, &[]).await.unwrap();
        let kept = in_time(fleet.snapshot(&plain, Some("kept"))).await.unwrap();
        let mut ids = vec![plain.id().clone()];
        for word in ["FAKE_SNAPSHOT", "FAKE_FORK"] {
            let made = create(&fleet, &team, &[(word, "wait")]).await.unwrap();
            ids.push(made.id().clone());
            let fleet = Arc::clone(&fleet);
            tokio::spawn(async move {
                match word {
                    "FAKE_FORK" => fleet.fork(&made, 2, HOUR).await.map(drop),
                    _ => fleet.snapshot(&made, Some("half")).await.map(drop),
                }
            });
        }
        for id in &ids[1..] {
            until("its shim has heard of it", async || host.folder(id).join("waits").exists()).await;
        }
        (team, kept, ids)
    });
    // The shims carry it out, for nobody; a snapshot without a record, and a record without a snapshot.
    for id in &ids[1..] {
        fs::write(host.folder(id).join("go"), "").unwrap();
    }
    fs::create_dir_all(host.data().path().join("snapshots/sna0lost")).unwrap();
    host.killed_after(async |fleet| {
        let snapshots = fleet.snapshots(&team.id).await.unwrap();
        assert_eq!(snapshots, std::slice::from_ref(&kept));
        assert_eq!(folders(&host), [host.data().path().join("snapshots").join(kept.id.as_str())]);
        assert_eq!(fleet.all().len(), 3, "the sandboxes themselves go on");
        // From what was kept others start, also once its source is gone.
        for id in &ids {
            in_time(fleet.kill(id)).await.unwrap();
        }
        assert_eq!(written(&host), 0);
        let wanted = NewSandbox { template: "kept".into(), ..request(&[]) };
        let started = in_time(fleet.create(&team, wanted)).await.unwrap();
        assert_eq!(started.record().template, kept.id.as_str());
        // Its shim dies, and so does it.
        kill_process(pid(&host, started.id(), "shim_pid").unwrap(), Signal::KILL).unwrap();
        in_time(started.gone()).await;
        assert!(in_time(fleet.delete_snapshot(&team.id, "kept")).await.unwrap());
        assert!(!in_time(fleet.delete_snapshot(&team.id, "kept")).await.unwrap());
        host.assert_nothing_left().await;
    });
}
