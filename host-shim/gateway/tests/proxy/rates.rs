//! Who asks too often is told when to come again, and nobody else is.

use http::{Request, StatusCode};
use tiffin_gateway::rate::{Rate, Rates};
use tiffin_gateway::server::Limits;

use crate::support::{Answer, Front, empty};

/// More than a burst of the slow rate below, and more than the bucket fills in a test.
const MANY: usize = 120;

const SLOW: Rate = Rate::per_second(1);

fn ask(path: &str, key: Option<&str>) -> Request<crate::support::Body> {
    let request = Request::get(path).header("host", "127.0.0.1");
    key.into_iter().fold(request, |request, key| request.header("x-api-key", key)).body(empty()).unwrap()
}

/// The answers to many requests, one after the other.
async fn many(front: &Front, path: &str, key: Option<&str>) -> Vec<Answer> {
    let mut connection = front.connect().await;
    let mut answers = Vec::new();
    for _ in 0..MANY {
        answers.push(connection.send(ask(path, key)).await);
    }
    answers
}

#[track_caller]
fn limited(answers: &[Answer], before: u16, who: &str) {
    let passed = answers.iter().filter(|answer| answer.status == before).count();
    assert!((10..MANY).contains(&passed), "{passed} of {MANY}");
    for refused in answers.iter().filter(|answer| answer.status != before) {
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{refused:?}");
        // Both SDKs wait for this, and take the message from there.
        let wait: u32 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=2).contains(&wait) && !refused.headers.contains_key("should-retry"), "{refused:?}");
        let body = refused.json();
        assert_eq!(body["code"], 429);
        assert!(
            body["message"].as_str().unwrap().starts_with(&format!("Rate limit exceeded: {who}")),
            "{body}"
        );
    }
    assert_eq!(answers[..10].iter().filter(|answer| answer.status == before).count(), 10, "a burst passes");
}

#[tokio::test]
async fn a_team_is_limited_by_itself() {
    let rates = Rates { team: SLOW, keyless: Rate::UNLIMITED };
    let front = Front::within(Limits { rates, ..Limits::default() }, &[]).await;
    let (red, blue, free) = (front.key().await, front.key_of("blue").await, front.key_of("free").await);
    limited(&many(&front, "/v2/sandboxes", Some(&red)).await, 200, "this team may send 1 requests a second");
    // Another team, an unlimited one, and those that everybody may ask.
    assert_eq!(front.send(ask("/v2/sandboxes", Some(&blue))).await.status, 200);
    let team = front.store.team_by_name("free").await.unwrap().unwrap();
    front.store.set_rate(&team.id, Some(Rate::UNLIMITED)).await.unwrap();
    let answers = many(&front, "/v2/sandboxes", Some(&free)).await;
    assert!(answers.iter().all(|answer| answer.status == 200));
    let numbers = front.send(ask("/metrics", Some(&red))).await.text;
    assert!(numbers.contains(r#"tiffin_rate_limited_total{who="Team"}"#), "{numbers}");
    // What was said about a team may be taken back.
    front.store.set_rate(&team.id, None).await.unwrap();
    limited(&many(&front, "/v2/sandboxes", Some(&free)).await, 200, "this team");
}

#[tokio::test]
async fn an_address_is_limited_where_no_key_is_valid() {
    let rates = Rates { team: Rate::UNLIMITED, keyless: SLOW };
    let front = Front::within(Limits { rates, ..Limits::default() }, &[]).await;
    let key = front.key().await;
    limited(
        &many(&front, "/v2/sandboxes", Some("e2b_wrong")).await,
        401,
        "this address, without a valid key,",
    );
    // Whoever has a key at that address is served, and so is who looks whether the gateway lives.
    assert!(many(&front, "/v2/sandboxes", Some(&key)).await.iter().all(|answer| answer.status == 200));
    assert!(many(&front, "/health", None).await.iter().all(|answer| answer.status == 200));
    // Without a key it is the same bucket.
    limited_now(&many(&front, "/v2/sandboxes", None).await);
    limited_now(&many(&front, "/openapi.json", None).await);
}

#[track_caller]
fn limited_now(answers: &[Answer]) {
    assert!(answers.iter().any(|answer| answer.status == StatusCode::TOO_MANY_REQUESTS));
}
