//! `process.Process` over a Unix socket: signals, inputs, options, environments and bounds, as a client sees them.

mod support;

use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::process::process_event::Event;
use envd_proto::process::process_input::Input;
use envd_proto::process::stream_input_request as stream_input;
use envd_proto::process::{self, Rlimit, Scope, StartOptions, StreamInputRequest};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::{Request, StatusCode};
use http_body_util::StreamBody;
use hyper::body::Frame;
use prost::Message;
use serde::Serialize;
use support::{Agent, DEADLINE, Events, body_of, by_pid, eventually, is_running, start};

fn with_options(command: &str, arguments: &[&str], options: StartOptions) -> process::StartRequest {
    process::StartRequest { options: Some(options), ..start(command, arguments) }
}

fn code<T>(result: Result<T, (String, String)>) -> String {
    result.err().map(|(code, _)| code).unwrap_or_default()
}

/// The error of a stream that never began, as `code: message`.
async fn refused(events: Events) -> String {
    let error = events.rest().await.error.expect("an error");
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    format!("{}: {}", error["error"]["code"].as_str().unwrap(), error["error"]["message"].as_str().unwrap())
}

#[tokio::test]
async fn every_signal_goes_by_number_and_by_name() {
    let agent = Agent::start().await;
    for number in 1..=64 {
        let mut events = agent.start_process(start("sleep", &["1000"])).await;
        let pid = events.pid().await;
        let name = process::Signal::try_from(number).unwrap().as_str_name();
        let by_name = format!(r#"{{"process":{{"pid":{pid}}},"signal":"{name}"}}"#);
        let by_number = format!(r#"{{"process":{{"pid":{pid}}},"signal":{number}}}"#);
        for body in if number % 2 == 0 { [&by_name, &by_number] } else { [&by_number, &by_name] } {
            let (status, answer) = agent.json("/process.Process/SendSignal", body).await;
            // The first one may have ended it before the second one.
            assert!(status == StatusCode::OK || answer["code"] == "not_found", "{body}: {answer}");
        }
        match number {
            // By default these stop a process or do nothing (signal(7)).
            17..=23 | 28 => agent.signal(pid, 9, Scope::Process).await.unwrap(),
            _ => {}
        }
        let end = events.finish().await.end;
        let expected = match number {
            1 => "signal: hangup".into(),
            9 | 17..=23 | 28 => "signal: killed".into(),
            15 => "signal: terminated".into(),
            31 => "signal: bad system call".into(),
            32.. => format!("signal: signal {number}"),
            _ => end.status.clone(),
        };
        // A core file adds nothing to the words.
        assert_eq!((end.exit_code, end.exited, &end.status), (-1, false, &expected), "{name}");
        assert_eq!(end.error.as_ref(), Some(&expected));
    }
}

#[tokio::test]
async fn signals_that_do_not_exist_are_refused() {
    let agent = Agent::start().await;
    let mut events = agent.start_process(start("sleep", &["1000"])).await;
    let pid = events.pid().await;
    for signal in [0, 65, -1, i32::MAX] {
        assert_eq!(code(agent.signal(pid, signal, Scope::Process).await), "invalid_argument", "{signal}");
    }
    for body in [
        format!(r#"{{"process":{{"pid":{pid}}}}}"#),
        format!(r#"{{"process":{{"pid":{pid}}},"signal":65}}"#),
        format!(r#"{{"process":{{"pid":{pid}}},"signal":"SIGNAL_SIGNOSUCH"}}"#),
        format!(r#"{{"process":{{"pid":{pid}}},"signal":9,"scope":9}}"#),
        r#"{"signal":9}"#.to_owned(),
    ] {
        let (status, answer) = agent.json("/process.Process/SendSignal", &body).await;
        assert_eq!(
            (status, answer["code"].as_str()),
            (StatusCode::BAD_REQUEST, Some("invalid_argument")),
            "{body}"
        );
    }
    let missing = agent.signal(4_000_000_000, 9, Scope::Process).await.unwrap_err();
    assert_eq!(missing, ("not_found".into(), "process with pid 4000000000 not found".into()));
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
}

/// A shell with a child in its group, and one that has left group and session; their pids.
async fn family(agent: &Agent) -> (Events, u32, [u32; 2]) {
    let mut events = agent.shell("sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait; wait").await;
    let pid = events.pid().await;
    let mut text = String::new();
    while text.lines().count() < 2 {
        text.push_str(&events.until("\n").await);
    }
    let pids: Vec<u32> = text.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    let left = pids[1];
    // The second one is in a session of its own only when setsid has run.
    eventually("a session of its own", async || {
        let stat = std::fs::read_to_string(format!("/proc/{left}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.split(' ').nth(3) == Some(&left.to_string())
    })
    .await;
    (events, pid, [pids[0], left])
}

#[tokio::test]
async fn a_kill_reaches_the_process_its_group_or_its_tree() {
    let agent = Agent::start().await;

    let (events, pid, children) = family(&agent).await;
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    assert_eq!(events.finish().await.end.status, "signal: killed");
    assert!(children.into_iter().all(is_running));
    for child in children {
        agent.shell(&format!("kill -9 {child}")).await.finish().await;
    }

    let (events, pid, [in_group, left]) = family(&agent).await;
    agent.signal(pid, 15, Scope::Group).await.unwrap();
    assert_eq!(events.finish().await.end.status, "signal: terminated");
    eventually("the group's end", async || !is_running(in_group)).await;
    assert!(is_running(left));
    agent.shell(&format!("kill -9 {left}")).await.finish().await;

    for signal in [15, 9] {
        let (events, pid, children) = family(&agent).await;
        agent.signal(pid, signal, Scope::Tree).await.unwrap();
        assert!(!events.finish().await.end.exited);
        eventually("the tree's end", async || !children.into_iter().any(is_running)).await;
    }
}

/// The answer to a StreamInput whose messages arrive one by one, with no length told before.
async fn stream_input(
    agent: &Agent,
    json: bool,
    messages: &[StreamInputRequest],
) -> (u8, Vec<u8>, serde_json::Value) {
    let encoded: Vec<Bytes> = messages
        .iter()
        .map(|message| if json { to_json(message) } else { message.encode_to_vec() })
        .map(|message| envelope::encode(0, &message))
        .collect();
    // Cut where no message ends, as a network may do.
    let pieces: Vec<Bytes> = encoded.concat().chunks(7).map(Bytes::copy_from_slice).collect();
    let frames = futures::stream::iter(pieces.into_iter().map(|piece| Ok(Frame::data(piece))));
    let kind = if json { "application/connect+json" } else { "application/connect+proto" };
    let request = Request::post("/process.Process/StreamInput")
        .header("host", "sandbox")
        .header("content-type", kind)
        .body(StreamBody::new(frames))
        .unwrap();
    let response = agent.send(request).await;
    assert_eq!(
        (response.status(), &response.headers()["content-type"]),
        (StatusCode::OK, &kind.parse().unwrap())
    );
    let mut decoder = envelope::Decoder::default();
    decoder.push(&body_of(response).await);
    let (mut count, mut last) = (0, Vec::new());
    loop {
        let envelope = decoder.envelope().unwrap().expect("an end frame");
        if envelope.end {
            assert!(decoder.is_empty());
            return (count, last, serde_json::from_slice(&envelope.message).unwrap());
        }
        count += 1;
        last = envelope.message.to_vec();
    }
}

fn to_json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap()
}

fn input_event(event: stream_input::Event) -> StreamInputRequest {
    StreamInputRequest { event: Some(event) }
}

fn input_start(pid: u32) -> StreamInputRequest {
    input_event(stream_input::Event::Start(stream_input::StartEvent { process: by_pid(pid) }))
}

fn input_data(input: Input) -> StreamInputRequest {
    let input = Some(process::ProcessInput { input: Some(input) });
    input_event(stream_input::Event::Data(stream_input::DataEvent { input }))
}

#[tokio::test]
async fn a_stream_of_input_is_answered_with_one_message_and_an_end() {
    let agent = Agent::start().await;
    for json in [true, false] {
        let mut events = agent.start_process(start("cat", &[])).await;
        let pid = events.pid().await;
        let messages = [
            input_start(pid),
            input_data(Input::Stdin(Bytes::from_static(b"one "))),
            input_event(stream_input::Event::Keepalive(stream_input::KeepAlive {})),
            input_data(Input::Stdin(vec![b'x'; 300_000].into())),
            input_data(Input::Stdin(Bytes::from_static(b" two"))),
        ];
        let (count, message, end) = stream_input(&agent, json, &messages).await;
        assert_eq!((count, end), (1, serde_json::json!({})));
        assert_eq!(message, if json { b"{}".to_vec() } else { Vec::new() });
        let close = process::CloseStdinRequest { process: by_pid(pid) };
        agent.proto::<_, process::CloseStdinResponse>("CloseStdin", &close).await.unwrap();
        let done = events.finish().await;
        assert_eq!(done.stdout, [&b"one "[..], &[b'x'; 300_000], b" two"].concat());
    }
}

#[tokio::test]
async fn a_stream_of_input_that_makes_no_sense_is_an_error_in_its_end() {
    let agent = Agent::start().await;
    let mut events = agent.start_process(start("cat", &[])).await;
    let pid = events.pid().await;
    let stdin = || input_data(Input::Stdin(Bytes::from_static(b"x")));
    for (messages, code) in [
        (vec![stdin()], "invalid_argument"),
        (vec![], "invalid_argument"),
        (vec![input_start(pid), input_start(pid)], "invalid_argument"),
        (vec![input_start(pid), StreamInputRequest::default()], "invalid_argument"),
        (vec![input_start(4_000_000_000)], "not_found"),
        (vec![input_start(pid), input_data(Input::Pty(Bytes::from_static(b"x")))], "internal"),
    ] {
        for json in [true, false] {
            let (count, _, end) = stream_input(&agent, json, &messages).await;
            assert_eq!((count, end["error"]["code"].as_str()), (0, Some(code)), "{messages:?}");
        }
    }
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
}

#[tokio::test]
async fn an_input_can_be_closed_twice() {
    let agent = Agent::start().await;
    let mut events = agent.shell("cat; exec sleep 1000").await;
    let pid = events.pid().await;
    let close = process::CloseStdinRequest { process: by_pid(pid) };
    for _ in 0..2 {
        agent.proto::<_, process::CloseStdinResponse>("CloseStdin", &close).await.unwrap();
    }
    let closed = agent.input(pid, Input::Stdin(Bytes::from_static(b"x"))).await.unwrap_err();
    assert_eq!(closed, ("internal".into(), "stdin not enabled or closed".into()));
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
}

#[tokio::test]
async fn input_where_there_is_none_is_an_error() {
    let agent = Agent::start().await;
    let mut events =
        agent.start_process(process::StartRequest { stdin: Some(false), ..start("sleep", &["1000"]) }).await;
    let pid = events.pid().await;
    let stdin = || Input::Stdin(Bytes::from_static(b"x"));
    let refused = agent.input(pid, stdin()).await.unwrap_err();
    assert_eq!(refused, ("internal".into(), "stdin not enabled or closed".into()));
    let pty = agent.input(pid, Input::Pty(Bytes::from_static(b"x"))).await.unwrap_err();
    assert_eq!(pty.0, "internal");
    let size = Some(process::pty::Size { cols: 1, rows: 1 });
    let update = process::UpdateRequest { process: by_pid(pid), pty: Some(process::Pty { size }) };
    assert_eq!(code(agent.proto::<_, process::UpdateResponse>("Update", &update).await), "internal");
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
    assert_eq!(code(agent.input(pid, stdin()).await), "not_found");
}

#[tokio::test]
async fn the_newest_live_process_of_a_tag_is_meant() {
    let agent = Agent::start().await;
    let tagged = || process::StartRequest { tag: Some("same".into()), ..start("sleep", &["1000"]) };
    let (mut old, mut new) = (agent.start_process(tagged()).await, agent.start_process(tagged()).await);
    let (old_pid, new_pid) = (old.pid().await, new.pid().await);
    let (_, list) = agent.json("/process.Process/List", "{}").await;
    let tags: Vec<_> = list["processes"].as_array().unwrap().iter().map(|entry| &entry["tag"]).collect();
    assert_eq!(tags, ["same", "same"]);
    let kill = r#"{"process":{"tag":"same"},"signal":9}"#;
    for (events, pid) in [(new, new_pid), (old, old_pid)] {
        let body = r#"{"process":{"tag":"same"}}"#;
        let response = agent
            .call(
                "/process.Process/Connect",
                "application/connect+json",
                envelope::encode(0, body.as_bytes()),
            )
            .await;
        assert_eq!(agent.json("/process.Process/SendSignal", kill).await.0, StatusCode::OK);
        let connected = String::from_utf8(body_of(response).await.to_vec()).unwrap();
        assert!(connected.contains(&format!(r#"{{"start":{{"pid":{pid}}}}}"#)), "{connected}");
        events.finish().await;
    }
    let (status, gone) = agent.json("/process.Process/SendSignal", kill).await;
    assert_eq!((status, gone["code"].as_str()), (StatusCode::NOT_FOUND, Some("not_found")));
}

#[tokio::test]
async fn the_list_shows_configs_as_they_were_sent() {
    let agent = Agent::start().await;
    let config = r#"{"cmd":"sleep","args":["1000"],"envs":{"A":"1"},"cwd":"/tmp"}"#;
    let body = envelope::encode(0, format!(r#"{{"process":{config}}}"#).as_bytes());
    let response = agent.call("/process.Process/Start", "application/connect+json", body).await;
    let (_, list) = agent.json("/process.Process/List", "{}").await;
    let listed = &list["processes"][0];
    assert_eq!(listed["config"], serde_json::from_str::<serde_json::Value>(config).unwrap());
    assert_eq!(listed.get("tag"), None);
    agent.signal(listed["pid"].as_u64().unwrap() as u32, 9, Scope::Tree).await.unwrap();
    body_of(response).await;
}

#[tokio::test]
async fn limits_and_priorities_are_the_processs_own() {
    let agent = Agent::start().await;
    let script = "ulimit -Sn; ulimit -Hn; ulimit -Sc; nice; cat /proc/self/oom_score_adj";
    let limit = |resource: &str, soft, hard| Rlimit { resource: resource.into(), soft, hard };
    let options = StartOptions {
        rlimits: vec![limit("nofile", Some(77), Some(99)), limit("RLIMIT_CORE", Some(0), Some(0))],
        nice: Some(7),
        oom_score_adj: Some(300),
        ..Default::default()
    };
    let done = agent.start_process(with_options("sh", &["-c", script], options)).await.finish().await;
    assert_eq!(String::from_utf8_lossy(&done.stdout), "77\n99\n0\n7\n300\n");
    let done = agent.shell("cat /proc/self/oom_score_adj").await.finish().await;
    assert_eq!(done.stdout, b"100\n");

    for options in [
        StartOptions { rlimits: vec![limit("files", Some(1), Some(1))], ..Default::default() },
        StartOptions { nice: Some(20), ..Default::default() },
        StartOptions { oom_score_adj: Some(-1000), ..Default::default() },
        StartOptions { log_bytes: 1, ..Default::default() },
        StartOptions { keep_ended_seconds: Some(100_000), ..Default::default() },
    ] {
        let text = refused(agent.start_process(with_options("true", &[], options)).await).await;
        assert!(text.starts_with("invalid_argument: "), "{text}");
    }
    // No process can have more open files than the kernel has at all.
    let options = StartOptions { rlimits: vec![limit("nofile", None, None)], ..Default::default() };
    let text = refused(agent.start_process(with_options("true", &[], options)).await).await;
    assert!(text.starts_with("permission_denied: ") && text.contains("limits"), "{text}");
    let options = StartOptions { own_cgroup: true, ..Default::default() };
    let text = refused(agent.start_process(with_options("true", &[], options)).await).await;
    assert!(text.starts_with("failed_precondition: "), "{text}");
}

#[tokio::test]
async fn the_environment_is_the_users_then_the_calls() {
    let agent = Agent::start().await;
    let mut request = start("env", &[]);
    let envs = &mut request.process.as_mut().unwrap().envs;
    envs.insert("LOGNAME".into(), "else".into());
    envs.insert("MORE".into(), "a=b".into());
    let done = agent.start_process(request).await.finish().await;
    let text = String::from_utf8(done.stdout).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    let expected = [
        "HOME=/root",
        "LOGNAME=else",
        "MORE=a=b",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "USER=root",
    ];
    assert_eq!(lines, expected);
    let done = agent.shell("pwd").await.finish().await;
    assert_eq!(done.stdout, b"/root\n");
}

#[tokio::test]
async fn a_user_comes_with_its_groups() {
    let agent = Agent::start().await;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can start processes of other users");
        return;
    }
    let expected = std::process::Command::new("id").args(["-G", "nobody"]).output().unwrap().stdout;
    // "nobody:" and no password.
    let headers = [("authorization", "Basic bm9ib2R5Og==")];
    let mut request = start("sh", &["-c", "id -G; id -un"]);
    request.process.as_mut().unwrap().cwd = Some("/".into());
    let done = agent.stream("Start", &request, &headers).await.finish().await;
    assert_eq!(done.stdout, [expected, b"nobody\n".to_vec()].concat());
}

#[tokio::test]
async fn a_quiet_process_is_heard_of_as_often_as_the_client_wants() {
    let agent = Agent::start().await;
    let headers = [("keepalive-ping-interval", "1")];
    let mut events = agent.stream("Start", &start("sleep", &["1000"]), &headers).await;
    let pid = events.pid().await;
    assert!(matches!(events.next().await, Ok(Event::Keepalive(_))));
    let text =
        refused(agent.stream("Start", &start("true", &[]), &[("keepalive-ping-interval", "0")]).await).await;
    assert!(text.starts_with("invalid_argument: "), "{text}");
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
}

#[tokio::test]
async fn the_timeout_of_a_connect_is_not_the_processs() {
    let agent = Agent::start().await;
    for command in ["sleep 1000", "yes"] {
        let mut events = agent.shell(&format!("exec {command}")).await;
        let pid = events.pid().await;
        let connect = process::ConnectRequest { process: by_pid(pid), from_offset: None };
        let connected = agent.stream("Connect", &connect, &[("connect-timeout-ms", "100")]).await;
        assert!(connected.rest().await.error.unwrap().contains("deadline_exceeded"));
        assert!(is_running(pid));
        agent.signal(pid, 9, Scope::Process).await.unwrap();
        assert_eq!(events.finish().await.end.status, "signal: killed");
    }
}

#[tokio::test]
async fn an_image_without_bash_runs_its_sh_and_says_so_once() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can take a bash away");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for program in ["dash", "echo", "cat"] {
        std::fs::copy(format!("/bin/{program}"), bin.join(program)).unwrap();
    }
    std::os::unix::fs::symlink("dash", bin.join("sh")).unwrap();
    let log = folder.path().join("log");
    // /bin of the agent has no bash, in a mount namespace of its own.
    let agent = Agent::command(folder.path());
    let mut command = std::process::Command::new("unshare");
    let hide = r#"mount --bind "$0" "$(readlink -f /bin)" && exec "$@""#;
    command
        .args(["--mount", "/bin/sh", "-c", hide])
        .arg(&bin)
        .arg(agent.get_program())
        .args(agent.get_args());
    command.stdin(std::process::Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let agent = Agent::run(command, folder).await;
    for _ in 0..2 {
        let done = agent
            .start_process(start("/bin/bash", &["-l", "-c", "echo $0 $1", "a", "b"]))
            .await
            .finish()
            .await;
        assert_eq!(done.stdout, b"a b\n");
        let done =
            agent.start_process(start("/bin/bash", &["-c", "cat /proc/$$/cmdline"])).await.finish().await;
        assert_eq!(done.stdout, b"/bin/sh\0-c\0cat /proc/$$/cmdline\0");
    }
    for (command, arguments) in [
        ("/bin/bash", &["--norc", "-c", "echo"][..]),
        ("bash", &["-c", "echo"]),
        ("/bin/zsh", &["-c", "echo"]),
    ] {
        let text = refused(agent.start_process(start(command, arguments)).await).await;
        let expected = format!("invalid_argument: error starting process '{command}': No such file");
        assert!(text.starts_with(&expected), "{text}");
    }
    let told = std::fs::read_to_string(&log).unwrap();
    assert_eq!(told.matches("no /bin/bash").count(), 1, "{told}");
}

#[tokio::test]
async fn readers_and_writers_of_a_process_are_bounded() {
    let agent = Agent::start().await;
    let mut events = agent.start_process(start("sleep", &["1000"])).await;
    let pid = events.pid().await;
    let mut readers = Vec::new();
    for _ in 1..64 {
        let mut reader = agent.connect(pid, None).await;
        reader.pid().await;
        readers.push(reader);
    }
    let text = refused(agent.connect(pid, None).await).await;
    assert!(text.starts_with("resource_exhausted: "), "{text}");
    drop(readers);
    eventually("a place for a reader", async || agent.connect(pid, None).await.next().await.is_ok()).await;

    // Nobody reads the pipe, which holds a part of the first.
    let mut writes: FuturesUnordered<_> =
        (0..40).map(|_| agent.input(pid, Input::Stdin(vec![0; 100_000].into()))).collect();
    let results = async {
        let mut codes = Vec::new();
        while let Some(result) = writes.next().await {
            codes.push(code(result));
            if codes.len() == 24 {
                assert!(codes.iter().all(|code| code == "resource_exhausted"), "{codes:?}");
                agent.signal(pid, 9, Scope::Process).await.unwrap();
            }
        }
        codes
    };
    let codes = tokio::time::timeout(DEADLINE, results).await.expect("no write waits for a dead process");
    assert!(codes[24..].iter().all(|code| code == "internal"), "{codes:?}");
    assert_eq!(codes.len(), 40);
    events.finish().await;
}

#[tokio::test]
async fn ended_processes_that_are_kept_leave_room_for_new_ones() {
    let agent = Agent::start().await;
    // More than the table holds, and each would stay for an hour.
    let run = async || {
        let options = StartOptions { keep_ended_seconds: Some(3600), ..Default::default() };
        let mut events = agent.start_process(with_options("true", &[], options)).await;
        let pid = events.pid().await;
        assert_eq!(events.finish().await.end.exit_code, 0);
        pid
    };
    let first = run().await;
    let mut last = 0;
    for _ in 0..4100 / 10 {
        let batch = [(); 10].map(|()| run());
        last = *futures::future::join_all(batch).await.last().unwrap();
    }
    assert!(refused(agent.connect(first, None).await).await.starts_with("not_found: "));
    assert_eq!(agent.connect(last, Some(0)).await.finish().await.end.exit_code, 0);
}
