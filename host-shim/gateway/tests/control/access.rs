//! Who reaches what: every route of the document, with no key, a wrong one, and another team's.

use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::document::operations;
use crate::gateway::TestGateway;

/// The same route with a sandbox's id in it.
fn target(path: &str, id: &str) -> String {
    let parts = path.split('/').map(|part| match part {
        "{sandboxID}" => id,
        part if part.starts_with('{') => "base",
        part => part,
    });
    parts.collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn every_route_but_four_needs_a_key_that_exists() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    let wrong_keys: [(&str, &str); 6] = [
        ("x-api-key", "e2b_0000000000000000000000000000000000000000"),
        ("x-api-key", ""),
        ("x-api-key", "' OR 1=1 --"),
        ("authorization", "Bearer e2b_wrong"),
        ("authorization", "Basic dXNlcjo="),
        ("x-other", "nothing"),
    ];
    for (method, path, keyed) in operations() {
        for (name, value) in wrong_keys {
            let request = Request::builder()
                .method(&method)
                .uri(target(&path, &id))
                .header(name, value)
                .body(Full::default());
            let answer = gateway.send(request.unwrap()).await;
            if path.starts_with("/uploads/") {
                // Its address is signed in place of a key.
                answer.refuses(400, "expires");
                continue;
            }
            if !keyed {
                assert!(answer.status.is_success(), "{method} {path}: {answer:?}");
                continue;
            }
            let words = match name {
                "x-api-key" => "Cannot get the team for the given API key",
                _ if value.starts_with("Bearer") => "Cannot get the team for the given API key",
                _ => "authorization header is missing",
            };
            answer.refuses(401, words);
        }
    }
    let long = "k".repeat(10_000);
    let request = Request::get("/sandboxes").header("x-api-key", long).body(Full::default()).unwrap();
    gateway.send(request).await.refuses(401, "Cannot get the team");
    let request = Request::get("/sandboxes").header("x-api-key", &b"\xff"[..]).body(Full::default()).unwrap();
    gateway.send(request).await.refuses(401, "Cannot get the team");
    assert_eq!(gateway.get(&format!("/sandboxes/{id}")).await.is(200).json()["state"], "running");
}

#[tokio::test]
async fn another_teams_sandbox_is_as_if_it_were_not_there() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    let missing: String = id.chars().rev().collect();
    let bodies = [("timeout", json!({ "timeout": 1 })), ("refreshes", json!({ "duration": 1 }))];
    for (method, path, _) in operations().into_iter().filter(|(_, path, _)| path.contains("{sandboxID}")) {
        let body =
            bodies.iter().find(|(end, _)| path.ends_with(end)).map_or(json!({}), |(_, body)| body.clone());
        let body = if method == Method::GET { Value::Null } else { body };
        let call = async |id: &str| {
            gateway.call(&gateway.theirs, method.clone(), &target(&path, id), body.clone()).await
        };
        let (foreign, absent) = (call(&id).await, call(&missing).await);
        assert_eq!(foreign.text.replace(&id, &missing), absent.text, "{method} {path}");
        assert_eq!(foreign.status, absent.status, "{method} {path}");
        match foreign.status.as_u16() {
            501 => {}
            _ => foreign
                .refuses(404, &format!("Sandbox \"{id}\" doesn't exist or you don't have access to it")),
        }
    }
    let theirs = |target: &'static str| gateway.call(&gateway.theirs, Method::GET, target, Value::Null);
    for target in ["/sandboxes", "/v2/sandboxes", "/v2/sandboxes?state=running,paused&limit=100"] {
        assert_eq!(theirs(target).await.is(200).json(), json!([]), "{target}");
    }
    let target = format!("/sandboxes/metrics?sandbox_ids={id}");
    let metrics = gateway.call(&gateway.theirs, Method::GET, &target, Value::Null).await;
    assert_eq!(metrics.is(200).json(), json!({ "sandboxes": {} }));
    let templates = theirs("/templates").await.is(200).json();
    assert_eq!(templates[0]["spawnCount"], 0, "what others run is not theirs to know");
    assert_eq!(theirs("/teams").await.is(200).json()[0]["name"], "theirs");
    // Nothing of that has changed it.
    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    assert_eq!(info["sandboxID"], id.as_str());
}

#[tokio::test]
async fn a_revoked_key_is_refused_at_once_and_old_clients_send_it_as_bearer() {
    let gateway = TestGateway::start().await;
    let bearer = || {
        let bearer = format!("Bearer {}", gateway.ours.as_str());
        Request::get("/teams").header("authorization", bearer).body(Full::default()).unwrap()
    };
    let teams = gateway.send(bearer()).await.is(200).json();
    assert_eq!(teams[0]["apiKey"], gateway.ours.as_str());
    let key = gateway.gateway.store.keys().await.unwrap().into_iter().find(|key| key.name == "ours").unwrap();
    assert!(gateway.gateway.store.revoke_key(key.id).await.unwrap());
    gateway.send(bearer()).await.refuses(401, "Cannot get the team");
}
