//! Lists: filters, order, and pages that stay true while sandboxes come and go.

use serde_json::{Value, json};

use crate::gateway::{Answer, TestGateway};

fn ids(answer: &Answer) -> Vec<String> {
    let list = answer.json();
    list.as_array().unwrap().iter().map(|one| one["sandboxID"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn pages_miss_and_repeat_nothing() {
    let gateway = TestGateway::start().await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(gateway.create(json!({})).await);
    }
    let newest_first: Vec<String> = made.iter().rev().cloned().collect();
    let all = gateway.get("/v2/sandboxes").await.is(200);
    assert_eq!((ids(&all), all.header("x-next-token")), (newest_first.clone(), None));
    assert_eq!(ids(&gateway.get("/sandboxes").await.is(200)), newest_first);
    assert_eq!(ids(&gateway.get("/v2/sandboxes?order=asc").await.is(200)), made);
    assert_eq!(gateway.get("/v2/sandboxes?limit=5").await.is(200).header("x-next-token"), None);

    for (order, expected) in [("desc", &newest_first), ("asc", &made)] {
        let mut seen = Vec::new();
        let mut target = format!("/v2/sandboxes?order={order}&limit=2");
        loop {
            let page = gateway.get(&target).await.is(200);
            seen.extend(ids(&page));
            let Some(token) = page.header("x-next-token") else { break };
            target = format!("/v2/sandboxes?order={order}&limit=2&nextToken={token}");
        }
        assert_eq!(seen, *expected, "{order}");
    }

    // Behind the first page of two, the last one of it goes and a newer one comes.
    let page = gateway.get("/v2/sandboxes?limit=2").await.is(200);
    let token = page.header("x-next-token").unwrap().to_owned();
    gateway.delete(&format!("/sandboxes/{}", made[3])).await.is(204);
    gateway.create(json!({})).await;
    let rest = gateway.get(&format!("/v2/sandboxes?limit=100&nextToken={token}")).await.is(200);
    assert_eq!(ids(&rest), newest_first[2..]);
}

#[tokio::test]
async fn filters_are_those_of_the_clients() {
    let gateway = TestGateway::start().await;
    let plain = gateway.create(json!({ "metadata": { "user": "abc", "n": "1" } })).await;
    let odd = gateway.create(json!({ "metadata": { "a b": "50% & é=+" } })).await;
    let both = vec![odd.clone(), plain.clone()];
    // The targets as the published clients of Python and JavaScript put them on the wire.
    for (target, expected) in [
        ("/v2/sandboxes?metadata=user%3Dabc", vec![plain.clone()]),
        ("/sandboxes?metadata=user%3Dabc", vec![plain.clone()]),
        ("/v2/sandboxes?metadata=user%3Dabc%26n%3D1", vec![plain.clone()]),
        ("/v2/sandboxes?metadata=user%3Dabc%26n%3D2", vec![]),
        (
            "/v2/sandboxes?metadata=a%252520b%3D50%252525%252520%252526%252520%2525C3%2525A9%25253D%25252B",
            vec![odd.clone()],
        ),
        ("/v2/sandboxes?metadata=", both.clone()),
        ("/v2/sandboxes?state=running", both.clone()),
        ("/v2/sandboxes?state=running,paused", both.clone()),
        ("/v2/sandboxes?state=running%2Cpaused", both.clone()),
        ("/v2/sandboxes?state=paused", vec![]),
        ("/v2/sandboxes?template=base", both.clone()),
        ("/v2/sandboxes?template=other", vec![]),
        ("/v2/sandboxes?startedAfter=2020-01-01T00%3A00%3A00.000Z", both.clone()),
        ("/v2/sandboxes?startedAfter=2020-01-01T01:00:00+01:00", both.clone()),
        ("/v2/sandboxes?startedAfter=2999-01-01T00%3A00%3A00%2B00%3A00", vec![]),
        ("/v2/sandboxes?novel=1", both.clone()),
    ] {
        assert_eq!(ids(&gateway.get(target).await.is(200)), expected, "{target}");
    }
    let list: Value = gateway.get("/v2/sandboxes").await.json();
    let first = list[1]["startedAt"].as_str().unwrap();
    let later = gateway.get(&format!("/v2/sandboxes?startedAfter={first}")).await.is(200);
    assert_eq!(ids(&later), [odd], "a start is not after itself");

    for (target, words) in [
        ("/v2/sandboxes?state=dead", "invalid state \"dead\""),
        ("/v2/sandboxes?order=up", "invalid order \"up\""),
        ("/v2/sandboxes?limit=0", "invalid limit"),
        ("/v2/sandboxes?limit=101", "invalid limit"),
        ("/v2/sandboxes?limit=-1", "limit"),
        ("/v2/sandboxes?limit=1e9", "limit"),
        ("/v2/sandboxes?limit=1&limit=2", "limit"),
        ("/v2/sandboxes?startedAfter=yesterday", "invalid startedAfter"),
        ("/v2/sandboxes?nextToken=../..", "invalid nextToken"),
        ("/v2/sandboxes?metadata=novalue", "invalid metadata"),
        ("/v2/sandboxes?metadata=k%3D%2525ff", "invalid metadata"),
        ("/sandboxes?metadata=novalue", "invalid metadata"),
    ] {
        gateway.get(target).await.refuses(400, words);
    }
}
