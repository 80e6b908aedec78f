//! A registry for finished builds: pushed to, fetched from, and dead.

use std::fs;

use serde_json::json;

use crate::host::{Host, until};

const REGISTRY: [&str; 2] = ["--registry", "http://127.0.0.1:1/boxes"];

#[test]
fn a_template_that_is_missing_comes_from_the_registry() {
    let host = Host::new();
    let mut gateway = host.serve(&REGISTRY);
    let build = gateway.build("box");
    let push = host.calls().into_iter().find(|call| call.starts_with("template push")).unwrap();
    let place = format!("/{}:{}", build.template, build.build);
    assert!(push.contains("docker://127.0.0.1:1/boxes/") && push.contains(&place), "{push}");
    let folder = host.path("data/templates").join(build.folder());
    fs::remove_dir_all(&folder).unwrap();

    fs::write(host.path("registry-is-dead"), "").unwrap();
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).refuses(503, "connection refused");
    fs::remove_file(host.path("registry-is-dead")).unwrap();
    // Twenty at once fetch it once.
    std::thread::scope(|threads| {
        let gateway = &gateway;
        for _ in 0..5 {
            threads.spawn(move || gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).is(201));
        }
    });
    let pulls: Vec<_> = host.calls().into_iter().filter(|call| call.starts_with("template pull")).collect();
    assert_eq!(pulls.len(), 2, "{pulls:?}");
    assert!(pulls[1].contains("@sha256:"), "by its digest: {pulls:?}");
    assert!(folder.exists());
    gateway.stop();

    // Without a registry it is told.
    fs::remove_dir_all(&folder).unwrap();
    let mut gateway = host.serve(&[]);
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).refuses(503, "build it again");
    gateway.stop();
}

#[test]
fn a_registry_that_is_dead_fails_the_build_and_keeps_the_names() {
    let host = Host::new();
    let mut gateway = host.serve(&REGISTRY);
    let first = gateway.build("box");
    fs::write(host.path("registry-is-dead"), "").unwrap();
    let second = gateway.begin("box", &["true"]);
    let reason = gateway.until(&second, "error")["reason"].clone();
    assert_eq!(reason["step"], "finalize");
    assert!(reason["message"].as_str().unwrap().contains("connection refused"), "{reason}");
    let tags = gateway.get("/templates/box/tags").is(200);
    assert_eq!(tags[0]["buildID"], json!(first.build));
    until("what failed is removed", || (host.names("templates") == [first.folder()]).then_some(()));
    gateway.stop();
}
