//! Sandboxes that are paused and go on: by order, by their time, by a request; and whoever is killed meanwhile.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::process::{Signal, kill_process};
use sandbox_folder::SandboxId;
use serde_json::json;
use tiffin_gateway::config::Capacity;
use tiffin_gateway::fleet::{Fleet, NewSandbox, Resume, Sandbox};
use tiffin_gateway::store::{LifePolicy, OnTimeout, Stage};

use super::{Host, create, in_time, pid, request, spec, until};

const HOUR: Resume = Resume { timeout: Duration::from_secs(3600), on_timeout: None };

/// Another script for the shim that comes next, or for the next call of this one where it reads it anew.
fn rewrite(host: &Host, id: &SandboxId, name: &str, word: &str) {
    let mut spec = spec(host, id);
    spec["env"][name] = json!(word);
    fs::write(host.folder(id).join("spec.json"), spec.to_string()).unwrap();
}

fn stage(sandbox: &Sandbox) -> Stage {
    sandbox.record().stage
}

async fn kept(host: &Host, id: &SandboxId) -> Stage {
    let records = host.store().sandboxes().await.unwrap();
    records.into_iter().find(|record| record.id == *id).unwrap().stage
}

async fn end_all(fleet: &Fleet, host: &Host) {
    for sandbox in fleet.all() {
        assert!(in_time(fleet.kill(sandbox.id())).await.unwrap());
    }
    assert_eq!(fleet.used(), Capacity::default());
    host.assert_nothing_left().await;
}

#[tokio::test]
async fn a_paused_sandbox_costs_no_room_and_goes_on() {
    let host = Host::new();
    let team = host.team("a", Capacity { sandboxes: 1, ..Capacity::UNLIMITED }).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[]).await.unwrap();
    let before = made.record();
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    assert!(!in_time(fleet.pause(&made)).await.unwrap(), "it is paused already");
    assert_eq!((stage(&made), kept(&host, made.id()).await), (Stage::Paused, Stage::Paused));
    assert!(made.record().end_at <= Timestamp::now());
    assert_eq!((fleet.used(), host.processes().len()), (Capacity::default(), 0));
    // Its place in the quota is free, and it waits for it.
    let other = create(&fleet, &team, &[]).await.unwrap();
    let error = in_time(fleet.resume(&made, HOUR)).await.unwrap_err();
    assert_eq!((error.status.as_u16(), stage(&made)), (429, Stage::Paused));
    assert!(in_time(fleet.kill(other.id())).await.unwrap());

    assert!(in_time(fleet.resume(&made, HOUR)).await.unwrap());
    assert!(!in_time(fleet.resume(&made, HOUR)).await.unwrap(), "it runs already");
    let after = made.record();
    assert_eq!((after.stage, kept(&host, made.id()).await), (Stage::Running, Stage::Running));
    assert_eq!((&after.access_token, after.started_at), (&before.access_token, before.started_at));
    assert!(after.end_at > Timestamp::now() + SignedDuration::from_mins(59));
    assert!(!host.folder(made.id()).join("snapshot").exists());
    assert_eq!(fleet.used().sandboxes, 1);

    // Also a paused one can be killed.
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    end_all(&fleet, &host).await;
    assert_eq!(in_time(fleet.pause(&made)).await.unwrap_err().status.as_u16(), 404);
    assert_eq!(in_time(fleet.resume(&made, HOUR)).await.unwrap_err().status.as_u16(), 404);
}

