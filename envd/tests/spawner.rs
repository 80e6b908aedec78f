//! The spawner dies and is made again; what it had started is followed to its end.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use envd_channel::envelope;
use envd_proto::process;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use process::process_event::{EndEvent, Event, data_event};
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::UnixStream;

/// There only to catch a hang.
const DEADLINE: Duration = Duration::from_secs(60);

struct Agent {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("envd.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--no-container")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, folder };
        let listening = async {
            while UnixStream::connect(&socket).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, listening).await.expect("the agent listens");
        agent
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("envd.sock")
    }

    /// The agent's only child, of whichever of its threads.
    fn spawner(&self) -> Pid {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().flatten();
        let children =
            threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let children: String = children.collect();
        let pids: Vec<_> = children.split_whitespace().collect();
        assert_eq!(pids.len(), 1, "{children}");
        Pid::from_raw(pids[0].parse().unwrap()).unwrap()
    }

    async fn shell(&self, script: &str) -> Events {
        let config = process::ProcessConfig {
            cmd: "/bin/sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Default::default()
        };
        let start = process::StartRequest { process: Some(config), ..Default::default() };
        let request = Request::post("/process.Process/Start")
            .header("host", "sandbox")
            .header("content-type", "application/connect+proto")
            .body(Full::new(envelope::encode(0, &start.encode_to_vec())))
            .unwrap();
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let response = tokio::time::timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
        Events { body: response.into_body(), decoder: envelope::Decoder::default() }
    }
}

struct Events {
    body: Incoming,
    decoder: envelope::Decoder,
}

impl Events {
    /// The next event; `None` at the end of the stream, with what its trailer says.
    async fn next(&mut self) -> Result<Event, String> {
        loop {
            if let Some(envelope) = self.decoder.envelope().unwrap() {
                if envelope.end {
                    return Err(String::from_utf8_lossy(&envelope.message).into_owned());
                }
                let response = process::StartResponse::decode(envelope.message).unwrap();
                match response.event.and_then(|event| event.event) {
                    Some(Event::Keepalive(_)) | None => continue,
                    Some(event) => return Ok(event),
                }
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.expect("an event in time");
            let frame = frame.expect("a trailer before the end").unwrap();
            self.decoder.push(&frame.into_data().unwrap());
        }
    }

    async fn stdout(&mut self) -> String {
        match self.next().await {
            Ok(Event::Data(process::process_event::DataEvent {
                output: Some(data_event::Output::Stdout(bytes)),
                ..
            })) => String::from_utf8(bytes.to_vec()).unwrap(),
            other => panic!("expected output, got {other:?}"),
        }
    }

    async fn end(&mut self) -> EndEvent {
        match self.next().await {
            Ok(Event::End(end)) => end,
            other => panic!("expected the end, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_killed_spawner_is_made_again_and_ends_are_told_once() {
    let agent = Agent::start().await;
    for round in 0..3 {
        // It stays although its spawner dies, until it is killed itself.
        let mut killed = agent.shell("echo $$; exec sleep 1000").await;
        assert!(matches!(killed.next().await, Ok(Event::Start(_))));
        let pid: i32 = killed.stdout().await.trim().parse().unwrap();

        let spawner = agent.spawner();
        kill_process(spawner, Signal::KILL).unwrap();
        // A start that may have reached the dying one is refused with a code to try again on, and never anything else.
        let mut after = agent.shell("echo again").await;
        while let Err(refusal) = after.next().await {
            assert!(refusal.contains("unavailable"), "round {round}: {refusal}");
            after = agent.shell("echo again").await;
        }
        assert_eq!(after.stdout().await, "again\n");
        assert!(after.end().await.exited);
        assert_ne!(agent.spawner(), spawner);

        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        let end = killed.end().await;
        assert!(!end.exited && end.status.contains("spawner died"), "{end:?}");
        let trailer = killed.next().await.unwrap_err();
        assert!(!trailer.contains("error"), "nothing but the end: {trailer}");
    }
}
