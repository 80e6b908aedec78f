//! The agent as an ordinary process, and a client of it.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::process;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use process::process_event::{Event, data_event};
use prost::Message;
use tokio::net::UnixStream;

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Agent {
    pub(crate) child: Child,
    pub(crate) folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let command = Self::command(folder.path());
        Self::run(command, folder).await
    }

    /// The command that serves in `folder`.
    pub(crate) fn command(folder: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        command
            .arg("--listen")
            .arg(format!("unix:{}", folder.join("envd.sock").display()))
            .arg("--no-container")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command that serves in `folder`.
    pub(crate) async fn run(mut command: Command, folder: tempfile::TempDir) -> Self {
        let agent = Self { child: command.spawn().unwrap(), folder };
        let listening = async {
            while UnixStream::connect(agent.socket()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, listening).await.expect("the agent listens");
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("envd.sock")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub(crate) async fn send<B>(&self, request: Request<B>) -> Response<Incoming>
    where
        B: hyper::body::Body<Data = Bytes, Error = std::convert::Infallible> + Send + 'static,
    {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        tokio::time::timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap()
    }

    pub(crate) async fn call(
        &self,
        path: &str,
        content_type: &str,
        body: impl Into<Bytes>,
    ) -> Response<Incoming> {
        let request = Request::post(path)
            .header("host", "sandbox")
            .header("content-type", content_type)
            .body(Full::new(body.into()))
            .unwrap();
        self.send(request).await
    }

    pub(crate) async fn json(&self, path: &str, body: &str) -> (StatusCode, serde_json::Value) {
        let response = self.call(path, "application/json", body.to_owned()).await;
        let status = response.status();
        (status, serde_json::from_slice(&body_of(response).await).unwrap())
    }

    /// A unary call in the binary codec; an error is the code's name and the message.
    pub(crate) async fn proto<Q: Message, S: Message + Default>(
        &self,
        method: &str,
        request: &Q,
    ) -> Result<S, (String, String)> {
        let path = format!("/process.Process/{method}");
        let response = self.call(&path, "application/proto", request.encode_to_vec()).await;
        let ok = response.status() == StatusCode::OK;
        let body = body_of(response).await;
        if ok {
            return Ok(S::decode(body).unwrap());
        }
        let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let text = |name: &str| error[name].as_str().unwrap().to_owned();
        Err((text("code"), text("message")))
    }

    /// A server stream in the binary codec, with headers beside the usual ones.
    pub(crate) async fn stream<Q: Message>(
        &self,
        method: &str,
        request: &Q,
        headers: &[(&str, &str)],
    ) -> Events {
        let mut builder = Request::post(format!("/process.Process/{method}"))
            .header("host", "sandbox")
            .header("content-type", "application/connect+proto");
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let body = Full::new(envelope::encode(0, &request.encode_to_vec()));
        let response = self.send(builder.body(body).unwrap()).await;
        assert_eq!(response.status(), StatusCode::OK);
        Events { response, decoder: envelope::Decoder::default() }
    }

    pub(crate) async fn start_process(&self, request: process::StartRequest) -> Events {
        self.stream("Start", &request, &[]).await
    }

    /// Attaches to a process, from an offset if there is one.
    pub(crate) async fn connect(&self, pid: u32, from_offset: Option<u64>) -> Events {
        let request = process::ConnectRequest { process: by_pid(pid), from_offset };
        self.stream("Connect", &request, &[]).await
    }

    /// Sends a signal to a process, or to more.
    pub(crate) async fn signal(
        &self,
        pid: u32,
        signal: i32,
        scope: process::Scope,
    ) -> Result<(), (String, String)> {
        let request = process::SendSignalRequest { process: by_pid(pid), signal, scope: scope.into() };
        self.proto::<_, process::SendSignalResponse>("SendSignal", &request).await.map(drop)
    }

    /// Writes to a process's standard input or terminal.
    pub(crate) async fn input(
        &self,
        pid: u32,
        input: process::process_input::Input,
    ) -> Result<(), (String, String)> {
        let input = Some(process::ProcessInput { input: Some(input) });
        let request = process::SendInputRequest { process: by_pid(pid), input };
        self.proto::<_, process::SendInputResponse>("SendInput", &request).await.map(drop)
    }

    pub(crate) async fn shell(&self, script: &str) -> Events {
        self.start_process(start("/bin/sh", &["-c", script])).await
    }
}

pub(crate) fn start(command: &str, arguments: &[&str]) -> process::StartRequest {
    let config = process::ProcessConfig {
        cmd: command.to_owned(),
        args: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        ..Default::default()
    };
    process::StartRequest { process: Some(config), ..Default::default() }
}

/// Selects a process by its pid.
pub(crate) fn by_pid(pid: u32) -> Option<process::ProcessSelector> {
    Some(process::ProcessSelector { selector: Some(process::process_selector::Selector::Pid(pid)) })
}

/// Whether a process of this machine is there, and no zombie.
pub(crate) fn is_running(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// Waits until something is so; `what` is for the failure.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

pub(crate) async fn body_of(response: Response<Incoming>) -> Bytes {
    tokio::time::timeout(DEADLINE, response.into_body().collect()).await.unwrap().unwrap().to_bytes()
}

pub(crate) struct Events {
    pub(crate) response: Response<Incoming>,
    pub(crate) decoder: envelope::Decoder,
}

#[derive(Debug, Default)]
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) pty: Vec<u8>,
    /// What this reader was told that it missed.
    pub(crate) dropped: u64,
    /// How the stream ended, as JSON, when it did without the process's end.
    pub(crate) error: Option<String>,
    pub(crate) end: process::process_event::EndEvent,
}

impl Events {
    pub(crate) async fn next(&mut self) -> Result<Event, String> {
        loop {
            if let Some(envelope) = self.decoder.envelope().unwrap() {
                if envelope.end {
                    return Err(String::from_utf8_lossy(&envelope.message).into_owned());
                }
                let response = process::StartResponse::decode(envelope.message).unwrap();
                return Ok(response.event.unwrap().event.unwrap());
            }
            let frame =
                tokio::time::timeout(DEADLINE, self.response.frame()).await.expect("an event").expect("more");
            self.decoder.push(&frame.unwrap().into_data().unwrap());
        }
    }

    pub(crate) async fn start(&mut self) -> process::process_event::StartEvent {
        match self.next().await.unwrap() {
            Event::Start(start) => start,
            other => panic!("the first event is {other:?}"),
        }
    }

    pub(crate) async fn pid(&mut self) -> u32 {
        self.start().await.pid
    }

    /// Reads until the output of all streams has `text`; gives the output up to then.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        let mut all = Vec::new();
        loop {
            match self.next().await.unwrap() {
                Event::Data(data) => match data.output.unwrap() {
                    data_event::Output::Stdout(bytes)
                    | data_event::Output::Stderr(bytes)
                    | data_event::Output::Pty(bytes) => all.extend_from_slice(&bytes),
                },
                Event::Start(_) | Event::Keepalive(_) => {}
                Event::End(end) => {
                    panic!("{end:?} before {text:?}: {:?}", String::from_utf8_lossy(&all))
                }
            }
            let so_far = String::from_utf8_lossy(&all);
            if so_far.contains(text) {
                return so_far.into_owned();
            }
        }
    }

    /// Everything up to the end of the process.
    pub(crate) async fn finish(self) -> Finished {
        let finished = self.rest().await;
        assert_eq!(finished.error, None, "the stream ends without an error");
        finished
    }

    /// Everything up to the end of the stream.
    pub(crate) async fn rest(mut self) -> Finished {
        let mut finished = Finished::default();
        loop {
            match self.next().await {
                Ok(Event::Data(data)) => {
                    finished.dropped += data.dropped_bytes;
                    match data.output.unwrap() {
                        data_event::Output::Stdout(bytes) => finished.stdout.extend_from_slice(&bytes),
                        data_event::Output::Stderr(bytes) => finished.stderr.extend_from_slice(&bytes),
                        data_event::Output::Pty(bytes) => finished.pty.extend_from_slice(&bytes),
                    }
                }
                Ok(Event::End(end)) => finished.end = end,
                Ok(Event::Start(_) | Event::Keepalive(_)) => {}
                Err(end) if end == "{}" => return finished,
                Err(end) => {
                    finished.error = Some(end);
                    return finished;
                }
            }
        }
    }
}