#[tokio::test]
async fn a_pause_that_fails_leaves_a_running_sandbox_and_a_crash_is_judged_by_its_snapshot() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    for (word, status) in [("fail", 500), ("full", 507)] {
        let made = create(&fleet, &team, &[("FAKE_PAUSE", word)]).await.unwrap();
        let error = in_time(fleet.pause(&made)).await.unwrap_err();
        assert_eq!(error.status.as_u16(), status);
        assert!(error.message.contains("the script says so"), "{error}");
        assert_eq!((stage(&made), kept(&host, made.id()).await), (Stage::Running, Stage::Running));
    }
    let lost = create(&fleet, &team, &[("FAKE_PAUSE", "crash")]).await.unwrap();
    assert!(in_time(fleet.pause(&lost)).await.is_err());
    in_time(lost.gone()).await;
    // Its snapshot was whole when its shim was killed: nothing of it is lost.
    let saved = create(&fleet, &team, &[("FAKE_PAUSE", "done")]).await.unwrap();
    assert!(in_time(fleet.pause(&saved)).await.unwrap());
    assert_eq!(stage(&saved), Stage::Paused);
    assert!(in_time(fleet.resume(&saved, HOUR)).await.unwrap());
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn a_resume_that_fails_leaves_a_paused_sandbox_until_its_snapshot_is_used_up() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[]).await.unwrap();
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    let paused_at = made.record().end_at;
    for (word, expected) in
        [("fail", "the guest's kernel gave up"), ("crash", "host-shim ended without a word")]
    {
        rewrite(&host, made.id(), "FAKE_RESUME", word);
        let error = in_time(fleet.resume(&made, HOUR)).await.unwrap_err();
        assert!(error.status.as_u16() == 500 && error.message.contains(expected), "{error}");
        assert_eq!((stage(&made), made.record().end_at), (Stage::Paused, paused_at));
        assert_eq!((kept(&host, made.id()).await, fleet.used()), (Stage::Paused, Capacity::default()));
    }
    rewrite(&host, made.id(), "FAKE_RESUME", "ready");
    assert!(in_time(fleet.resume(&made, HOUR)).await.unwrap());
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    rewrite(&host, made.id(), "FAKE_RESUME", "used");
    assert!(in_time(fleet.resume(&made, HOUR)).await.is_err());
    in_time(made.gone()).await;
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn resumes_at_once_are_one_and_a_failure_is_everybodys() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[]).await.unwrap();
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    let resumes = || futures::future::join_all((0..20).map(|_| in_time(fleet.resume(&made, HOUR))));
    rewrite(&host, made.id(), "FAKE_RESUME", "fail");
    assert!(resumes().await.iter().all(Result::is_err));
    rewrite(&host, made.id(), "FAKE_RESUME", "ready");
    let done = resumes().await;
    assert_eq!(done.iter().filter(|done| *done.as_ref().unwrap()).count(), 1, "{done:?}");
    // Whoever comes while it is being paused is served after that.
    let (paused, resumed) = tokio::join!(in_time(fleet.pause(&made)), in_time(fleet.resume(&made, HOUR)));
    assert!(paused.unwrap() && resumed.unwrap());
    assert_eq!(stage(&made), Stage::Running);
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn a_kill_comes_between_whatever_is_being_done() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let made = create(&fleet, &team, &[("FAKE_PAUSE", "wait")]).await.unwrap();
    let (paused, killed) = tokio::join!(in_time(fleet.pause(&made)), async {
        until("it is being paused", async || stage(&made) == Stage::Pausing).await;
        in_time(fleet.kill(made.id())).await
    });
    assert!(paused.unwrap_err().status.as_u16() == 404 && killed.unwrap());
    host.assert_nothing_left().await;

    let made = create(&fleet, &team, &[("FAKE_RESUME", "silent")]).await.unwrap();
    assert!(in_time(fleet.pause(&made)).await.unwrap());
    let (resumed, killed) = tokio::join!(in_time(fleet.resume(&made, HOUR)), async {
        until("it is being resumed", async || pid(&host, made.id(), "vmm_pid").is_some()).await;
        in_time(fleet.kill(made.id())).await
    });
    assert!(resumed.unwrap_err().status.as_u16() == 404 && killed.unwrap());
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn a_sandbox_whose_time_is_up_is_paused_where_that_was_asked_for() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let life = LifePolicy { on_timeout: OnTimeout::Pause, ..LifePolicy::default() };
    let short = NewSandbox { timeout: Duration::from_millis(1), life, ..request(&[]) };
    let made = in_time(fleet.create(&team, short.clone())).await.unwrap();
    until("it is paused", async || stage(&made) == Stage::Paused).await;
    assert!(!in_time(fleet.wake(&made)).await.unwrap(), "no request resumes it");
    // Resumed with another wish for its end.
    let wish = Resume { timeout: Duration::from_millis(1), on_timeout: Some(OnTimeout::Kill) };
    assert!(in_time(fleet.resume(&made, wish)).await.unwrap());
    in_time(made.gone()).await;

    let life = LifePolicy { auto_resume: true, ..life };
    let woken = in_time(fleet.create(&team, NewSandbox { life, ..short })).await.unwrap();
    until("it is paused", async || stage(&woken) == Stage::Paused).await;
    let wakes = futures::future::join_all((0..20).map(|_| in_time(fleet.wake(&woken)))).await;
    assert!(wakes.into_iter().all(|awake| awake.unwrap()));
    assert_eq!(stage(&woken), Stage::Running);
    assert!(woken.record().end_at > Timestamp::now() + SignedDuration::from_mins(4), "it gets five minutes");
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn one_that_cannot_be_paused_at_its_end_runs_on_and_is_asked_again() {
    let host = Host::new();
    let team = host.team("a", Capacity::UNLIMITED).await;
    let fleet = host.open().await;
    let life = LifePolicy { on_timeout: OnTimeout::Pause, ..LifePolicy::default() };
    let short = NewSandbox { timeout: Duration::from_millis(1), life, ..request(&[("FAKE_PAUSE", "full")]) };
    let made = in_time(fleet.create(&team, short)).await.unwrap();
    until("it was tried", async || host.store().sandboxes().await.unwrap()[0].stage == Stage::Pausing).await;
    until("it runs on", async || stage(&made) == Stage::Running).await;
    assert_eq!(fleet.used().sandboxes, 1);
    end_all(&fleet, &host).await;
}

