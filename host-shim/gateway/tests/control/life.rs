//! A sandbox's life through the API: created, connected to, its end moved, ended.

use http::{Method, Request, header};
use http_body_util::Full;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tiffin_gateway::config::Capacity;

use crate::gateway::TestGateway;

/// The end as the API tells it.
async fn end(gateway: &TestGateway, id: &str) -> Timestamp {
    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    info["endAt"].as_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn what_the_published_sdks_send_and_get() {
    let gateway = TestGateway::start().await;
    // Python 2.63.0 sends these when nothing is chosen; JavaScript 2.51.0 leaves the empty ones out.
    let body = json!({ "templateID": "base", "metadata": {}, "envVars": {}, "timeout": 300 });
    let created = gateway.post("/v2/sandboxes", body).await.is(201).json();
    let id = created["sandboxID"].as_str().unwrap().to_owned();
    assert!(id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()), "{id}");
    assert_eq!((&created["templateID"], &created["alias"]), (&json!("base"), &json!("base")));
    assert_eq!((&created["clientID"], &created["envdVersion"]), (&json!("6532622b"), &json!("0.6.4")));
    assert_eq!((&created["domain"], &created["trafficAccessToken"]), (&json!("sandbox.test"), &Value::Null));
    assert_eq!(created["envdAccessToken"].as_str().unwrap().len(), 64);

    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    assert_eq!(
        (&info["cpuCount"], &info["memoryMB"], &info["diskSizeMB"]),
        (&json!(2), &json!(256), &json!(16))
    );
    assert_eq!((&info["state"], &info["envdAccessToken"]), (&json!("running"), &created["envdAccessToken"]));
    assert_eq!(info["lifecycle"], json!({ "autoResume": false, "onTimeout": "kill" }));
    assert_eq!(
        (&info["allowInternetAccess"], &info["network"]),
        (&json!(false), &json!({ "allowPublicTraffic": true }))
    );
    let time = |name: &str| info[name].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(time("startedAt") + SignedDuration::from_secs(300), time("endAt"));

    // 1.x clients call a sandbox `<id>-<client id>`.
    gateway.get(&format!("/sandboxes/{id}-6532622b")).await.is(200);
    gateway.delete(&format!("/sandboxes/{id}-6532622b")).await.is(204);
    gateway
        .get(&format!("/sandboxes/{id}"))
        .await
        .refuses(404, "doesn't exist or you don't have access to it");
    gateway.delete(&format!("/sandboxes/{id}")).await.refuses(404, "doesn't exist");
    assert!(!gateway.folder(&id).exists());
}

#[tokio::test]
async fn defaults_of_the_older_route_are_its_own() {
    let gateway = TestGateway::start().await;
    let created = gateway.post("/sandboxes", json!({ "templateID": "base" })).await.is(201).json();
    assert_eq!(created.get("envdAccessToken"), None);
    let id = created["sandboxID"].as_str().unwrap();
    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    let time = |name: &str| info[name].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(time("startedAt") + SignedDuration::from_secs(15), time("endAt"));
    // What older clients say by default is no wish for anything that is not served.
    let defaults = json!({ "templateID": "base:default", "secure": true, "autoPause": false, "timeout": 60,
        "allow_internet_access": true, "autoResume": { "enabled": false }, "network": {}, "mcp": null, "novel": 1 });
    let created = gateway.post("/sandboxes", defaults).await.is(201).json();
    assert!(created["envdAccessToken"].is_string());
    let private =
        json!({ "templateID": "base", "network": { "allowPublicTraffic": false }, "secure": false });
    let created = gateway.post("/v2/sandboxes", private).await.is(201).json();
    assert!(created["trafficAccessToken"].is_string() && created["envdAccessToken"].is_string());
}

