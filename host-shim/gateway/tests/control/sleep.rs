//! Pausing and resuming through the API, with the answers that clients tell apart.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::gateway::TestGateway;

#[tokio::test]
async fn a_sandbox_is_paused_listed_and_resumed() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({ "metadata": { "a": "b" } })).await;
    let other = gateway.create(json!({})).await;
    let call = |verb: &str| format!("/sandboxes/{id}/{verb}");
    // Python sends `{}` or what was chosen, JavaScript may send nothing.
    gateway.post(&call("pause"), Value::Null).await.is(204);
    gateway
        .post(&call("pause"), json!({ "memory": true, "requireHealthyGuest": true }))
        .await
        .refuses(409, "already paused");
    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    assert_eq!((&info["state"], &info["metadata"]), (&json!("paused"), &json!({ "a": "b" })));
    let ids = async |target: &str| -> Vec<String> {
        let list = gateway.get(target).await.is(200).json();
        list.as_array().unwrap().iter().map(|one| one["sandboxID"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids("/v2/sandboxes?state=paused").await, [id.as_str()]);
    assert_eq!(ids("/v2/sandboxes?state=running").await, [other.as_str()]);
    assert_eq!(ids("/v2/sandboxes?state=running,paused&order=asc").await, [id.as_str(), other.as_str()]);
    assert_eq!(ids("/v2/sandboxes?order=asc").await, [id.as_str(), other.as_str()]);
    assert_eq!(ids("/sandboxes").await, [other.as_str()], "clients of 1.x know no paused ones");

    // What needs a running one says how to get it.
    gateway.post(&call("timeout"), json!({ "timeout": 60 })).await.refuses(409, "connect to it first");
    assert_eq!(gateway.get(&call("metrics")).await.is(200).json(), json!([]));
    gateway.get(&call("logs")).await.is(200);
    let metrics = gateway.get("/metrics").await.is(200).text;
    assert!(metrics.contains("tiffin_sandboxes{stage=\"paused\"} 1\n"), "{metrics}");

    let connect = format!("/v2/sandboxes/{id}/connect");
    let resumed = gateway.post(&connect, json!({ "timeout": 100 })).await.is(201).json();
    assert_eq!(resumed["sandboxID"], id.as_str());
    gateway.post(&connect, json!({})).await.is(200);
    gateway.post(&call("resume"), json!({})).await.refuses(409, "already running");
    gateway.post(&call("pause"), json!({})).await.is(204);
    let wish = json!({ "timeout": 30, "autoPause": true });
    gateway.post(&call("resume"), wish).await.is(201);
    let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    assert_eq!(info["lifecycle"], json!({ "autoResume": false, "onTimeout": "pause" }));
    let end: Timestamp = info["endAt"].as_str().unwrap().parse().unwrap();
    assert!(end < Timestamp::now() + SignedDuration::from_secs(31));
    gateway.post(&call("pause"), json!({})).await.is(204);
    gateway.delete(&format!("/sandboxes/{id}")).await.is(204);
    gateway.post(&call("pause"), json!({})).await.refuses(404, "doesn't exist");
}

#[tokio::test]
async fn what_clients_send_about_a_sandboxes_end_is_kept() {
    let gateway = TestGateway::start().await;
    for (asked, lifecycle) in [
        (json!({}), json!({ "autoResume": false, "onTimeout": "kill" })),
        (json!({ "autoPause": false }), json!({ "autoResume": false, "onTimeout": "kill" })),
        (
            json!({ "autoPause": true, "autoPauseMemory": true, "autoResume": { "enabled": true } }),
            json!({ "autoResume": true, "onTimeout": "pause" }),
        ),
    ] {
        let id = gateway.create(asked).await;
        let info = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
        assert_eq!(info["lifecycle"], lifecycle);
    }
}
