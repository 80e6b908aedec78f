//! The agent as a service with a host, over Unix sockets, as a host sees it.

mod support_service;

use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support_service::{DEADLINE, Service};

#[test]
fn nobody_calls_before_the_host_has_configured_and_a_host_that_left_is_dialled_again() {
    let mut service = Service::start();
    assert!(service.list().contains("not configured yet"));
    let (mut host, hello) = service.host();
    assert!(hello["container"].is_null() && hello["protocolVersion"].as_u64().unwrap() >= 1, "{hello}");
    drop(host);
    (host, _) = service.host();
    assert_eq!(
        host.ask(json!({"configure": {"env": {"A": "b"}, "accessToken": "secret"}}))["error"],
        Value::Null
    );
    assert!(service.list().starts_with("HTTP/1.1 401"));
    assert_eq!(host.ask(json!({"configure": {}}))["error"]["code"], "CODE_FAILED_PRECONDITION");
    assert_eq!(host.ask(json!({"freeze": {}}))["error"]["code"], "CODE_UNSUPPORTED");
    assert_eq!(host.ask(json!({"ofALaterVersion": {}}))["error"]["code"], "CODE_UNSUPPORTED");
    assert_eq!(host.ask(json!({"shutdown": {"graceMs": 1}}))["error"], Value::Null);
    assert_eq!(service.ended(), Some(0));
    assert!(!service.at("envd.sock").exists());
}

#[test]
fn a_line_that_is_no_message_is_told_and_ends_the_connection_not_the_service() {
    let mut service = Service::start();
    let long = [b"{\"generation\":1,\"configure\":{\"hostname\":\"".to_vec(), vec![b'x'; 1 << 20]].concat();
    for (bad, expected) in [
        (&b"nonsense\n"[..], "expected {\"generation\":N"),
        (b"{\"id\":1,\"thaw\":{}}\n", "missing field `generation`"),
        (b"{\"generation\":1,\"id\":\0}\n", "no message"),
        (b"\x89TFNCTL\n a record", "no message"),
        (&long, "more than 1048576 bytes"),
    ] {
        let (mut host, _) = service.host();
        host.say(b"\r\n\n");
        host.say(bad);
        let response = host.next("response").unwrap();
        // An id of 0 is not written, as protobuf's JSON mapping has it.
        assert!(response["id"].is_null() && response["error"]["code"] == "CODE_INVALID", "{response}");
        let message = response["error"]["message"].as_str().unwrap();
        assert!(message.contains(expected), "{message}");
        assert!(host.next("response").is_none(), "the connection ends");
    }
    let (mut host, _) = service.host();
    host.ask(json!({"shutdown": {}}));
    assert_eq!(service.ended(), Some(0));
}

#[test]
fn a_shutdown_gives_processes_their_grace() {
    let mut service = Service::start();
    let (mut host, _) = service.host();
    host.ask(json!({"configure": {}}));
    let marks = service.at("marks");
    let script = format!(
        "trap 'echo asked >> {0}; exit' TERM; echo ready >> {0}; while :; do sleep 0.05; done",
        marks.display()
    );
    let start = json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]}}).to_string();
    let mut stream = UnixStream::connect(service.at("envd.sock")).unwrap();
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nhost: x\r\ncontent-type: application/connect+json\r\ncontent-length: {}\r\n\r\n\0",
        start.len() + 5
    );
    let body = [head.as_bytes(), &(start.len() as u32).to_be_bytes(), start.as_bytes()].concat();
    stream.write_all(&body).unwrap();
    let read = || std::fs::read_to_string(&marks).unwrap_or_default();
    let started = Instant::now();
    while read().is_empty() {
        assert!(started.elapsed() < DEADLINE, "the process starts");
        std::thread::sleep(Duration::from_millis(5));
    }
    host.ask(json!({"shutdown": {"graceMs": DEADLINE.as_millis() as u64}}));
    assert_eq!(service.ended(), Some(0));
    assert_eq!(read(), "ready\nasked\n");
}

#[test]
fn a_socket_that_a_killed_service_left_is_taken_over_and_one_in_use_is_not() {
    let mut service = Service::start();
    assert!(service.list().contains("not configured yet"));
    let folder = service.folder.path().to_owned();
    let second = |folder: &std::path::Path| {
        let listen = format!("unix:{}", folder.join("envd.sock").display());
        Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--listen", &listen, "--no-container"])
            .output()
            .unwrap()
    };
    let refused = second(&folder);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("envd.sock") && said.contains("in use"), "{said}");
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    assert!(std::fs::metadata(folder.join("envd.sock")).unwrap().file_type().is_socket(), "it is left");
    let folder = std::mem::replace(&mut service.folder, tempfile::tempdir().unwrap());
    let again = Service::start_in(folder);
    assert!(again.list().contains("not configured yet"));
}

#[test]
fn a_spawner_that_dies_again_and_again_is_made_again_ever_more_slowly_and_the_host_is_told() {
    let service = Service::start();
    let (mut host, _) = service.host();
    host.ask(json!({"configure": {}}));
    let limits = |pid: Pid| {
        let text = std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).unwrap();
        text.lines().find(|line| line.starts_with("Max open files")).unwrap().to_owned()
    };
    let first = limits(service.spawner().unwrap());
    // None, then 20 ms, twice as long each time. A slow machine only adds to it, and a spawner that has lived for long
    // (10 s) begins anew.
    let mut expected = Duration::ZERO;
    let mut before = Instant::now();
    for nth in 0..7 {
        let spawner = service.spawner().unwrap();
        let killed = Instant::now();
        kill_process(spawner, Signal::KILL).unwrap();
        assert_eq!(host.next("event").unwrap(), json!({"spawnerRestarted": {}}));
        if before.elapsed() > Duration::from_secs(9) {
            expected = Duration::ZERO;
        }
        assert!(killed.elapsed() >= expected, "{nth}: {:?}, expected {expected:?}", killed.elapsed());
        expected = (expected * 2).max(Duration::from_millis(20));
        before = killed;
        let next = service.spawner().unwrap();
        assert_ne!(next, spawner);
        assert_eq!(limits(next), first, "what it starts may open as many files as before");
    }
    assert!(service.list().contains("200 OK"));
}