#[tokio::test]
async fn only_set_timeout_brings_an_end_nearer() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({ "timeout": 1000 })).await;
    let first = end(&gateway, &id).await;
    for (route, body) in [
        ("/v2/sandboxes/{}/connect", json!({ "timeout": 10 })),
        ("/v2/sandboxes/{}/connect", Value::Null),
        ("/v2/sandboxes/{}/connect", json!({})),
        ("/v2/sandboxes/{}/connect", json!({ "timeout": 5, "memory": true })),
        ("/sandboxes/{}/connect", json!({ "timeout": 10 })),
    ] {
        let connected = gateway.post(&route.replace("{}", &id), body).await.is(200).json();
        assert_eq!(connected["sandboxID"], id.as_str());
        assert!(connected["envdAccessToken"].is_string());
        assert_eq!(end(&gateway, &id).await, first, "{route}");
    }
    for body in [json!({ "duration": 0 }), json!({}), Value::Null] {
        gateway.post(&format!("/sandboxes/{id}/refreshes"), body).await.is(204);
        assert_eq!(end(&gateway, &id).await, first);
    }
    let connect = format!("/v2/sandboxes/{id}/connect");
    gateway.post(&connect, json!({ "timeout": 5000 })).await.is(200);
    let later = end(&gateway, &id).await;
    assert!(later >= first + SignedDuration::from_secs(3000));
    // Two at once: the longer one wins, whichever comes first.
    let (long, short) = (json!({ "timeout": 9000 }), json!({ "timeout": 6000 }));
    let (one, two) = tokio::join!(gateway.post(&connect, short), gateway.post(&connect, long));
    one.is(200);
    two.is(200);
    assert!(end(&gateway, &id).await >= later + SignedDuration::from_secs(3900));

    let before = Timestamp::now();
    gateway.post(&format!("/sandboxes/{id}/timeout"), json!({ "timeout": 100 })).await.is(204);
    let shortened = end(&gateway, &id).await;
    assert!(shortened < first && shortened >= before + SignedDuration::from_secs(99));
    gateway.post(&format!("/sandboxes/{id}/refreshes"), json!({ "duration": 500 })).await.is(204);
    assert!(end(&gateway, &id).await > shortened);
    // An end that is now.
    gateway.post(&format!("/sandboxes/{id}/timeout"), json!({ "timeout": 0 })).await.is(204);
    let sandbox = gateway.gateway.fleet.get(&id.parse().unwrap());
    if let Some(sandbox) = sandbox {
        tokio::time::timeout(crate::gateway::PATIENCE, sandbox.gone()).await.expect("it ends");
    }
    gateway.get(&format!("/sandboxes/{id}")).await.refuses(404, "doesn't exist");
}

fn keyed(gateway: &TestGateway, path: &str, key: &str, body: &Value) -> Request<Full<bytes::Bytes>> {
    let request = Request::post(path)
        .header("x-api-key", gateway.ours.as_str())
        .header("idempotency-key", key)
        .header(header::CONTENT_TYPE, "application/json");
    request.body(Full::from(body.to_string())).unwrap()
}

