//! What is on the wire: ids, errors, batches, limits.

use futures::SinkExt;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::support::Legacy;

#[tokio::test]
async fn every_text_has_its_answer() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let unknown = "the method nope does not exist/is not available";
    let error = |id: Value, code: i32, message: &str| json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}});
    for (text, expected) in [
        (
            r#"{"jsonrpc":"2.0","id":"abcABC123456","method":"nope"}"#,
            error(json!("abcABC123456"), -32601, unknown),
        ),
        (
            r#"{"jsonrpc":"2.0","id":7,"method":"filesystem_list"}"#,
            error(json!(7), -32602, "missing value for required argument 0"),
        ),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"process_subscribe","params":["x","p"]}"#,
            error(json!(1), -32601, "no \"x\" subscription in process namespace"),
        ),
        (r#"{"id":1}"#, error(json!(1), -32600, "invalid request")),
        ("[]", error(Value::Null, -32600, "empty batch")),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"filesystem_makeDir","params":["/tmp"]}"#,
            json!({"jsonrpc": "2.0", "id": 1, "result": null}),
        ),
    ] {
        client.socket.send(Message::text(text)).await.unwrap();
        assert_eq!(client.text().await, expected, "{text}");
        client.socket.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
        assert_eq!(client.text().await, expected, "{text}");
    }
    for text in ["", "{", "hello", "{\"a\":1}}"] {
        client.socket.send(Message::text(text)).await.unwrap();
        let answer = client.text().await;
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&Value::Null, &json!(-32700)), "{text}");
    }
}

#[tokio::test]
async fn a_batch_is_answered_at_once_and_before_what_it_subscribed_to() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let call = |id: u32, method: &str, params: Value| json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
    let batch = json!([
        call(1, "process_subscribe", json!(["onStdout", "p"])),
        call(2, "process_subscribe", json!(["onExit", "p"])),
        call(3, "process_start", json!(["p", "echo hi", {}, ""])),
        {"jsonrpc": "2.0", "method": "filesystem_makeDir", "params": [legacy.path("made")]},
        5,
        call(4, "filesystem_list", json!([legacy.path("made")])),
    ]);
    client.socket.send(Message::text(batch.to_string())).await.unwrap();
    let answers = client.text().await;
    let answers = answers.as_array().expect("an array first");
    let ids: Vec<&Value> = answers.iter().map(|answer| &answer["id"]).collect();
    assert_eq!(ids, [&json!(1), &json!(2), &json!(3), &Value::Null, &json!(4)]);
    assert_eq!((&answers[2]["result"], &answers[4]["result"]), (&json!("p"), &json!([])));
    let told = client.told_until(answers[1]["result"].as_str().unwrap()).await;
    assert_eq!(told[0].1["line"], "hi");
}

#[tokio::test]
async fn subscriptions_and_connections_have_their_limits() {
    let legacy = Legacy::start().await;
    let mut client = legacy.connect().await;
    let first = client.subscribe("process_subscribe", json!(["onExit", "p0"])).await;
    for number in 1..512 {
        client.subscribe("process_subscribe", json!(["onExit", format!("p{number}")])).await;
    }
    let (code, message) = client.refused("process_subscribe", json!(["onExit", "q"])).await;
    assert!(code == -32000 && message.starts_with("512 subscriptions"), "{message}");
    client.call("process_unsubscribe", json!([first])).await;
    client.subscribe("process_subscribe", json!(["onExit", "q"])).await;

    let mut connections = vec![client];
    while connections.len() < 32 {
        connections.push(legacy.connect().await);
    }
    let error = legacy.upgrade().await.unwrap_err();
    let tokio_tungstenite::tungstenite::Error::Http(answer) = error else { panic!("{error}") };
    assert_eq!(answer.status(), 429);
    connections.pop();
    super::eventually("a place is free", async || legacy.upgrade().await.is_ok()).await;
}
