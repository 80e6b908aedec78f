//! What comes from a sandbox's agent and folder, with a socket in the agent's place that may say anything.

use std::fs;

use jiff::Timestamp;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio_util::task::AbortOnDropHandle;

use crate::gateway::TestGateway;

/// An agent on a sandbox's hybrid vsock that gives the same answer to every request that carries the token.
fn agent(gateway: &TestGateway, id: &str, answer: Vec<u8>) -> AbortOnDropHandle<()> {
    let socket = gateway.folder(id).join("vsock.sock");
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(socket).unwrap();
    let token = gateway.gateway.fleet.get(&id.parse().unwrap()).unwrap().record().access_token.unwrap();
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            assert_eq!(line, "CONNECT 49983\n");
            stream.write_all(b"OK 1\n").await.unwrap();
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if stream.read_line(&mut head).await.unwrap() == 0 {
                    break;
                }
            }
            let known = head.starts_with("GET /metrics HTTP/1.1\r\n") && head.contains(&token);
            let refusal = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n".to_vec();
            // The gateway may hang up first.
            let _ = stream.write_all(if known { &answer } else { &refusal }).await;
            let _ = stream.shutdown().await;
        }
    }))
}

fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn sample(ts: i64) -> String {
    json!({ "ts": ts, "cpu_count": 2, "cpu_used_pct": 12.5, "mem_total": 100, "mem_used": 40, "mem_cache": 7,
        "mem_total_mib": 0, "mem_used_mib": 0, "disk_used": 3, "disk_total": 9 })
    .to_string()
}

#[tokio::test]
async fn metrics_are_the_agents_current_sample() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    let _agent = agent(&gateway, &id, ok(&sample(1_700_000_000)));
    let metric = json!({ "timestamp": "2023-11-14T22:13:20Z", "timestampUnix": 1_700_000_000, "cpuCount": 2,
        "cpuUsedPct": 12.5, "memUsed": 40, "memTotal": 100, "memCache": 7, "diskUsed": 3, "diskTotal": 9 });
    for (query, expected) in [
        ("", json!([metric])),
        ("?start=1700000000&end=1700000000", json!([metric])),
        ("?start=1700000001", json!([])),
        ("?end=1699999999", json!([])),
    ] {
        let answer = gateway.get(&format!("/sandboxes/{id}/metrics{query}")).await.is(200);
        assert_eq!(answer.json(), expected, "{query}");
    }
    let silent = gateway.create(json!({})).await;
    let target = format!("/sandboxes/metrics?sandbox_ids={id},{silent},nosuch,{id},..%2f");
    let answer = gateway.get(&target).await.is(200).json();
    assert_eq!(answer, json!({ "sandboxes": { id: metric } }));
}

#[tokio::test]
async fn an_agent_that_lies_or_is_dead_is_told_as_that() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    let target = format!("/sandboxes/{id}/metrics");
    // Nobody listens: the machine is dying.
    let answer = gateway.get(&target).await;
    answer.refuses(502, "gave no metrics: the connection failed");
    assert_eq!(answer.header("should-retry"), Some("false"));
    let huge = format!("HTTP/1.1 200 OK\r\n\r\n{}", " ".repeat(1 << 20));
    for (answer, words) in [
        (b"".to_vec(), "the connection failed"),
        (b"nonsense\r\n\r\n".to_vec(), "the connection failed"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".to_vec(), "got 503"),
        (ok("[]"), "expected metrics"),
        (ok("{\"ts\":1}"), "missing field"),
        (ok(&sample(0).replace("12.5", "1e999")), "expected metrics"),
        (ok(&sample(0).replace("100", "-1")), "expected metrics"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec(), "expected metrics"),
        (huge.into_bytes(), "length limit"),
    ] {
        let _agent = agent(&gateway, &id, answer);
        gateway.get(&target).await.refuses(502, words);
    }
    // A time that no clock shows.
    let _agent = agent(&gateway, &id, ok(&sample(i64::MAX)));
    assert_eq!(gateway.get(&target).await.is(200).json(), json!([]));
}

#[tokio::test]
async fn logs_are_the_consoles_and_the_shims() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    let info = gateway.get(&format!("/sandboxes/{id}")).await.json();
    let started: Timestamp = info["startedAt"].as_str().unwrap().parse().unwrap();
    let later = started + jiff::SignedDuration::from_secs(60);
    fs::write(gateway.folder(&id).join("console.log"), "Linux says hello\n").unwrap();
    let shim = json!({ "timestamp": later, "level": "WARN", "fields": { "message": "late" }, "target": "t" });
    fs::write(gateway.folder(&id).join("shim.log"), format!("{shim}\n")).unwrap();

    let logs = gateway.get(&format!("/sandboxes/{id}/logs")).await.is(200).json();
    assert_eq!(logs["logs"][0], json!({ "timestamp": info["startedAt"], "line": "Linux says hello" }));
    assert_eq!(logs["logs"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&logs["logEntries"][1]["message"], &logs["logEntries"][1]["level"]),
        (&json!("late"), &json!("warn"))
    );
    let start = later.as_millisecond();
    let logs = gateway.get(&format!("/sandboxes/{id}/logs?start={start}&limit=10")).await.is(200).json();
    assert_eq!(logs["logs"].as_array().unwrap().len(), 1);

    let v2 = async |query: &str| {
        let logs = gateway.get(&format!("/v2/sandboxes/{id}/logs?{query}")).await.is(200).json();
        let messages =
            logs["logs"].as_array().unwrap().iter().map(|one| one["message"].as_str().unwrap().to_owned());
        messages.collect::<Vec<_>>()
    };
    assert_eq!(v2("").await, ["Linux says hello", "late"]);
    assert_eq!(v2("direction=backward&limit=1").await, ["late"]);
    assert_eq!(v2(&format!("direction=backward&cursor={}", start - 1)).await, ["Linux says hello"]);
    assert_eq!(v2("level=warn").await, ["late"]);
    assert_eq!(v2("search=LINUX").await, ["Linux says hello"]);
}
