//! A thousand clients at one time, each with a connection and a stream of its own.

mod support;

use std::fs;
use std::sync::Arc;

use envd_proto::process::Scope;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Agent, DEADLINE, start};

const CLIENTS: usize = 1000;

/// What a client may cost the agent while nothing happens.
const MOST: usize = 64 << 10;

fn resident(agent: &Agent) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// An agent that was started with the usual limit of open files, and a test that has room for all its clients.
async fn agent() -> Arc<Agent> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = (CLIENTS * 2 + 500) as u64;
    assert!(limit.maximum.is_none_or(|most| most >= 5 * wanted), "open files: {limit:?}");
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), ..limit }).unwrap();
    let agent = Agent::start().await;
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit }).unwrap();
    // What is made once, whatever the number of clients.
    for _ in 0..10 {
        agent.shell("echo warm").await.finish().await;
    }
    Arc::new(agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_streams_start_at_once_and_none_is_lost() {
    let agent = agent().await;
    // Their own limit is the one that the agent got.
    assert_eq!(agent.shell("ulimit -Sn").await.finish().await.stdout, b"1024\n");
    let before = resident(&agent);
    let starting: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                let mut events = agent.start_process(start("sleep", &["1000"])).await;
                let pid = events.pid().await;
                (pid, events)
            })
        })
        .collect();
    let mut streams = Vec::new();
    for start in starting {
        streams.push(tokio::time::timeout(DEADLINE, start).await.expect("a start").unwrap());
    }
    let each = resident(&agent).saturating_sub(before) / CLIENTS;
    println!("a process with an open stream costs {each} bytes");
    assert!(each <= MOST, "{each} bytes");
    for (pid, _) in &streams {
        agent.signal(*pid, 9, Scope::Process).await.unwrap();
    }
    for (pid, events) in streams {
        assert_eq!(events.finish().await.end.status, "signal: killed", "{pid}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_cheap_and_stays() {
    let agent = agent().await;
    let before = resident(&agent);
    let mut senders = Vec::new();
    for _ in 0..CLIENTS {
        let stream = tokio::net::UnixStream::connect(agent.socket()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        assert_eq!(health(&mut sender).await, StatusCode::NO_CONTENT);
        senders.push(sender);
    }
    let each = resident(&agent).saturating_sub(before) / CLIENTS;
    println!("an idle connection costs {each} bytes");
    assert!(each <= MOST, "{each} bytes");
    for sender in &mut senders {
        assert_eq!(health(sender).await, StatusCode::NO_CONTENT);
    }
}

async fn health(sender: &mut hyper::client::conn::http1::SendRequest<Empty<bytes::Bytes>>) -> StatusCode {
    let request = Request::get("/health").header("host", "sandbox").body(Empty::new()).unwrap();
    let answer = async {
        sender.ready().await.unwrap();
        sender.send_request(request).await.unwrap().status()
    };
    tokio::time::timeout(DEADLINE, answer).await.expect("an answer")
}
