//! From the wish to a sandbox, and to the template's end.

use serde_json::{Value, json};

use crate::host::{Host, until};

#[test]
fn a_build_becomes_a_template_that_starts_by_its_name() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let begun = gateway
        .call(
            "POST /v3/templates",
            json!({ "name": "My-Box:v1", "tags": ["v2"], "cpuCount": 3, "memoryMB": 256 }),
        )
        .is(202);
    assert_eq!(
        (&begun["tags"], &begun["names"], &begun["public"]),
        (&json!(["v1", "v2"]), &json!(["my-box"]), &json!(false))
    );
    let build =
        gateway.request(json!({ "name": "box", "cpuCount": 3, "memoryMB": 256, "minFreeDiskMb": 5000 }));
    let waiting = gateway.status(&build);
    assert_eq!((&waiting["status"], &waiting["logEntries"]), (&json!("waiting"), &json!([])));
    gateway.get("/templates/aliases/box").refuses(404, "box");
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).refuses(404, "box");

    let steps = json!({ "fromImage": "debian:bookworm", "force": true, "startCmd": "serve", "readyCmd": "true",
        "steps": [{ "type": "RUN", "args": ["flood 250", ""], "force": false }, { "type": "USER", "args": ["user"] }] });
    gateway.start(&build, steps.clone()).is(202);
    gateway.start(&build, steps).refuses(409, "was begun already");
    gateway.until(&build, "ready");

    // The log, by pages: none is cut short, and the last one is empty.
    let page = |query: &str| {
        let status = gateway.get(&format!("{}/status?{query}", build.path())).is(200);
        let entries = status["logEntries"].as_array().unwrap().clone();
        entries.iter().map(|entry| entry["message"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let mut all = Vec::new();
    loop {
        let next = page(&format!("logsOffset={}", all.len()));
        assert!(next.len() <= 100);
        if next.is_empty() {
            break;
        }
        all.extend(next);
    }
    assert_eq!(all.iter().filter(|line| line.starts_with("line ")).count(), 250, "{all:?}");
    assert_eq!(all.last().unwrap(), "the template is ready");
    assert_eq!(page("logsOffset=1&limit=2"), all[1..3]);
    assert!(page("level=warn").is_empty());
    gateway.get(&format!("{}/status?limit=101", build.path())).refuses(400, "limit");
    gateway.get(&format!("{}/status?level=loud", build.path())).refuses(400, "level");

    // What the builder was told: nothing but a virtual machine runs a team's steps.
    let calls = host.calls();
    let words = |index: usize, words: &[&str]| {
        for word in words {
            assert!(calls[index].contains(word), "{word} is not in {}", calls[index]);
        }
    };
    words(0, &["build --steps", "--e2b-user", "--isolation vm", "--authfile"]);
    words(1, &["--isolation vm", "--jobs 1", "--no-cache", "--template-image base=build.tiffin.invalid/"]);
    words(2, &["template create", &build.folder(), "--cpus 3", "--memory 256", "--disk 5000"]);

    let made = gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).is(201);
    assert_eq!((&made["templateID"], &made["alias"]), (&json!(build.template), &json!("box")));
    for name in ["box:default", "default/box", build.template.as_str()] {
        gateway.call("POST /v2/sandboxes", json!({ "templateID": name })).is(201);
    }
    assert_eq!(
        gateway.get("/templates/aliases/box").is(200),
        json!({ "templateID": build.template, "public": false })
    );
    let list = gateway.get("/templates").is(200);
    let shown = list
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["templateID"] == json!(build.template))
        .unwrap()
        .clone();
    assert_eq!(
        (&shown["aliases"], &shown["buildStatus"], &shown["spawnCount"]),
        (&json!(["box"]), &json!("ready"), &json!(4))
    );
    assert_eq!((&shown["cpuCount"], &shown["buildID"]), (&json!(3), &json!(build.build)));
    // Nothing of the request is kept, and the folder has no other name.
    assert_eq!(host.names(&format!("builds/{}", build.folder())), ["log"]);
    gateway.call("POST /v2/sandboxes", json!({ "templateID": build.folder() })).refuses(404, "not found");
    gateway.stop();
}

