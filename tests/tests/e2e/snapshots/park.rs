//! Parked sandboxes: nobody's until a Configure, and then as if they had been made for somebody.

use std::time::Instant;

use e2e::{Channel, TestData, TestSandbox};
use sandbox_folder::client::Code;
use serde_json::{Value, json};

/// What somebody wants.
fn owner() -> Value {
    json!({
        "id": "n1aowner",
        "hostname": "owners",
        "env": { "TENANT": "owner", "GREETING": "mine" },
        "user": "user",
        "workdir": "/tmp",
        "access_token": "secret",
        "labels": { "of": "owner" },
        "timeout_s": 3600,
    })
}

/// Nothing of it is anybody's.
async fn assert_parked(sandbox: &TestSandbox) {
    let state = sandbox.state();
    assert_eq!((&state["phase"], &sandbox.ready()["phase"]), (&json!("parked"), &json!("parked")));
    let client = sandbox.client();
    client.health().await.unwrap();
    for (call, refused) in [
        ("List", client.processes().await.map(drop)),
        ("Start", client.output("/bin/true", [""; 0]).await.map(drop)),
        ("Stat", client.stat("/").await.map(drop)),
        ("/files", client.write_file("/root/x", "x").await.map(drop)),
    ] {
        let refused = refused.expect_err("a refusal");
        assert_eq!(refused.code(), Some(Code::Unavailable), "{call}: {refused}");
    }
    assert!(client.connect_port(8080).await.is_err());
    let path = json!({ "path": sandbox.dir().join("nowhere") });
    for (call, body) in [("POST /pause", Value::Null), ("POST /fork", path.clone()), ("POST /snapshot", path)]
    {
        let refusal = sandbox.call(call, body).await.refusal(409);
        assert!(refusal.contains("Parked"), "{call}: {refusal}");
    }
    assert_eq!(sandbox.state()["phase"], "parked");
}

/// It is the owner's, in everything.
async fn assert_owned(sandbox: &TestSandbox, expected_id: &str) {
    let said = sandbox.stdout("echo $TENANT $GREETING $LEFT; id -un; pwd; hostname; cat /etc/hostname").await;
    assert_eq!(said, "owner mine over\nuser\n/tmp\nowners\nowners\n");
    let nobody = sandbox_folder::client::SandboxClient::unix(sandbox.dir().join("vsock.sock"));
    assert_eq!(nobody.processes().await.unwrap_err().code(), Some(Code::Unauthenticated));
    let state = sandbox.state();
    assert_eq!((&state["phase"], &state["id"]), (&json!("running"), &json!(expected_id)));
    assert_eq!(state["labels"], json!({ "of": "owner", "pool": "a" }));
}

#[tokio::test]
async fn a_parked_sandbox_becomes_somebodys_and_is_nobodys_before() {
    let data = TestData::warmed("e2e");
    let parked = || {
        let builder = TestSandbox::clone_of(&data, "e2e").set("labels", json!({ "pool": "a" }));
        builder.set("env", json!({ "TENANT": "nobody", "LEFT": "over" })).parked()
    };
    let mut sandbox = parked().start().await;
    println!("parked: {}", sandbox.ready());
    assert_parked(&sandbox).await;
    // What makes no sense is refused, and costs nothing.
    for (bad, says) in [
        (json!({ "hostname": "a_b" }), "hostname"),
        (json!({ "id": "UPPER" }), "id"),
        (json!({ "workdir": "tmp" }), "workdir"),
        (json!({ "env": { "a=b": "" } }), "env"),
        (json!({ "novel": 1 }), "novel"),
    ] {
        let refusal = sandbox.call("POST /configure", bad).await.refusal(400);
        assert!(refusal.contains(says), "{refusal}");
    }
    assert_parked(&sandbox).await;

    let began = Instant::now();
    let state = sandbox.configure(owner()).await;
    let configured = began.elapsed();
    let first = sandbox.sh("true").await;
    println!("configure: {configured:?}, with the first exec: {:?}", began.elapsed());
    assert_eq!((first.exit.code(), &state["id"]), (0, &json!("n1aowner")));
    assert_owned(&sandbox, "n1aowner").await;
    let refusal = sandbox.call("POST /configure", owner()).await.refusal(409);
    assert!(refusal.contains("only a parked sandbox can be configured, this one is Running"), "{refusal}");
    assert_owned(&sandbox, "n1aowner").await;
    // What it has become outlives its shim.
    let sandbox = sandbox.pause().await.resume().await;
    assert_owned(&sandbox, "n1aowner").await;
    sandbox.stop().await;

    // One that nobody wanted.
    let unwanted = parked().start().await;
    let (status, said) = unwanted.stop().await;
    assert!(status.success(), "{said}");
    // Machine ids are not the snapshot's, nor each other's.
    let (mut one, mut two) = (parked().start().await, parked().start().await);
    one.configure(json!({})).await;
    two.configure(json!({})).await;
    let look = "cat /etc/machine-id /proc/sys/kernel/random/boot_id";
    assert_ne!(one.stdout(look).await, two.stdout(look).await);
    assert_eq!(one.stdout("hostname").await.trim(), one.state()["id"]);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_parked_sandbox_without_a_snapshot_has_booted_and_waits() {
    let builder = TestSandbox::of(Channel::Serial).set("labels", json!({ "pool": "a" }));
    let mut sandbox = builder.set("env", json!({ "LEFT": "over" })).parked().start().await;
    assert_eq!(sandbox.state()["start"], "booted");
    assert_parked(&sandbox).await;
    sandbox.configure(owner()).await;
    assert_owned(&sandbox, "n1aowner").await;
    sandbox.stop().await;
}

#[tokio::test]
async fn a_sandbox_whose_time_is_over_is_stopped() {
    let data = TestData::warmed("e2e");
    let sandbox = TestSandbox::clone_of(&data, "e2e").set("timeout_s", 1).start().await;
    let dir = sandbox.dir();
    let look = || {
        let state: Value = serde_json::from_slice(&std::fs::read(dir.join("state.json")).unwrap()).unwrap();
        assert_eq!((&state["phase"], &state["end"]["reason"]), (&json!("ended"), &json!("stopped")));
    };
    let (status, said) = sandbox.ended_keeping(look).await;
    assert!(status.success(), "{said}");

    // The time of a parked one begins when it is somebody's.
    let mut sandbox = TestSandbox::clone_of(&data, "e2e").set("timeout_s", 1).parked().start().await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(sandbox.state()["phase"], "parked");
    sandbox.configure(json!({ "timeout_s": 2 })).await;
    let (status, said) = sandbox.ended().await;
    assert!(status.success(), "{said}");
}
