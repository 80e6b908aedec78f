//! Nothing is lost on reattach: replay, policies, and what is kept after the end, as a client sees them.

mod support;

use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::{self, OutputPolicy, Scope, StartOptions, StartRequest};
use http_body_util::BodyExt;
use support::{Agent, Events, eventually, is_running, start};

fn shell(script: &str, options: StartOptions) -> StartRequest {
    StartRequest { options: Some(options), ..start("/bin/sh", &["-c", script]) }
}

fn policy(policy: OutputPolicy, log_bytes: u32) -> StartOptions {
    StartOptions { output_policy: policy.into(), log_bytes, ..Default::default() }
}

async fn refused(events: Events) -> String {
    let error = events.rest().await.error.expect("an error");
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    format!("{}: {}", error["error"]["code"].as_str().unwrap(), error["error"]["message"].as_str().unwrap())
}

/// What the kernel has taken from a process so far.
fn written(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn a_client_that_went_away_comes_back_for_what_it_missed() {
    let agent = Agent::start().await;
    let mut events = agent.shell("echo first; read line; for n in $(seq 1 1000); do echo $n; done").await;
    let pid = events.pid().await;
    let seen = events.until("first\n").await;
    drop(events);
    // The process runs on while nobody is connected.
    agent.input(pid, process::process_input::Input::Stdin(b"\n"[..].into())).await.unwrap();
    eventually("its end", async || !is_running(pid)).await;
    let mut again = agent.connect(pid, Some(seen.len() as u64)).await;
    let begin = again.start().await;
    assert_eq!((begin.pid, begin.offset, begin.dropped_bytes), (pid, Some(6), 0));
    let rest = again.finish().await;
    let expected: String = (1..=1000).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8(rest.stdout).unwrap(), expected);
    assert_eq!((rest.dropped, rest.end.exit_code), (0, 0));
}

#[tokio::test]
async fn offsets_count_all_streams_in_the_order_of_their_arrival() {
    let agent = Agent::start().await;
    let mut events = agent.shell("echo out; sleep 0.1; echo err >&2; sleep 0.1; echo more; read line").await;
    let pid = events.pid().await;
    events.until("more\n").await;
    for (from, stdout, stderr) in
        [(0, "out\nmore\n", "err\n"), (2, "t\nmore\n", "err\n"), (6, "more\n", "r\n"), (13, "", "")]
    {
        let mut replay = agent.connect(pid, Some(from)).await;
        assert_eq!(replay.start().await.offset, Some(from));
        let (mut out, mut err) = (String::new(), String::new());
        while out.len() + err.len() < stdout.len() + stderr.len() {
            let Event::Data(data) = replay.next().await.unwrap() else { panic!("no data") };
            match data.output.unwrap() {
                data_event::Output::Stdout(bytes) => out.push_str(std::str::from_utf8(&bytes).unwrap()),
                data_event::Output::Stderr(bytes) => err.push_str(std::str::from_utf8(&bytes).unwrap()),
                data_event::Output::Pty(_) => panic!("no terminal was asked for"),
            }
        }
        assert_eq!((out.as_str(), err.as_str()), (stdout, stderr), "from {from}");
    }
    let mut plain = agent.connect(pid, None).await;
    assert_eq!(plain.start().await, process::process_event::StartEvent { pid, ..Default::default() });
    let text = refused(agent.connect(pid, Some(14)).await).await;
    assert!(text.starts_with("invalid_argument: ") && text.contains("13 bytes"), "{text}");
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    let after = plain.finish().await;
    assert!(after.stdout.is_empty() && after.stderr.is_empty(), "nothing from before");
    events.finish().await;
}

