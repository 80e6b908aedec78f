//! Turns, limits and ends.

use serde_json::{Value, json};

use crate::host::{Host, until};

#[test]
fn a_team_builds_as_much_as_it_may_and_the_rest_waits() {
    let host = Host::new();
    let limits =
        host.command(&["teams", "builds", "theirs", "--at-once", "1", "--queued", "3", "--templates", "2"]);
    assert!(limits.contains(r#""at_once":1"#) && limits.contains(r#""minutes":60"#), "{limits}");
    let mut gateway = host.serve(&["--max-builds", "2"]);
    host.hang_at("steps");
    let begin = |name: &str| {
        let begun = gateway.theirs("POST /v3/templates", json!({ "name": name })).is(202);
        let text = |field: &str| begun[field].as_str().unwrap().to_owned();
        let path = format!("/templates/{}/builds/{}", text("templateID"), text("buildID"));
        gateway.theirs(&format!("POST /v2{path}"), json!({ "fromImage": "debian", "steps": [] })).is(202);
        path
    };
    let status =
        |path: &str| gateway.theirs(&format!("GET {path}/status"), Value::Null).is(200)["status"].clone();
    let (first, second, third) = (begin("a"), begin("a"), begin("b"));
    host.at_stage();
    gateway.theirs("POST /v3/templates", json!({ "name": "a" })).refuses(429, "3 builds that have not ended");
    // Another team's turn does not wait for theirs.
    let ours = gateway.begin("mine", &["true"]);
    host.at_stage();
    assert_eq!([status(&first), status(&second), status(&third)], ["building", "waiting", "waiting"]);
    assert_eq!(gateway.status(&ours)["status"], "building");

    // One that waits is taken out, one that runs is ended, and the next has its turn.
    gateway.theirs(&format!("DELETE {second}"), Value::Null).is(204);
    assert_eq!(status(&second), "error");
    gateway.theirs(&format!("DELETE {first}"), Value::Null).is(204);
    assert_eq!(status(&first), "error");
    host.at_stage();
    assert_eq!(status(&third), "building");
    gateway.theirs("POST /v3/templates", json!({ "name": "c" })).refuses(429, "2 templates");
    gateway.call(&format!("DELETE {}", ours.path()), Value::Null).is(204);
    let reason = gateway.until(&ours, "error")["reason"]["message"].clone();
    assert_eq!(reason, "the build was cancelled");
    gateway.call(&format!("DELETE {}", ours.path()), Value::Null).is(204);
    gateway.theirs(&format!("DELETE {third}"), Value::Null).is(204);
    assert_eq!(host.processes(), [0; 0]);
    gateway.stop();
}

#[test]
fn a_builder_that_does_not_listen_is_killed_with_all_that_it_started() {
    let host = Host::new();
    let mut gateway = host.serve(&["--build-grace", "1"]);
    let build = gateway.begin("box", &["deaf"]);
    host.at_stage();
    assert!(!host.processes().is_empty());
    gateway.call(&format!("DELETE {}", build.path()), Value::Null).is(204);
    assert_eq!(host.processes(), [0; 0]);
    gateway.until(&build, "error");
    gateway.stop();
}

#[test]
fn a_build_that_takes_too_long_is_ended() {
    let host = Host::new();
    host.command(&["teams", "builds", "theirs", "--minutes", "0"]);
    let mut gateway = host.serve(&[]);
    host.hang_at("base");
    let begun = gateway.theirs("POST /v3/templates", json!({ "name": "a" })).is(202);
    let path = format!(
        "/templates/{}/builds/{}",
        begun["templateID"].as_str().unwrap(),
        begun["buildID"].as_str().unwrap()
    );
    gateway.theirs(&format!("POST /v2{path}"), json!({ "fromImage": "debian" })).is(202);
    let status = until("it is ended", || {
        let status = gateway.theirs(&format!("GET {path}/status"), Value::Null).is(200);
        (status["status"] == "error").then_some(status)
    });
    assert!(status["reason"]["message"].as_str().unwrap().contains("took longer than 0 minutes"), "{status}");
    until("nothing runs", || host.processes().is_empty().then_some(()));
    gateway.stop();
}

#[test]
fn containers_and_networks_are_the_operators_word() {
    let host = Host::new();
    let mut gateway = host.serve(&["--build-isolation", "container", "--build-offline"]);
    gateway.build("box");
    let calls = host.calls();
    assert!(
        calls[0].contains("--isolation container") && calls[1].contains("--isolation container"),
        "{calls:?}"
    );
    assert!(calls[1].contains("--network none"), "{calls:?}");
    gateway.stop();
}