#[tokio::test]
async fn a_team_pauses_no_more_than_its_disk_takes() {
    let host = Host::new();
    let team = host.team("small", Capacity::UNLIMITED).await;
    // Two of 256 MiB fit while they are written; what they take then is less.
    host.store().set_disk_quota(&team.id, 300).await.unwrap();
    let fleet = host.open().await;
    let first = create(&fleet, &team, &[]).await.unwrap();
    assert!(in_time(fleet.pause(&first)).await.unwrap());
    let second = create(&fleet, &team, &[("FAKE_PAUSE", "wait")]).await.unwrap();
    let third = create(&fleet, &team, &[]).await.unwrap();
    let (paused, refused) = tokio::join!(in_time(fleet.pause(&second)), async {
        until("it is being written", async || kept(&host, second.id()).await == Stage::Pausing).await;
        let refused = in_time(fleet.pause(&third)).await;
        fs::write(host.folder(second.id()).join("go"), "").unwrap();
        refused
    });
    assert!(paused.unwrap());
    let error = refused.unwrap_err();
    assert_eq!(error.status.as_u16(), 429);
    assert!(
        error.message.contains("may have 300 MiB of paused sandboxes and snapshots: 257 used"),
        "{error}"
    );
    assert_eq!(stage(&third), Stage::Running);
    assert!(in_time(fleet.pause(&third)).await.unwrap(), "now it is known what they take");
    end_all(&fleet, &host).await;
}

/// What a gateway finds that was killed while a sandbox was on its way from one stage to another.
struct Found {
    stage: Stage,
    processes: bool,
}

