//! Each request leaves one line in the log, with what somebody who looks for it knows.

use std::io;
use std::sync::{Arc, Mutex};

use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

use crate::gateway::TestGateway;

/// The log of a test.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

// One thread: the subscriber is that thread's.
#[tokio::test(flavor = "current_thread")]
async fn an_answer_is_logged_with_its_ids() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().json().with_writer(log.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    for (request_id, path) in
        [("find-me", format!("/sandboxes/{id}")), ("lost", "/nothing?secret=1".to_owned())]
    {
        let request = Request::get(path)
            .header("x-api-key", gateway.ours.as_str())
            .header("x-request-id", request_id)
            .body(Full::default());
        gateway.send(request.unwrap()).await;
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = |key: &str, value: &str| {
        let answered = lines.iter().filter(|line| line["fields"]["message"] == "answered");
        answered.map(|line| line["span"].clone()).find(|span| span[key] == value).unwrap()
    };
    let found = line("id", "find-me");
    let key = gateway.gateway.store.keys().await.unwrap().into_iter().find(|key| key.name == "ours").unwrap();
    assert_eq!((&found["team"], &found["sandbox"]), (&json!(key.team.to_string()), &json!(id)));
    assert_eq!((&found["route"], &found["status"]), (&json!("/sandboxes/{sandboxID}"), &json!(200)));
    assert!(found["duration_ms"].as_f64().unwrap() > 0.0);
    let created = line("route", "/v2/sandboxes");
    assert_eq!((&created["method"], &created["sandbox"]), (&json!("POST"), &json!(id)));
    assert_eq!((&line("id", "lost")["status"], &line("id", "lost")["route"]), (&json!(404), &json!("none")));
    assert!(!text.contains(gateway.ours.as_str()) && !text.contains("secret"), "{text}");
}
