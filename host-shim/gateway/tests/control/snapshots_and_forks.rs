//! Snapshots and forks through the API, and what one team sees of another's.

use http::Method;
use serde_json::{Value, json};

use crate::gateway::{Answer, TestGateway};

fn snapshot_ids(answer: &Answer) -> Vec<String> {
    let list = answer.json();
    list.as_array().unwrap().iter().map(|one| one["snapshotID"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn snapshots_are_made_listed_started_and_deleted() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({ "envVars": { "A": "1" } })).await;
    let target = format!("/sandboxes/{id}/snapshots");
    let mut made = Vec::new();
    for (body, names) in [
        (json!({}), json!([])),
        (json!({ "name": "first" }), json!(["first:default"])),
        (json!({ "name": "first:v2", "memory": true }), json!(["first:v2"])),
    ] {
        let snapshot = gateway.post(&target, body).await.is(201).json();
        assert_eq!(snapshot["names"], names);
        made.push(snapshot["snapshotID"].as_str().unwrap().to_owned());
    }
    made.reverse();
    assert_eq!(snapshot_ids(&gateway.get("/snapshots").await.is(200)), made);
    assert_eq!(snapshot_ids(&gateway.get("/snapshots?name=first").await.is(200)), made[1..2]);
    assert_eq!(snapshot_ids(&gateway.get(&format!("/snapshots?sandboxID={id}")).await.is(200)), made);
    assert_eq!(snapshot_ids(&gateway.get("/snapshots?sandboxID=other").await.is(200)), [""; 0]);
    let mut seen = Vec::new();
    let mut page = "/snapshots?limit=2".to_owned();
    loop {
        let answer = gateway.get(&page).await.is(200);
        seen.extend(snapshot_ids(&answer));
        let Some(token) = answer.header("x-next-token") else { break };
        page = format!("/snapshots?limit=2&nextToken={token}");
    }
    assert_eq!(seen, made);

    // By its id, its name, and its name with the tag.
    for wanted in [made[1].as_str(), "first", "first:default"] {
        let sandbox = gateway.post("/v2/sandboxes", json!({ "templateID": wanted })).await.is(201).json();
        assert_eq!((&sandbox["templateID"], &sandbox["alias"]), (&json!(made[1]), &json!(wanted)));
    }
    gateway.post("/v2/sandboxes", json!({ "templateID": "first:v3" })).await.refuses(404, "not found");
    // The machine's templates are not mixed up with a team's snapshots.
    assert_eq!(gateway.get("/templates").await.is(200).json().as_array().unwrap().len(), 1);

    // It is another team's: neither seen, nor started, nor deleted.
    let theirs = async |method: Method, target: &str, body: Value| {
        gateway.call(&gateway.theirs, method, target, body).await
    };
    assert_eq!(theirs(Method::GET, "/snapshots", Value::Null).await.is(200).json(), json!([]));
    for wanted in [made[1].as_str(), "first"] {
        let body = json!({ "templateID": wanted });
        theirs(Method::POST, "/v2/sandboxes", body).await.refuses(404, "not found");
        let target = format!("/templates/{wanted}");
        theirs(Method::DELETE, &target, Value::Null).await.refuses(404, "doesn't exist");
    }

    let folder = |id: &str| gateway.gateway.config.data.path().join("snapshots").join(id);
    gateway.delete("/templates/first%3Av2").await.is(204);
    gateway.delete(&format!("/templates/{}", made[1])).await.is(204);
    gateway.delete(&format!("/templates/{}", made[1])).await.refuses(404, "doesn't exist");
    assert!(folder(&made[2]).exists() && !folder(&made[1]).exists() && !folder(&made[0]).exists());
    assert_eq!(snapshot_ids(&gateway.get("/snapshots").await.is(200)), made[2..]);

    gateway.post(&format!("/sandboxes/{id}/pause"), json!({})).await.is(204);
    gateway.post(&target, json!({})).await.refuses(409, "connect to it first");
}

#[tokio::test]
async fn forks_are_sandboxes_of_their_own() {
    let gateway = TestGateway::start().await;
    let asked = json!({ "metadata": { "who": "source" }, "envVars": { "A": "1" }, "autoPause": true });
    let id = gateway.create(asked).await;
    let target = format!("/sandboxes/{id}/fork");
    let forks = gateway.post(&target, json!({ "count": 3, "timeout": 60 })).await.is(201).json();
    let forks = forks.as_array().unwrap();
    assert_eq!(forks.len(), 3);
    let source = gateway.get(&format!("/sandboxes/{id}")).await.is(200).json();
    for fork in forks {
        let fork = &fork["sandbox"];
        let info =
            gateway.get(&format!("/sandboxes/{}", fork["sandboxID"].as_str().unwrap())).await.is(200).json();
        assert_eq!((&info["metadata"], &info["templateID"]), (&source["metadata"], &json!("base")));
        assert_eq!(info["lifecycle"], source["lifecycle"]);
        assert_ne!(fork["envdAccessToken"], source["envdAccessToken"]);
        assert_eq!(fork["envdAccessToken"].as_str().unwrap().len(), 64);
    }
    let metrics = gateway.get("/metrics").await.is(200).text;
    for line in [
        "tiffin_starts_total{path=\"fork\"} 3\n",
        "tiffin_starts_total{path=\"boot\"} 1\n",
        "tiffin_parked 0\n",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    gateway.post(&target, Value::Null).await.is(201);
    gateway.post(&format!("/sandboxes/{id}/pause"), json!({})).await.is(204);
    gateway.post(&target, json!({})).await.refuses(409, "connect to it first");
}

#[tokio::test]
async fn a_fork_over_the_quota_is_an_error_of_its_own() {
    let quota =
        tiffin_gateway::config::Capacity { sandboxes: 3, ..tiffin_gateway::config::Capacity::UNLIMITED };
    let gateway = TestGateway::with(quota).await;
    let id = gateway.create(json!({})).await;
    let forks = gateway.post(&format!("/sandboxes/{id}/fork"), json!({ "count": 4 })).await.is(201).json();
    let forks = forks.as_array().unwrap();
    let failed: Vec<_> = forks.iter().filter(|fork| fork.get("error").is_some()).collect();
    assert_eq!((forks.len(), failed.len()), (4, 2));
    for fork in failed {
        assert_eq!((&fork["error"]["code"], fork.get("sandbox")), (&json!(429), None));
    }
}