/// Kills the gateway at each step of a pause and of a resume, and then, in some of them, the shim.
#[test]
fn whoever_is_killed_at_a_step_the_sandbox_is_whole_or_gone() {
    let host = Host::new();
    let team = host.killed_after(async |_| host.team("a", Capacity::UNLIMITED).await);
    // The step: the script that holds it there, what the shim is told next, and what is found.
    let paused = Some(Found { stage: Stage::Paused, processes: false });
    for (case, held, shim_dies, go, expected) in [
        ("being paused, and it ends well", "FAKE_PAUSE", false, true, &paused),
        ("being paused, and the shim dies too", "FAKE_PAUSE", true, false, &None),
        (
            "being resumed, and it ends well",
            "FAKE_RESUME",
            false,
            true,
            &Some(Found { stage: Stage::Running, processes: true }),
        ),
        ("being resumed, and the shim dies too", "FAKE_RESUME", true, false, &paused),
    ] {
        let id = host.killed_after(async |fleet| {
            let made = create(&fleet, &team, &[(held, "wait")]).await.unwrap();
            let id = made.id().clone();
            let begun = if held == "FAKE_PAUSE" { Stage::Pausing } else { Stage::Resuming };
            if begun == Stage::Resuming {
                assert!(in_time(fleet.pause(&made)).await.unwrap());
                fs::remove_file(host.folder(&id).join("state.json")).unwrap();
            }
            let (fleet, work) = (Arc::clone(&fleet), Arc::clone(&made));
            tokio::spawn(async move {
                match begun {
                    Stage::Pausing => fleet.pause(&work).await,
                    _ => fleet.resume(&work, HOUR).await,
                }
            });
            until("it has begun", async || {
                kept(&host, &id).await == begun && pid(&host, &id, "shim_pid").is_some()
            })
            .await;
            id
        });
        if shim_dies {
            let shim = pid(&host, &id, "shim_pid").unwrap();
            kill_process(shim, Signal::KILL).unwrap();
            while !host.processes().is_empty() {
                std::thread::yield_now();
            }
        }
        if go {
            fs::write(host.folder(&id).join("go"), "").unwrap();
        }
        host.killed_after(async |fleet| {
            let found = fleet.get(&id);
            let Some(expected) = expected else {
                assert!(found.is_none(), "{case}");
                host.assert_nothing_left().await;
                return;
            };
            let found = found.unwrap_or_else(|| panic!("{case}: it is gone"));
            until(case, async || stage(&found) == expected.stage).await;
            assert_eq!(kept(&host, &id).await, expected.stage, "{case}");
            assert_eq!(host.processes().is_empty(), !expected.processes, "{case}");
            assert_eq!(fleet.used().sandboxes, u32::from(expected.processes), "{case}");
            let _ = fs::remove_file(host.folder(&id).join("go"));
            rewrite(&host, &id, held, "ready");
            in_time(fleet.resume(&found, HOUR)).await.unwrap();
            assert_eq!(stage(&found), Stage::Running, "{case}");
            end_all(&fleet, &host).await;
        });
    }
}

#[test]
fn a_paused_sandbox_outlives_its_gateway_and_one_that_was_lost_is_forgotten() {
    let host = Host::new();
    let (kept_id, lost) = host.killed_after(async |fleet| {
        let team = host.team("a", Capacity::UNLIMITED).await;
        let made = create(&fleet, &team, &[]).await.unwrap();
        let lost = create(&fleet, &team, &[]).await.unwrap();
        for sandbox in [&made, &lost] {
            assert!(in_time(fleet.pause(sandbox)).await.unwrap());
        }
        (made.id().clone(), lost.id().clone())
    });
    fs::remove_dir_all(host.folder(&lost).join("snapshot")).unwrap();
    host.killed_after(async |fleet| {
        assert!(fleet.get(&lost).is_none() && !host.folder(&lost).exists());
        let made = fleet.get(&kept_id).unwrap();
        assert_eq!(stage(&made), Stage::Paused);
        assert!(in_time(fleet.resume(&made, HOUR)).await.unwrap());
        // Somebody pauses it behind the gateway's back: it is not lost.
        let api = sandbox_folder::api::ApiClient::unix(host.folder(&kept_id).join("api.sock"));
        in_time(api.pause()).await.unwrap();
        until("it is noticed", async || stage(&made) == Stage::Paused).await;
        end_all(&fleet, &host).await;
    });
}
