use super::*;

const QUOTA: Capacity = Capacity { sandboxes: 2, cpus: 4, memory_mib: 2048 };

fn record(team: &TeamId) -> SandboxRecord {
    SandboxRecord {
        id: "abc1".parse().unwrap(),
        team: team.clone(),
        stage: Stage::Starting,
        template: "base".into(),
        alias: None,
        metadata: [("a".to_owned(), "é\"".to_owned())].into(),
        cpus: 1,
        memory_mib: 512,
        disk_mib: 1024,
        agent_version: "0.1.0".into(),
        access_token: Some("t".into()),
        traffic_token: None,
        started_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        end_at: Timestamp::UNIX_EPOCH,
        life: Default::default(),
    }
}

#[tokio::test]
async fn what_was_kept_is_there_after_a_restart() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/gateway.db");
    let store = Store::open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let team = store.create_team("a", QUOTA).await.unwrap();
    let key = KeyHash::of("e2b_x");
    let id = store.add_key(&team.id, &key, "ci", "x").await.unwrap();
    store.put_sandbox(&record(&team.id)).await.unwrap();
    let running = SandboxRecord { stage: Stage::Running, ..record(&team.id) };
    store.put_sandbox(&running).await.unwrap();
    drop(store);

    let store = Store::open(&path).unwrap();
    assert_eq!(store.team_by_key(&key).await.unwrap(), Some(team.clone()));
    assert_eq!(store.team_by_name("a").await.unwrap(), Some(team.clone()));
    assert_eq!(store.team_by_key(&KeyHash::of("e2b_y")).await.unwrap(), None);
    assert_eq!(store.sandboxes().await.unwrap(), [running]);
    assert!(store.set_quota(&team.id, Capacity { cpus: 9, ..QUOTA }).await.unwrap());
    assert_eq!(store.teams().await.unwrap()[0].quota.cpus, 9);
    assert!(store.revoke_key(id).await.unwrap() && !store.revoke_key(id).await.unwrap());
    assert_eq!(store.team_by_key(&key).await.unwrap(), None);
    assert!(store.keys().await.unwrap().is_empty());
    assert!(store.remove_sandbox(&"abc1".parse().unwrap()).await.unwrap());
    assert!(!store.remove_sandbox(&"abc1".parse().unwrap()).await.unwrap());
}

#[tokio::test]
async fn two_programs_share_a_database() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gateway.db");
    let (one, two) = (Store::open(&path).unwrap(), Store::open(&path).unwrap());
    let team = one.create_team("a", QUOTA).await.unwrap();
    two.add_key(&team.id, &KeyHash::of("k"), "", "").await.unwrap();
    assert_eq!(one.team_by_key(&KeyHash::of("k")).await.unwrap(), Some(team));
    assert!(two.create_team("a", QUOTA).await.is_err(), "a name is one team's");
}

#[tokio::test]
async fn a_database_of_a_later_version_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gateway.db");
    drop(Store::open(&path).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(error.contains("schema version 99, this program knows 5"), "{error}");
}
