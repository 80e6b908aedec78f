//! The agent as an ordinary process: its client API over a Unix socket, in both codecs, as a client sees it.

mod support;

use std::time::Duration;

use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::{filesystem, process};
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use process::process_event::{Event, data_event};
use prost::Message;
use support::{Agent, DEADLINE, Events, body_of, start};

#[tokio::test]
async fn a_process_runs_with_its_own_output_and_exit_code() {
    let agent = Agent::start().await;
    let mut request = start("sh", &["-c", "echo out; echo err >&2; echo $GREETING in $(pwd); exit 7"]);
    let config = request.process.as_mut().unwrap();
    config.envs.insert("GREETING".into(), "hello".into());
    config.cwd = Some("/tmp".into());
    let done = agent.start_process(request).await.finish().await;
    assert_eq!(done.stdout, b"out\nhello in /tmp\n");
    assert_eq!(done.stderr, b"err\n");
    assert_eq!((done.end.exit_code, done.end.exited, done.end.status.as_str()), (7, true, "exit status 7"));
}

#[tokio::test]
async fn input_is_carried_and_closed() {
    let agent = Agent::start().await;
    let mut events = agent.start_process(start("/bin/cat", &[])).await;
    let pid = events.pid().await;
    for _ in 0..2 {
        let send = format!(r#"{{"process":{{"pid":{pid}}},"input":{{"stdin":"aGVsbG8="}}}}"#);
        assert_eq!(agent.json("/process.Process/SendInput", &send).await.0, StatusCode::OK);
    }
    let close = format!(r#"{{"process":{{"pid":{pid}}}}}"#);
    assert_eq!(agent.json("/process.Process/CloseStdin", &close).await.0, StatusCode::OK);
    let done = events.finish().await;
    assert_eq!((done.stdout.as_slice(), done.end.exit_code), (&b"hellohello"[..], 0));

    let gone = agent.json("/process.Process/SendInput", &format!(r#"{{"process":{{"pid":{pid}}}}}"#)).await;
    assert_eq!((gone.0, gone.1["code"].as_str()), (StatusCode::NOT_FOUND, Some("not_found")));
}

#[tokio::test]
async fn signals_lists_and_second_readers() {
    let agent = Agent::start().await;
    let mut request = start("/bin/sh", &["-c", "echo ready; exec sleep 1000"]);
    request.tag = Some("napper".into());
    let mut events = agent.start_process(request).await;
    let pid = events.pid().await;
    assert!(matches!(events.next().await, Ok(Event::Data(_))));

    let (_, list) = agent.json("/process.Process/List", "{}").await;
    assert_eq!(list["processes"][0]["pid"], pid);
    assert_eq!(list["processes"][0]["tag"], "napper");
    assert_eq!(list["processes"][0]["config"]["cmd"], "/bin/sh");

    let selector = process::ProcessSelector {
        selector: Some(process::process_selector::Selector::Tag("napper".into())),
    };
    let connect = process::ConnectRequest { process: Some(selector), ..Default::default() };
    let body = envelope::encode(0, &connect.encode_to_vec());
    let response = agent.call("/process.Process/Connect", "application/connect+proto", body).await;
    let mut second = Events { response, decoder: envelope::Decoder::default() };
    assert_eq!(second.pid().await, pid);

    let signal = r#"{"process":{"tag":"napper"},"signal":"SIGNAL_SIGTERM"}"#;
    assert_eq!(agent.json("/process.Process/SendSignal", signal).await.0, StatusCode::OK);
    for events in [events, second] {
        let end = events.finish().await.end;
        assert_eq!((end.exit_code, end.exited, end.status.as_str()), (-1, false, "signal: terminated"));
    }
    assert_eq!(agent.json("/process.Process/List", "{}").await.1, serde_json::json!({}));
}

#[tokio::test]
async fn a_grandchild_that_keeps_the_output_open_does_not_delay_the_end() {
    let agent = Agent::start().await;
    let done = agent.shell("sleep 1000 & echo $!").await.finish().await;
    assert_eq!(done.end.exit_code, 0);
    let pid: u32 = String::from_utf8(done.stdout).unwrap().trim().parse().unwrap();
    let killed = agent.shell(&format!("kill -9 {pid}")).await.finish().await;
    assert_eq!(killed.end.exit_code, 0, "the grandchild was still there");
}

#[tokio::test]
async fn what_is_printed_right_before_the_exit_is_never_lost() {
    let agent = std::sync::Arc::new(Agent::start().await);
    for _ in 0..40 {
        let runs = (0..8).map(|n| {
            let agent = std::sync::Arc::clone(&agent);
            // The grandchild keeps the pipes open, so that only the exit ends them.
            let script = format!("sleep 3 & echo {n} >&2; echo {n}");
            tokio::spawn(async move { (n, agent.shell(&script).await.finish().await) })
        });
        for run in runs.collect::<Vec<_>>() {
            let (n, done) = run.await.unwrap();
            let expected = format!("{n}\n").into_bytes();
            assert_eq!((done.stdout, done.stderr), (expected.clone(), expected));
        }
    }
}

#[tokio::test]
async fn all_output_arrives_however_slowly_it_is_read() {
    let agent = Agent::start().await;
    let mut events = agent.shell("head -c 20000000 /dev/zero; echo end").await;
    events.pid().await;
    // The pipe, the log and the socket fill up before anything is read.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let done = events.finish().await;
    assert_eq!(done.stdout.len(), 20_000_004);
    assert!(done.stdout.ends_with(b"end\n"));
}

#[tokio::test]
async fn a_deadline_kills_the_process() {
    let agent = Agent::start().await;
    let request = Request::post("/process.Process/Start")
        .header("host", "sandbox")
        .header("content-type", "application/connect+json")
        .header("connect-timeout-ms", "100")
        .body(Full::new(envelope::encode(0, br#"{"process":{"cmd":"sleep","args":["1000"]}}"#)))
        .unwrap();
    let body = body_of(agent.send(request).await).await;
    let text = String::from_utf8_lossy(&body);
    assert!(text.contains(r#"{"error":{"code":"deadline_exceeded""#), "{text}");
    let gone = async { while agent.json("/process.Process/List", "{}").await.1 != serde_json::json!({}) {} };
    tokio::time::timeout(DEADLINE, gone).await.expect("the process was killed");
}

#[tokio::test]
async fn the_deadline_holds_for_a_process_that_never_stops_printing() {
    let agent = Agent::start().await;
    let request = Request::post("/process.Process/Start")
        .header("host", "sandbox")
        .header("content-type", "application/connect+proto")
        .header("connect-timeout-ms", "200")
        .body(Full::new(envelope::encode(0, &start("yes", &[]).encode_to_vec())))
        .unwrap();
    let response = agent.send(request).await;
    let mut events = Events { response, decoder: envelope::Decoder::default() };
    let last = async {
        loop {
            match events.next().await {
                Ok(Event::End(end)) => return format!("{end:?}"),
                Ok(_) => {}
                Err(end) => return end,
            }
        }
    };
    let last = tokio::time::timeout(DEADLINE, last).await.expect("the process is killed");
    assert!(last.contains("deadline_exceeded"), "{last}");
}

#[tokio::test]
async fn the_deadline_holds_when_the_client_has_gone() {
    let agent = Agent::start().await;
    let request = Request::post("/process.Process/Start")
        .header("host", "sandbox")
        .header("content-type", "application/connect+proto")
        .header("connect-timeout-ms", "300")
        .body(Full::new(envelope::encode(0, &start("sleep", &["1000"]).encode_to_vec())))
        .unwrap();
    drop(agent.send(request).await);
    let gone = async { while agent.json("/process.Process/List", "{}").await.1 != serde_json::json!({}) {} };
    tokio::time::timeout(DEADLINE, gone).await.expect("the process was killed");
}

#[tokio::test]
async fn a_grandchild_that_writes_without_end_does_not_delay_the_end() {
    let agent = Agent::start().await;
    let mut finished = agent.shell("yes & echo $! >&2").await;
    let mut stderr = Vec::new();
    let end = async {
        loop {
            match finished.next().await.unwrap() {
                Event::Data(data) => {
                    if let Some(data_event::Output::Stderr(bytes)) = data.output {
                        stderr.extend_from_slice(&bytes);
                    }
                }
                Event::End(end) => return end,
                Event::Start(_) | Event::Keepalive(_) => {}
            }
        }
    };
    let end = tokio::time::timeout(DEADLINE, end).await.expect("an end");
    assert_eq!(end.exit_code, 0);
    let pid = String::from_utf8(stderr).unwrap();
    agent.shell(&format!("kill -9 {pid}")).await.finish().await;
}

#[tokio::test]
async fn input_that_nobody_reads_holds_up_neither_the_end_nor_a_close() {
    let agent = Agent::start().await;
    // The grandchild keeps the read end of the pipe open and reads nothing.
    let mut events = agent.shell("sleep 5 <&0 & sleep 0.2").await;
    let pid = events.pid().await;
    let input =
        process::ProcessInput { input: Some(process::process_input::Input::Stdin(vec![0; 200_000].into())) };
    let selector = process::ProcessSelector { selector: Some(process::process_selector::Selector::Pid(pid)) };
    let request = process::SendInputRequest { process: Some(selector), input: Some(input) }.encode_to_vec();
    let sending = agent.call("/process.Process/SendInput", "application/proto", request);
    let (sent, done) = tokio::join!(sending, events.finish());
    assert_eq!(done.end.exit_code, 0);
    assert_eq!(sent.status(), StatusCode::INTERNAL_SERVER_ERROR);
}

#[tokio::test]
async fn starts_that_cannot_be_say_why() {
    let agent = Agent::start().await;
    let refused = async |request: &str| {
        let body = envelope::encode(0, request.as_bytes());
        let response = agent.call("/process.Process/Start", "application/connect+json", body).await;
        assert_eq!(response.status(), StatusCode::OK);
        let body = body_of(response).await;
        assert_eq!(body[0], envelope::END_OF_STREAM);
        let end: serde_json::Value = serde_json::from_slice(&body[5..]).unwrap();
        let text = |name: &str| end["error"][name].as_str().unwrap().to_owned();
        (text("code"), text("message"))
    };
    let (code, message) = refused(r#"{"process":{"cmd":"/no/such"}}"#).await;
    assert_eq!(code, "invalid_argument");
    assert!(message.contains("error starting process '/no/such': No such file"), "{message}");
    let (code, message) = refused(r#"{"process":{"cmd":"ls","cwd":"/no/such"}}"#).await;
    assert_eq!((code.as_str(), message.as_str()), ("invalid_argument", "cwd '/no/such' does not exist"));
    assert_eq!(refused("{}").await.0, "invalid_argument");
    assert_eq!(refused("nonsense").await.0, "invalid_argument");
    assert_eq!(refused(r#"{"process":{"cmd":"ls","args":["a\u0000b"]}}"#).await.0, "invalid_argument");
}

#[tokio::test]
async fn files_go_up_and_down_whole() {
    let agent = Agent::start().await;
    let path = agent.path("deep/er/file");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let request = Request::post(format!("/files?path={path}"))
        .header("host", "sandbox")
        .header("content-type", "application/octet-stream")
        .body(Full::new(Bytes::from(content.clone())))
        .unwrap();
    let response = agent.send(request).await;
    assert_eq!(response.status(), StatusCode::OK);
    let written: serde_json::Value = serde_json::from_slice(&body_of(response).await).unwrap();
    assert_eq!(written, serde_json::json!([{ "path": path, "name": "file", "type": "file" }]));

    let get = |path: &str| {
        Request::builder()
            .method(Method::GET)
            .uri(format!("/files?path={path}"))
            .header("host", "sandbox")
            .body(Full::default())
            .unwrap()
    };
    let response = agent.send(get(&path)).await;
    assert_eq!(response.headers()["content-length"], "3000000");
    assert!(body_of(response).await == content);
    assert_eq!(agent.send(get(&agent.path("missing"))).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(agent.send(get(&agent.path("deep"))).await.status(), StatusCode::BAD_REQUEST);
    let left: Vec<_> = std::fs::read_dir(agent.path("deep/er")).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary file is left: {left:?}");
}

#[tokio::test]
async fn multipart_uploads_keep_the_directories_of_their_names() {
    let agent = Agent::start().await;
    let (one, two) = (agent.path("a/one"), agent.path("b/two"));
    let mut body = String::new();
    for (name, content) in [(&one, "first"), (&two, "second")] {
        body.push_str(&format!(
            "--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{content}\r\n"
        ));
    }
    body.push_str("--cut--\r\n");
    let response = agent.call("/files", "multipart/form-data; boundary=cut", body).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(std::fs::read_to_string(one).unwrap(), "first");
    assert_eq!(std::fs::read_to_string(two).unwrap(), "second");

    let large = "x".repeat(5 << 20);
    let path = agent.path("large");
    let body = format!(
        "--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{path}\"\r\n\r\n{large}\r\n--cut--\r\n"
    );
    let response = agent.call("/files", "multipart/form-data; boundary=cut", body).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(std::fs::metadata(path).unwrap().len(), 5 << 20);
}

#[tokio::test]
async fn the_filesystem_service_in_both_codecs() {
    let agent = Agent::start().await;
    let path = agent.path("folder");
    let (status, made) =
        agent.json("/filesystem.Filesystem/MakeDir", &format!(r#"{{"path":"{path}"}}"#)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(made["entry"]["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!(made["entry"]["permissions"], "drwxr-xr-x");
    let (status, again) =
        agent.json("/filesystem.Filesystem/MakeDir", &format!(r#"{{"path":"{path}"}}"#)).await;
    assert_eq!((status, again["code"].as_str()), (StatusCode::CONFLICT, Some("already_exists")));

    let request = filesystem::StatRequest { path: path.clone(), ..Default::default() }.encode_to_vec();
    let response = agent.call("/filesystem.Filesystem/Stat", "application/proto", request).await;
    let stat = filesystem::StatResponse::decode(body_of(response).await).unwrap();
    assert_eq!(stat.entry.unwrap().path, path);

    let moved = format!(r#"{{"source":"{path}","destination":"{}"}}"#, agent.path("x/moved"));
    assert_eq!(agent.json("/filesystem.Filesystem/Move", &moved).await.0, StatusCode::OK);
    let (_, list) =
        agent.json("/filesystem.Filesystem/ListDir", &format!(r#"{{"path":"{}"}}"#, agent.path("x"))).await;
    assert_eq!(list["entries"][0]["name"], "moved");
    let remove = format!(r#"{{"path":"{}"}}"#, agent.path("x"));
    for _ in 0..2 {
        assert_eq!(agent.json("/filesystem.Filesystem/Remove", &remove).await.0, StatusCode::OK);
    }
    let (status, missing) = agent.json("/filesystem.Filesystem/Stat", &remove).await;
    assert_eq!((status, missing["code"].as_str()), (StatusCode::NOT_FOUND, Some("not_found")));
}

#[tokio::test]
async fn users_and_what_is_not_served() {
    let agent = Agent::start().await;
    let health = Request::get("/health").header("host", "sandbox").body(Full::default()).unwrap();
    assert_eq!(agent.send(health).await.status(), StatusCode::NO_CONTENT);
    let request = Request::post("/filesystem.Filesystem/Stat")
        .header("host", "sandbox")
        .header("content-type", "application/json")
        .header("authorization", "Basic bm9zdWNodXNlcjo=")
        .body(Full::new(Bytes::from_static(b"{}")))
        .unwrap();
    let response = agent.send(request).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert!(String::from_utf8_lossy(&body_of(response).await).contains("invalid username: 'nosuchuser'"));
    // What the host alone may say is nowhere on this door.
    for path in ["/init", "/control", "/tiffin.control.v1.Control/Configure", "/freeze", "/shutdown"] {
        assert_eq!(
            agent.call(path, "application/json", "{}").await.status(),
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    let (status, unknown) = agent.json("/process.Process/NoSuch", "{}").await;
    assert_eq!((status, unknown["code"].as_str()), (StatusCode::NOT_IMPLEMENTED, Some("unimplemented")));
}

#[tokio::test]
async fn processes_end_with_the_agent() {
    let mut agent = Agent::start().await;
    let mut events = agent.shell("exec sleep 1000").await;
    let pid = rustix::process::Pid::from_raw(events.pid().await as i32).unwrap();
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    agent.child.kill().unwrap();
    let mut poll = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut poll, Some(&limit)).unwrap(), 1, "the process is still there");
}
