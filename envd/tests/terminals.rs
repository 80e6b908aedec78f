//! Processes on a terminal, as a client sees them.

mod support;

use bytes::Bytes;
use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::process_input::Input;
use envd_proto::process::pty::Size;
use envd_proto::process::{self, Pty, Scope, StartRequest};
use support::{Agent, Events, by_pid, eventually, is_running, start};

fn on_terminal(command: &str, arguments: &[&str], cols: u32, rows: u32) -> StartRequest {
    StartRequest { pty: Some(Pty { size: Some(Size { cols, rows }) }), ..start(command, arguments) }
}

async fn shell(agent: &Agent, script: &str) -> Events {
    agent.start_process(on_terminal("/bin/sh", &["-c", script], 0, 0)).await
}

async fn type_in(agent: &Agent, pid: u32, text: &str) {
    agent.input(pid, Input::Pty(Bytes::copy_from_slice(text.as_bytes()))).await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_its_size_its_names_and_a_session() {
    let agent = Agent::start().await;
    let mut request = on_terminal(
        "/bin/sh",
        &["-c", "stty size; echo $TERM $LANG $LC_ALL; tty; ps -o tpgid= -p $$; echo $$"],
        132,
        43,
    );
    let done = agent.start_process(request.clone()).await.finish().await;
    let text = String::from_utf8(done.pty).unwrap();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(lines[..2], ["43 132", "xterm-256color C.UTF-8 C.UTF-8"]);
    assert!(lines[2].starts_with("/dev/pts/"), "{text}");
    assert_eq!(lines[3], lines[4], "it is in the terminal's foreground");
    assert!(done.stdout.is_empty() && done.stderr.is_empty());

    request.process.as_mut().unwrap().envs.insert("TERM".into(), "dumb".into());
    let done = agent.start_process(request).await.finish().await;
    assert!(String::from_utf8(done.pty).unwrap().contains("dumb C.UTF-8"));
    let done = shell(&agent, "stty size").await.finish().await;
    assert_eq!(done.pty, b"24 80\r\n");
}

#[tokio::test]
async fn a_terminal_can_be_resized() {
    let agent = Agent::start().await;
    let mut events = shell(&agent, "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done").await;
    let pid = events.pid().await;
    events.until("ready").await;
    let update = |cols, rows| process::UpdateRequest {
        process: by_pid(pid),
        pty: Some(Pty { size: Some(Size { cols, rows }) }),
    };
    agent.proto::<_, process::UpdateResponse>("Update", &update(100, 50)).await.unwrap();
    events.until("50 100").await;
    let body = format!(r#"{{"process":{{"pid":{pid}}},"pty":{{"size":{{"cols":7,"rows":9}}}}}}"#);
    assert_eq!(agent.json("/process.Process/Update", &body).await.1, serde_json::json!({}));
    events.until("9 7").await;
    let refused = agent.proto::<_, process::UpdateResponse>("Update", &update(70_000, 1)).await.unwrap_err();
    assert_eq!(refused.0, "invalid_argument");
    agent.signal(pid, 9, Scope::Process).await.unwrap();
    events.finish().await;
}

#[tokio::test]
async fn bash_is_interactive_with_job_control() {
    let agent = Agent::start().await;
    let mut request = on_terminal("/bin/bash", &["--norc", "--noprofile", "-i"], 80, 24);
    request.process.as_mut().unwrap().envs.insert("PS1".into(), "prompt$ ".into());
    let mut events = agent.start_process(request).await;
    let pid = events.pid().await;
    events.until("prompt$ ").await;
    type_in(&agent, pid, "sleep 100\n").await;
    let sleeping = async || {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let child = children.split_whitespace().next().map(|child| child.parse::<u32>().unwrap());
        child.filter(|child| {
            std::fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|comm| comm == "sleep\n")
        })
    };
    eventually("sleep runs", async || sleeping().await.is_some()).await;
    type_in(&agent, pid, "\x1a").await;
    events.until("Stopped").await;
    type_in(&agent, pid, "jobs\n").await;
    events.until("sleep 100").await;
    type_in(&agent, pid, "fg\n").await;
    events.until("sleep 100\r\n").await;
    let child = sleeping().await.unwrap();
    eventually("sleep goes on in the foreground", async || {
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        status.lines().any(|line| line.starts_with("State:") && line.contains('S'))
    })
    .await;
    type_in(&agent, pid, "\x03").await;
    events.until("^C").await;
    type_in(&agent, pid, "echo code $?\n").await;
    events.until("code 130").await;
    type_in(&agent, pid, "exit 5\n").await;
    assert_eq!(events.finish().await.end.status, "exit status 5");
}

#[tokio::test]
async fn all_bytes_pass_a_raw_terminal() {
    let agent = Agent::start().await;
    let mut events = shell(&agent, "stty raw -echo; echo ready; exec head -c 256000").await;
    let pid = events.pid().await;
    events.until("ready").await;
    let bytes: Vec<u8> = (0..=255).cycle().take(256_000).collect();
    let typing = async {
        for piece in bytes.chunks(50_000) {
            agent.input(pid, Input::Pty(Bytes::copy_from_slice(piece))).await.unwrap();
        }
    };
    let (done, ()) = tokio::join!(events.finish(), typing);
    // What stands before is the end of the line that "ready" stood on.
    let rest = done.pty.strip_prefix(b"\n").unwrap_or(&done.pty);
    assert!(rest == bytes, "{} of {} bytes", rest.len(), bytes.len());
}

#[tokio::test]
async fn the_output_before_the_exit_is_never_lost_and_comes_in_small_chunks() {
    let agent = Agent::start().await;
    for n in 0..100 {
        // Also with a grandchild that keeps the terminal open.
        let script = format!(
            "{} echo {n}; seq 1 20; echo end",
            if n % 2 == 0 { "" } else { "(trap '' HUP; sleep 1000) &" }
        );
        let done = shell(&agent, &script).await.finish().await;
        let expected: String = [n.to_string()]
            .into_iter()
            .chain((1..=20).map(|n| n.to_string()))
            .chain(["end".into()])
            .map(|line| line + "\r\n")
            .collect();
        assert_eq!(String::from_utf8_lossy(&done.pty), expected);
    }
    let mut events = shell(&agent, "head -c 1000000 /dev/zero").await;
    let mut total = 0;
    loop {
        match events.next().await {
            Ok(Event::Data(data)) => {
                let Some(data_event::Output::Pty(bytes)) = data.output else { panic!("{data:?}") };
                assert!(bytes.len() <= 16 << 10);
                total += bytes.len();
            }
            Ok(_) => {}
            Err(end) => break assert_eq!(end, "{}"),
        }
    }
    assert_eq!(total, 1_000_000);
}

#[tokio::test]
async fn what_still_has_the_terminal_at_the_end_is_hung_up() {
    let agent = Agent::start().await;
    // In a session of its own, so that only the terminal itself can end it: a write to it fails, or a read ends.
    let mut events = shell(&agent, "setsid cat </dev/tty >/dev/null & echo $!; read line").await;
    let pid = events.pid().await;
    let grandchild: u32 = events.until("\n").await.trim().parse().unwrap();
    assert!(is_running(grandchild));
    type_in(&agent, pid, "\n").await;
    events.finish().await;
    eventually("the grandchild's end", async || !is_running(grandchild)).await;
}

#[tokio::test]
async fn a_terminals_input_is_the_terminals() {
    let agent = Agent::start().await;
    let mut events = agent.start_process(on_terminal("cat", &[], 0, 0)).await;
    let pid = events.pid().await;
    let close = process::CloseStdinRequest { process: by_pid(pid) };
    for _ in 0..2 {
        let refused = agent.proto::<_, process::CloseStdinResponse>("CloseStdin", &close).await.unwrap_err();
        assert_eq!(refused.0, "unknown");
    }
    let refused = agent.input(pid, Input::Stdin(Bytes::from_static(b"x"))).await.unwrap_err();
    assert!(refused.0 == "internal" && refused.1.contains("'pty'"), "{refused:?}");
    type_in(&agent, pid, "hello\n").await;
    assert!(events.until("hello\r\nhello\r\n").await.starts_with("hello"));
    type_in(&agent, pid, "\x04").await;
    assert_eq!(events.finish().await.end.status, "exit status 0");
    let text =
        format!("{:?}", agent.start_process(on_terminal("cat", &[], 1, 1 << 20)).await.rest().await.error);
    assert!(text.contains("invalid_argument"), "{text}");
}