#[tokio::test]
async fn what_the_log_could_not_keep_is_counted() {
    let agent = Agent::start().await;
    let request = shell("seq 1 100000; read line", policy(OutputPolicy::Unspecified, 4096));
    let mut events = agent.start_process(request).await;
    let pid = events.pid().await;
    let whole = events.until("\n100000\n").await;
    assert_eq!(whole.len(), 588_895);
    let body = format!(r#"{{"process":{{"pid":{pid}}},"fromOffset":"100"}}"#);
    let body = envd_channel::envelope::encode(0, body.as_bytes());
    let mut response = agent.call("/process.Process/Connect", "application/connect+json", body).await;
    let mut decoder = envd_channel::envelope::Decoder::default();
    let first = loop {
        if let Some(envelope) = decoder.envelope().unwrap() {
            break serde_json::from_slice::<serde_json::Value>(&envelope.message).unwrap();
        }
        decoder.push(&response.frame().await.unwrap().unwrap().into_data().unwrap());
    };
    let begin = &first["event"]["start"];
    let number = |name: &str| begin[name].as_str().unwrap().parse::<u64>().unwrap();
    assert_eq!((begin["pid"].as_u64(), number("offset")), (Some(pid.into()), 100 + number("droppedBytes")));
    assert!(number("offset") >= 588_895 - 4096, "{begin}");
    let mut replay = agent.connect(pid, Some(100)).await;
    assert_eq!(replay.start().await.offset, Some(number("offset")));
    let kept = replay.until("\n100000\n").await;
    assert_eq!(kept, whole[number("offset") as usize..]);
    assert!(kept.len() > 1000, "{}", kept.len());
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    assert_eq!(events.finish().await.dropped, 0);
}

#[tokio::test]
async fn ends_are_kept_as_long_as_it_was_asked_for() {
    let agent = Agent::start().await;
    let mut events = agent.shell("echo kept; exit 3").await;
    let pid = events.pid().await;
    events.finish().await;
    let without = agent.connect(pid, None).await.finish().await;
    assert_eq!((without.stdout.as_slice(), without.end.exit_code), (&b""[..], 3));
    let with = agent.connect(pid, Some(0)).await.finish().await;
    assert_eq!((with.stdout.as_slice(), with.end.exit_code), (&b"kept\n"[..], 3));

    let options = StartOptions { keep_ended_seconds: Some(0), ..Default::default() };
    let mut events = agent.start_process(shell("exit 3", options)).await;
    let pid = events.pid().await;
    events.finish().await;
    eventually("forgotten", async || agent.connect(pid, None).await.next().await.is_err()).await;
    let text = refused(agent.connect(pid, None).await).await;
    assert_eq!(text, format!("not_found: process with pid {pid} not found"));
}

#[tokio::test]
async fn a_dead_reader_blocks_neither_the_process_nor_the_others() {
    let agent = Agent::start().await;
    // Half of the log is more than the sockets hold, so the dead one cannot get far ahead of the other at the beginning.
    let request = shell("read line; head -c 30000000 /dev/zero", policy(OutputPolicy::Unspecified, 8 << 20));
    let mut events = agent.start_process(request).await;
    let pid = events.pid().await;
    let dead = agent.connect(pid, Some(0)).await;
    agent.input(pid, process::process_input::Input::Stdin(b"\n"[..].into())).await.unwrap();
    let quick = events.finish().await;
    assert_eq!((quick.stdout.len(), quick.dropped), (30_000_000, 0));
    let late = dead.finish().await;
    assert!(late.dropped > 0);
    assert_eq!(late.stdout.len() as u64 + late.dropped, 30_000_000);
}

#[tokio::test]
async fn a_process_that_drops_never_waits() {
    let agent = Agent::start().await;
    let mut events =
        agent.start_process(shell("head -c 30000000 /dev/zero", policy(OutputPolicy::Drop, 65536))).await;
    let pid = events.pid().await;
    eventually("the end, though nobody reads", async || !is_running(pid)).await;
    let done = events.finish().await;
    assert!(done.dropped > 0);
    assert_eq!(done.stdout.len() as u64 + done.dropped, 30_000_000);
}

#[tokio::test]
async fn a_process_that_blocks_waits_for_a_reader_and_loses_nothing() {
    let agent = Agent::start().await;
    let mut events = agent
        .start_process(shell("exec head -c 30000000 /dev/zero", policy(OutputPolicy::Block, 8 << 20)))
        .await;
    let pid = events.pid().await;
    drop(events);
    // What was sent to the first client, who did not take it, is kept all the same.
    eventually("a full log", async || written(pid) >= 8_000_000).await;
    assert!(is_running(pid));
    let mut reader = agent.connect(pid, Some(0)).await;
    let begin = reader.start().await;
    assert_eq!((begin.offset, begin.dropped_bytes), (Some(0), 0));
    let done = reader.finish().await;
    assert_eq!((done.stdout.len(), done.dropped, done.end.exit_code), (30_000_000, 0, 0));
}

#[tokio::test]
async fn a_kill_ends_a_process_that_blocks() {
    let agent = Agent::start().await;
    let request = shell("exec yes", policy(OutputPolicy::Block, 4 << 20));
    let mut events = agent.start_process(request.clone()).await;
    let pid = events.pid().await;
    drop(events);
    eventually("a full log", async || written(pid) >= 4_000_000).await;
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    eventually("its end is told", async || {
        agent.json("/process.Process/List", "{}").await.1 == serde_json::json!({})
    })
    .await;
    let done = agent.connect(pid, Some(0)).await.finish().await;
    assert_eq!((done.end.status.as_str(), done.dropped), ("signal: killed", 0));
    assert!(done.stdout.len() >= 4_000_000 && done.stdout.starts_with(b"y\ny\n"));

    let mut events = agent.stream("Start", &request, &[("connect-timeout-ms", "300")]).await;
    let pid = events.pid().await;
    drop(events);
    eventually("its deadline", async || !is_running(pid)).await;
}
