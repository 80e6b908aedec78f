//! Firecracker itself, where `FIRECRACKER_BIN` names one and KVM runs guests. Against a model of its API it is tested everywhere
//! (`host-shim/tests/firecracker.rs`).

use std::process::Command;

use e2e::{Channel, TestSandbox, binary, made};
use serde_json::Value;

/// Why Firecracker cannot be tried on this host.
fn obstacle() -> Option<String> {
    if std::env::var_os("FIRECRACKER_BIN").is_none() {
        return Some("$FIRECRACKER_BIN names no Firecracker".to_owned());
    }
    let doctor = Command::new(binary("host-shim"))
        .args(["doctor", "--json"])
        .env("TIFFIN_DATA_DIR", made("TIFFIN_E2E_DATA"))
        .output()
        .expect("host-shim starts");
    let report: Value = serde_json::from_slice(&doctor.stdout).expect("its report is JSON");
    let checks = report["checks"].as_array().expect("it has checks");
    let check = checks.iter().find(|check| check["name"] == "firecracker").expect("one is of Firecracker");
    (check["status"] != "ok").then(|| check["found"].to_string())
}

#[tokio::test]
async fn a_sandbox_boots_goes_on_and_is_forked() {
    if let Some(why) = obstacle() {
        eprintln!("SKIPPED: {why}");
        return;
    }
    let sandbox = TestSandbox::of(Channel::Serial)
        .set("vmm", "firecracker")
        .set("channel", "auto")
        .set("hostname", "lunchbox")
        .start()
        .await;
    assert_eq!(sandbox.state()["channel"], "hybrid-vsock");
    assert_eq!(sandbox.stdout("hostname; echo kept > /tmp/note; sync").await, "lunchbox\n");

    // The source of a fork goes on, and its fork goes on from it.
    let fork = sandbox.fork().await;
    assert_eq!(sandbox.stdout("cat /tmp/note").await, "kept\n");
    let child = fork.child().start().await;
    assert_eq!(child.stdout("cat /tmp/note; echo child > /tmp/note").await, "kept\n");
    assert_eq!(sandbox.stdout("cat /tmp/note").await, "kept\n", "each has a disk of its own");
    let random = "od -An -N8 -tx8 /dev/urandom";
    assert_ne!(sandbox.stdout(random).await, child.stdout(random).await);

    // Once from a booted machine, once from a restored one.
    let sandbox = sandbox.pause().await.resume().await;
    let sandbox = sandbox.pause().await.resume().await;
    assert_eq!(sandbox.state()["start"], "resumed");
    assert_eq!(sandbox.stdout("cat /tmp/note").await, "kept\n");
    for sandbox in [sandbox, child] {
        let (status, said) = sandbox.stop().await;
        assert!(status.success(), "{said}");
    }
}
