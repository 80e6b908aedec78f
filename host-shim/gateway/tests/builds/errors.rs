//! Errors that point at their step, requests that make no sense, and what is another team's.

use serde_json::{Value, json};

use crate::host::{Build, Host, until};

#[test]
fn an_error_points_at_its_step() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let failed = gateway.begin("box", &["true", "fail", "true"]);
    let status = gateway.until(&failed, "error");
    let reason = &status["reason"];
    assert_eq!(
        (&reason["step"], &reason["message"]),
        (&json!("2"), &json!("step 2: the command exited with code 3\n    RUN fail"))
    );
    let entries = reason["logEntries"].as_array().unwrap();
    let (before, last) = (&entries[entries.len() - 2], &entries[entries.len() - 1]);
    assert_eq!((&before["message"], &before["level"]), (&json!("no such luck"), &json!("info")));
    assert_eq!((&last["level"], &last["step"]), (&json!("error"), &json!("2")));
    assert!(
        !status.to_string().contains(&*host.path("data").to_string_lossy()),
        "no folder of the machine: {status}"
    );

    let build = gateway.request(json!({ "name": "box" }));
    gateway.start(&build, json!({ "fromImage": "no-such-image" })).is(202);
    assert_eq!(gateway.until(&build, "error")["reason"]["step"], "base");

    let crashed = gateway.begin("box", &["crash"]);
    let reason = gateway.until(&crashed, "error")["reason"].clone();
    assert!(reason["message"].as_str().unwrap().contains("ended by signal 9"), "{reason}");
    until("nothing is left of what failed", || {
        (host.names("templates").is_empty() && host.names("images").is_empty()).then_some(())
    });
    gateway.stop();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    for (body, words) in [
        (json!({}), "expected a name"),
        (json!({ "name": "a b" }), "invalid template name"),
        (json!({ "name": "theirs/a" }), "invalid template name"),
        (json!({ "name": "a", "tags": ["-"] }), "invalid tag"),
        (json!({ "name": "a", "cpuCount": 0 }), "invalid cpuCount 0"),
        (json!({ "name": "a", "memoryMB": 1 }), "invalid memoryMB 1"),
        (json!({ "name": "a", "minFreeDiskMb": 1_000_000 }), "invalid minFreeDiskMb"),
    ] {
        gateway.call("POST /v3/templates", body).refuses(400, words);
    }
    let build = gateway.request(json!({ "name": "a" }));
    gateway.start(&build, json!({ "fromImage": "oci:/etc" })).refuses(400, "invalid fromImage");
    gateway.start(&build, json!({ "fromImage": "a", "steps": [{}] })).refuses(400, "type");
    let hash = "0".repeat(64);
    let copy =
        json!({ "fromImage": "a", "steps": [{ "type": "COPY", "args": ["a", "b"], "filesHash": hash }] });
    gateway.start(&build, copy).refuses(400, "step 1: the files");
    assert_eq!(gateway.status(&build)["status"], "waiting", "it can be started still");
    for path in ["/templates", "/templates/x", "/templates/x/builds/y"] {
        gateway.call(&format!("POST {path}"), json!({})).refuses(501, "use Template.build of the SDKs");
    }
    gateway.stop();
}

#[test]
fn what_is_another_teams_is_not_there() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let ours = gateway.build("box");
    let waiting = gateway.request(json!({ "name": "box" }));
    let hash = "0".repeat(64);
    for request in [
        format!("GET {}/status", ours.path()),
        format!("DELETE {}", waiting.path()),
        format!("GET /templates/{}/files/{hash}", ours.template),
        format!("GET /templates/{}/tags", ours.template),
        "GET /templates/box/tags".to_owned(),
        "GET /templates/aliases/box".to_owned(),
        format!("DELETE /templates/{}", ours.template),
    ] {
        gateway.theirs(&request, Value::Null).is(404);
    }
    gateway.theirs(&format!("POST /v2{}", waiting.path()), json!({ "fromImage": "a" })).is(404);
    gateway.theirs("POST /templates/tags", json!({ "target": "box", "tags": ["a"] })).is(404);
    gateway.theirs("DELETE /templates/tags", json!({ "name": "box", "tags": ["a"] })).is(404);
    for name in ["box", "default/box", &ours.template, &ours.folder()] {
        gateway.theirs("POST /v2/sandboxes", json!({ "templateID": name })).is(404);
    }
    assert_eq!(gateway.theirs("GET /templates", Value::Null).is(200), json!([]));
    // A name is each team's own.
    let theirs = gateway.theirs("POST /v3/templates", json!({ "name": "box" })).is(202);
    assert_ne!(theirs["templateID"], json!(ours.template));
    // And a build belongs to one template.
    let other = gateway.request(json!({ "name": "other" }));
    let mixed = Build { template: other.template, build: ours.build.clone() };
    gateway.get(&format!("{}/status", mixed.path())).refuses(404, "Build");
    for bad in ["/templates/x/builds/y/status", "/templates/..%2Fx/builds/%00/status"] {
        gateway.get(bad).is(404);
    }
    assert_eq!(gateway.status(&ours)["status"], "ready");
    gateway.stop();
}
