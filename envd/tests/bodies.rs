//! Large requests of many clients at one time: bounded together, and each answered.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Barrier};
use std::thread;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use support::{Agent, DEADLINE, body_of};

/// The longest message.
const LONGEST: usize = 4 << 20;

/// What the agent may take while clients send many times as much: its pools, decoded once more, and itself.
const MOST: usize = 160 << 20;

/// The agent's memory at its highest.
fn peak(agent: &Agent) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// A message of this length in JSON, with a field that the agent does not know.
fn message(length: usize) -> Vec<u8> {
    let (begin, end) = (br#"{"novel":""#, br#""}"#);
    let filling = vec![b'x'; length - begin.len() - end.len()];
    [&begin[..], &filling, end].concat()
}

fn head(length: usize) -> String {
    format!(
        "POST /process.Process/List HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn many_long_bodies_are_bounded_together_and_each_is_answered() {
    const CLIENTS: usize = 100;
    let agent = Agent::start().await;
    let body = Arc::new(message(LONGEST));
    // All have sent all but the last byte; then small calls are made; then all send their last one.
    let (held, finish) = (Arc::new(Barrier::new(CLIENTS + 1)), Arc::new(Barrier::new(CLIENTS + 1)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (held, finish, body) = (Arc::clone(&held), Arc::clone(&finish), Arc::clone(&body));
            let mut stream = UnixStream::connect(agent.socket()).unwrap();
            thread::spawn(move || {
                stream.set_write_timeout(Some(DEADLINE)).unwrap();
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                stream.write_all(head(body.len()).as_bytes()).unwrap();
                // Who was refused, and takes its time, may find the connection closed; its answer is there.
                let _ = stream.write_all(&body[..body.len() - 1]);
                held.wait();
                finish.wait();
                let _ = stream.write_all(&body[body.len() - 1..]);
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer);
                String::from_utf8_lossy(&answer).into_owned()
            })
        })
        .collect();
    tokio::task::spawn_blocking(move || held.wait()).await.unwrap();
    for _ in 0..20 {
        assert_eq!(agent.json("/process.Process/List", "{}").await.0, StatusCode::OK, "a small call passes");
    }
    assert_eq!(agent.shell("echo small").await.finish().await.stdout, b"small\n");
    tokio::task::spawn_blocking(move || finish.wait()).await.unwrap();
    let (mut answered, mut refused) = (0, 0);
    for client in clients {
        let answer = client.join().unwrap();
        if answer.starts_with("HTTP/1.1 200") {
            answered += 1;
        } else {
            assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("resource_exhausted"), "{answer}");
            refused += 1;
        }
    }
    let peak = peak(&agent);
    println!("{answered} answered, {refused} refused, {} MiB at the highest", peak >> 20);
    assert!(answered > 0 && refused > 0);
    assert!(peak < MOST, "{} MiB", peak >> 20);
    // All room was given back.
    let response = agent.call("/process.Process/List", "application/json", body.to_vec()).await;
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn streams_of_one_connection_are_bounded_with_the_others() {
    let agent = Agent::start().await;
    let body = Bytes::from(message(LONGEST));
    let mut calls = Vec::new();
    for _ in 0..4 {
        let stream = tokio::net::UnixStream::connect(agent.socket()).await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..16 {
            let mut sender = sender.clone();
            let request = Request::post("http://sandbox/process.Process/List")
                .header("content-type", "application/json")
                .body(Full::new(body.clone()))
                .unwrap();
            calls.push(tokio::spawn(async move {
                sender.ready().await.unwrap();
                let response = sender.send_request(request).await.unwrap();
                (response.status(), body_of(response).await)
            }));
        }
    }
    let mut answered = 0;
    for call in calls {
        let (status, body) = tokio::time::timeout(DEADLINE, call).await.expect("an answer").unwrap();
        match status {
            StatusCode::OK => answered += 1,
            _ => assert!(String::from_utf8_lossy(&body).contains("resource_exhausted"), "{status}"),
        }
    }
    println!("{answered} answered, {} MiB at the highest", peak(&agent) >> 20);
    assert!(answered > 0);
    assert!(peak(&agent) < MOST, "{} MiB", peak(&agent) >> 20);
}
