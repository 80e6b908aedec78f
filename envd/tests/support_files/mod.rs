//! A small client for the tests of files and watches.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use envd_channel::envelope;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// There only to catch a hang.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// The agent as an ordinary process, and a folder for its socket and for the files of a test.
pub struct Agent {
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
    pub async fn start() -> Self {
        Self::start_after("true").await
    }

    /// Starts it in a mount namespace of its own where the shell script `prepare` ran first, in the folder.
    pub async fn start_after(prepare: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "set -e; cd \"$1\"; {prepare}; exec \"$2\" --listen unix:\"$1/envd.sock\" --no-container"
        );
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "/bin/sh", "-c", &script, "sh"])
            .arg(folder.path())
            .arg(env!("CARGO_BIN_EXE_envd"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut agent = Self { child, folder };
        let listening = async {
            while UnixStream::connect(agent.folder.path().join("envd.sock")).await.is_err() {
                assert!(agent.child.try_wait().unwrap().is_none(), "the agent ended");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, listening).await.expect("the agent listens");
        agent
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The path of a file as the agent sees it, also where the test does not.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let stream = UnixStream::connect(self.folder.path().join("envd.sock")).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        tokio::time::timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap()
    }

    /// A unary call of filesystem.Filesystem.
    pub async fn call(&self, method: &str, message: Value) -> (StatusCode, Value) {
        self.call_with(method, message, &[]).await
    }

    pub async fn call_with(
        &self,
        method: &str,
        message: Value,
        headers: &[(&str, &str)],
    ) -> (StatusCode, Value) {
        let mut request = Request::post(format!("/filesystem.Filesystem/{method}"))
            .header("host", "sandbox")
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(Full::new(message.to_string().into())).unwrap()).await;
        let status = response.status();
        (status, serde_json::from_slice(&body_of(response).await).unwrap())
    }

    /// A call that must succeed.
    pub async fn ok(&self, method: &str, message: Value) -> Value {
        let (status, answer) = self.call(method, message).await;
        assert_eq!(status, StatusCode::OK, "{method}: {answer}");
        answer
    }

    /// The code of a call that must fail.
    pub async fn code(&self, method: &str, message: Value) -> String {
        let (status, answer) = self.call(method, message).await;
        assert_ne!(status, StatusCode::OK, "{method}: {answer}");
        answer["code"].as_str().expect("a code").to_owned()
    }

    /// A request to /files.
    pub async fn files(
        &self,
        method: Method,
        query: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Response<Incoming> {
        let mut request =
            Request::builder().method(method).uri(format!("/files?{query}")).header("host", "sandbox");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::new(body.into())).unwrap()).await
    }

    /// Uploads one file.
    pub async fn put(&self, path: &Path, body: impl Into<Bytes>) -> (StatusCode, Value) {
        let headers = [("content-type", "application/octet-stream")];
        let query = format!("path={}", percent(path.to_str().unwrap().as_bytes()));
        let response = self.files(Method::POST, &query, &headers, body).await;
        let status = response.status();
        (status, serde_json::from_slice(&body_of(response).await).unwrap())
    }

    /// Opens a stream of WatchDir and takes its start event.
    pub async fn watch(&self, message: Value, headers: &[(&str, &str)]) -> Events {
        let mut request = Request::post("/filesystem.Filesystem/WatchDir")
            .header("host", "sandbox")
            .header("content-type", "application/connect+json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = envelope::encode(0, message.to_string().as_bytes());
        let response = self.send(request.body(Full::new(body)).unwrap()).await;
        assert_eq!(response.status(), StatusCode::OK);
        Events { response, decoder: envelope::Decoder::default() }
    }
}

/// The messages of a stream.
pub struct Events {
    response: Response<Incoming>,
    decoder: envelope::Decoder,
}

impl Events {
    /// The next message; the end frame as an error.
    pub async fn next(&mut self) -> Result<Value, Value> {
        loop {
            if let Some(envelope) = self.decoder.envelope().unwrap() {
                let message = serde_json::from_slice(&envelope.message).unwrap();
                return if envelope.end { Err(message) } else { Ok(message) };
            }
            let frame = tokio::time::timeout(DEADLINE, self.response.frame()).await.expect("an event");
            self.decoder.push(&frame.expect("more").unwrap().into_data().unwrap());
        }
    }

    /// Events as "CREATE name" until one is `last`.
    pub async fn until(&mut self, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().map(String::as_str) != Some(last) {
            let message = self.next().await.expect("an event");
            if let Some(event) = message.get("filesystem") {
                seen.push(short(event));
            }
        }
        seen
    }
}

/// An event as "CREATE name".
pub fn short(event: &Value) -> String {
    let kind = event["type"].as_str().unwrap_or("none").trim_start_matches("EVENT_TYPE_");
    format!("{kind} {}", event["name"].as_str().unwrap_or(""))
}

pub async fn body_of(response: Response<Incoming>) -> Bytes {
    tokio::time::timeout(DEADLINE, response.into_body().collect()).await.unwrap().unwrap().to_bytes()
}

pub fn percent(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("%{byte:02x}")).collect()
}