#[tokio::test]
async fn the_same_idempotency_key_gives_the_same_sandbox() {
    let gateway = TestGateway::start().await;
    let body = json!({ "templateID": "base", "timeout": 100 });
    let send = |key: &'static str, body: &Value| gateway.send(keyed(&gateway, "/v2/sandboxes", key, body));
    // At once, as a client that retries before the first answer came.
    let (one, two) = tokio::join!(send("abc-1", &body), send("abc-1", &body));
    let (one, two) = (one.is(201).json(), two.is(201).json());
    assert_eq!(one, two);
    assert_eq!(send("abc-1", &body).await.is(201).json(), one);
    assert_ne!(send("abc-2", &body).await.is(201).json()["sandboxID"], one["sandboxID"]);
    assert_eq!(gateway.get("/sandboxes").await.json().as_array().unwrap().len(), 2);

    send("abc-1", &json!({ "templateID": "base" })).await.refuses(422, "used with another body");
    gateway.send(keyed(&gateway, "/sandboxes", "abc-1", &body)).await.refuses(422, "used with another body");
    for bad in ["", "a b", "ä", &"x".repeat(256)] {
        gateway
            .send(keyed(&gateway, "/v2/sandboxes", bad, &body))
            .await
            .refuses(400, "invalid Idempotency-Key");
    }
    // Another team's key of the same name is another key.
    let mut theirs = keyed(&gateway, "/v2/sandboxes", "abc-1", &body);
    theirs.headers_mut().insert("x-api-key", gateway.theirs.as_str().parse().unwrap());
    assert_ne!(gateway.send(theirs).await.is(201).json()["sandboxID"], one["sandboxID"]);
    // A create that failed is not kept, and a sandbox that is gone is made again.
    let failing = json!({ "templateID": "base", "envVars": { "FAKE_START": "fail" } });
    send("abc-3", &failing).await.refuses(500, "did not start");
    send("abc-3", &body).await.is(201);
    let id = one["sandboxID"].as_str().unwrap();
    gateway.delete(&format!("/sandboxes/{id}")).await.is(204);
    assert_ne!(send("abc-1", &body).await.is(201).json()["sandboxID"], one["sandboxID"]);
}

#[tokio::test]
async fn a_client_that_leaves_leaves_no_sandbox_that_nobody_knows() {
    let gateway = TestGateway::start().await;
    let body = json!({ "templateID": "base", "envVars": { "FAKE_START": "silent" } });
    let waiting = async {
        while gateway.gateway.fleet.used().sandboxes == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        answer = gateway.post("/v2/sandboxes", body) => panic!("{answer:?}"),
        () = waiting => {}
    }
    let gone = async {
        while gateway.gateway.fleet.used().sandboxes > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(crate::gateway::PATIENCE, gone).await.expect("it is ended");
    assert_eq!(gateway.gateway.store.sandboxes().await.unwrap(), []);
}

#[tokio::test]
async fn a_quota_is_told_and_counted() {
    let quota = Capacity { sandboxes: 1, ..Capacity::UNLIMITED };
    let gateway = TestGateway::with(quota).await;
    gateway.create(json!({})).await;
    let full = gateway.post("/v2/sandboxes", json!({ "templateID": "base" })).await;
    full.refuses(429, "");
    gateway.post("/v2/sandboxes", json!({ "templateID": "none" })).await.refuses(404, "\"none\"");
    let text = gateway.get("/metrics").await.is(200).text;
    for line in [
        r#"tiffin_creates_total{outcome="Created"} 1"#,
        r#"tiffin_creates_total{outcome="Full"} 1"#,
        r#"tiffin_creates_total{outcome="Refused"} 1"#,
        r#"tiffin_sandboxes{stage="running"} 1"#,
        r#"tiffin_requests_total{method="POST",route="/v2/sandboxes",status="201"} 1"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn the_machine_tells_its_health_and_templates() {
    let gateway = TestGateway::start().await;
    assert_eq!(gateway.get("/health").await.is(200).json(), json!({ "version": env!("CARGO_PKG_VERSION") }));
    gateway.create(json!({})).await;
    let templates = gateway.get("/templates").await.is(200).json();
    let template = &templates[0];
    assert_eq!((&template["templateID"], &template["aliases"]), (&json!("base"), &json!(["base"])));
    assert_eq!((&template["spawnCount"], &template["buildStatus"]), (&json!(1), &json!("ready")));
    assert_eq!(template["buildID"], "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa");
    let alias = gateway.get("/templates/aliases/base").await.is(200).json();
    assert_eq!(alias, json!({ "templateID": "base", "public": true }));
    gateway.get("/templates/aliases/base:default").await.is(200);
    for absent in ["none", "..%2Fbase", "%2e%2e", "base%2F..%2Fbase", "%00", "%ff", "BASE", "base:v9"] {
        gateway
            .call(&gateway.ours, Method::GET, &format!("/templates/aliases/{absent}"), Value::Null)
            .await
            .is(404);
    }
}