#[test]
fn tags_name_builds_and_what_has_none_goes() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let tags = |name: &str| -> Vec<(String, String)> {
        let tags = gateway.get(&format!("/templates/{name}/tags")).is(200);
        let text = |tag: &Value, field: &str| tag[field].as_str().unwrap().to_owned();
        tags.as_array().unwrap().iter().map(|tag| (text(tag, "tag"), text(tag, "buildID"))).collect()
    };
    let of = |tag: &str, build: &str| (tag.to_owned(), build.to_owned());
    let first = gateway.build("box");
    assert_eq!(tags("box"), [of("default", &first.build)]);
    let assigned =
        gateway.call("POST /templates/tags", json!({ "target": "box", "tags": ["v1", "stable"] })).is(201);
    assert_eq!(assigned, json!({ "buildID": first.build, "tags": ["v1", "stable"] }));
    let second = gateway.build("box");
    assert_eq!(second.template, first.template);
    assert_eq!(
        tags(&first.template),
        [of("default", &second.build), of("stable", &first.build), of("v1", &first.build)]
    );
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box:v1" })).is(201);
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box:v9" })).refuses(404, "not found");
    // A failed build takes no tag away.
    let failed = gateway.begin("box", &["fail"]);
    gateway.until(&failed, "error");
    assert_eq!(tags("box")[0], of("default", &second.build));

    gateway
        .call("DELETE /templates/tags", json!({ "name": "box", "tags": ["default"] }))
        .refuses(400, "cannot be taken away");
    gateway
        .call("DELETE /templates/tags", json!({ "name": "box", "tags": ["v7"] }))
        .refuses(404, "none of these tags");
    gateway.call("DELETE /templates/tags", json!({ "name": "box", "tags": [] })).refuses(400, "at least one");
    gateway.call("POST /templates/tags", json!({ "target": "box:v9", "tags": ["a"] })).refuses(404, "box:v9");
    gateway
        .call("POST /templates/tags", json!({ "target": "box", "tags": ["a/b"] }))
        .refuses(400, "invalid tag");
    gateway
        .call("DELETE /templates/tags", json!({ "name": "box", "tags": ["v1", "stable", "none"] }))
        .is(204);
    assert_eq!(tags("box"), [of("default", &second.build)]);
    // The sandbox still has the first build's template.
    let third = gateway.build("box");
    until("the second build's template goes", || {
        (!host.names("templates").contains(&second.folder())).then_some(())
    });
    assert!(
        host.names("templates").contains(&first.folder())
            && host.names("templates").contains(&third.folder())
    );
    assert_eq!(gateway.status(&second)["status"], "ready", "what was told stays true");
    gateway.stop();
}

#[test]
fn a_deleted_template_is_gone_for_good() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let build = gateway.build("box");
    let made = gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).is(201);
    host.hang_at("steps");
    let running = gateway.begin("box", &["true"]);
    host.at_stage();
    gateway.theirs("DELETE /templates/box", Value::Null).refuses(404, "box");
    gateway.theirs(&format!("DELETE /templates/{}", build.template), Value::Null).is(404);
    gateway.call("DELETE /templates/box", Value::Null).is(204);
    assert_eq!(host.processes(), [0; 0], "what was being built is ended");
    gateway.call("DELETE /templates/box", Value::Null).refuses(404, "box");
    gateway.get(&format!("{}/status", running.path())).refuses(404, "Build");
    gateway.get("/templates/box/tags").refuses(404, "box");
    gateway.call("POST /v2/sandboxes", json!({ "templateID": "box" })).refuses(404, "not found");
    assert_eq!(host.names("templates"), [build.folder()], "a sandbox has it");
    gateway.call(&format!("DELETE /sandboxes/{}", made["sandboxID"].as_str().unwrap()), Value::Null).is(204);
    gateway.stop();
    host.go_on();
    let mut gateway = host.serve(&[]);
    assert_eq!(
        (host.names("templates"), host.names("builds"), host.names("images")),
        (vec![], vec![], vec![])
    );
    let again = gateway.build("box");
    assert_ne!(again.template, build.template);
    gateway.stop();
}

#[test]
fn a_build_on_a_template_begins_with_its_image_and_user() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    let parent = gateway.build("parent");
    let child = gateway.request(json!({ "alias": "child" }));
    gateway.start(&child, json!({ "fromTemplate": "parent:default", "steps": [] })).is(202);
    gateway.until(&child, "ready");
    let base = std::fs::read_to_string(host.path("calls")).unwrap();
    assert!(
        base.contains(&format!("base=build.tiffin.invalid/{}:{}-base", child.template, child.build)),
        "{base}"
    );
    let other = gateway.request(json!({ "name": "other" }));
    for name in ["none", "parent:v1", "theirs/parent", "../x", parent.folder().as_str()] {
        gateway.start(&other, json!({ "fromTemplate": name })).refuses(400, "is not there, or not yours");
    }
    let v2 = gateway
        .call("POST /v2/templates", json!({ "alias": "older", "cpuCount": 1, "memoryMB": 512 }))
        .is(202);
    assert_eq!((&v2["aliases"], &v2["buildStatus"]), (&json!(["older"]), &json!("waiting")));
    gateway.stop();
}
