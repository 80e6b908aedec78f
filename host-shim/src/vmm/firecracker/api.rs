//! Firecracker's API: HTTP/1.1 with JSON over a Unix socket (its `swagger/firecracker.yaml`).
//!
//! The VMM is taken for hostile: a guest may have taken it over. Every answer is bounded in size and time.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

/// The longest answer that is read. Those to our requests are empty, and an error is a sentence or two.
const MAX_ANSWER: usize = 64 << 10;

/// The longest part of an error that is told.
const MAX_FAULT: usize = 2 << 10;

/// A VMM that does not answer for so long hangs. Requests take milliseconds, but for the one that writes the RAM.
const DEADLINE: Duration = Duration::from_secs(60);

/// As [`DEADLINE`], for what writes the RAM: 64 GiB at a slow disk's 200 MB/s and a sync at the end.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(600);

/// The request that writes a snapshot.
pub(super) const CREATE: &str = "/snapshot/create";

/// How long the socket may take to be there; it is the first thing that the program makes.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// The pause before the socket is tried again, and the longest after doubling.
const FIRST_WAIT: Duration = Duration::from_micros(500);
const MAX_WAIT: Duration = Duration::from_millis(20);

/// What can go wrong with the API.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Firecracker refused.
    #[error("Firecracker refused {request}: {fault} ({status})")]
    Refused {
        /// The request.
        request: String,
        /// Firecracker's words.
        fault: String,
        /// Its status.
        status: StatusCode,
    },
    /// Firecracker did not answer.
    #[error("Firecracker did not answer {request} within {} s", deadline.as_secs())]
    NoAnswer {
        /// The request, or what was waited for.
        request: String,
        /// How long it had.
        deadline: Duration,
    },
    /// Firecracker said what it must not.
    #[error("Firecracker answered {request} with {got}, expected {expected}")]
    Protocol {
        /// The request.
        request: String,
        /// What was expected.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// The connection ended: the VMM has.
    #[error("Firecracker's API is gone: {request} was not answered")]
    Ended {
        /// The request.
        request: String,
    },
    /// The operating system refused.
    #[error("Firecracker's API: {0}")]
    Io(#[from] io::Error),
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) body: Value,
}

impl Call {
    pub(super) fn put(path: impl Into<String>, body: Value) -> Self {
        Self { method: Method::PUT, path: path.into(), body }
    }

    pub(super) fn patch(path: impl Into<String>, body: Value) -> Self {
        Self { method: Method::PATCH, path: path.into(), body }
    }

    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn deadline(&self) -> Duration {
        if self.path == CREATE { SNAPSHOT_DEADLINE } else { DEADLINE }
    }
}

/// The API's socket.
#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
    ready: bool,
}

/// What an error says.
#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

impl Api {
    /// The API at a socket that may not be there yet.
    pub(super) fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), ready: false }
    }

    /// Waits until it listens. The caller watches the process.
    pub(super) async fn ready(&mut self) -> Result<(), ApiError> {
        if self.ready {
            return Ok(());
        }
        let listening = async {
            let mut wait = FIRST_WAIT;
            // bind(2) shows the socket before listen(2) makes it answer, and there is no event for the latter.
            while UnixStream::connect(&self.socket).await.is_err() {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(MAX_WAIT);
            }
        };
        let late = |_| ApiError::NoAnswer { request: "its start".to_owned(), deadline: START_DEADLINE };
        tokio::time::timeout(START_DEADLINE, listening).await.map_err(late)?;
        self.ready = true;
        Ok(())
    }

    /// Makes a request that is answered without contents.
    pub(super) async fn call(&self, call: &Call) -> Result<(), ApiError> {
        let deadline = call.deadline();
        let late = |_| ApiError::NoAnswer { request: call.name(), deadline };
        tokio::time::timeout(deadline, self.exchange(call)).await.map_err(late)?
    }

    async fn exchange(&self, call: &Call) -> Result<(), ApiError> {
        let ended = |_: hyper::Error| ApiError::Ended { request: call.name() };
        let stream = match UnixStream::connect(&self.socket).await {
            Ok(stream) => stream,
            // What is left of a process that has ended.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) =>
            {
                return Err(ApiError::Ended { request: call.name() });
            }
            Err(error) => return Err(error.into()),
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(ended)?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let request = Request::builder()
            .method(call.method.clone())
            .uri(&call.path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(call.body.to_string())))
            .map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(|error| {
            if error.is_parse() {
                let got = error.to_string();
                return ApiError::Protocol { request: call.name(), expected: "HTTP/1.1", got };
            }
            ended(error)
        })?;
        let status = response.status();
        let body = match Limited::new(response.into_body(), MAX_ANSWER).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                let got = error.to_string();
                return Err(ApiError::Protocol { request: call.name(), expected: "a short answer", got });
            }
        };
        if status == StatusCode::NO_CONTENT {
            return Ok(());
        }
        if status.is_client_error() || status.is_server_error() {
            let fault = match serde_json::from_slice::<Fault>(&body) {
                Ok(fault) => printable(&fault.fault_message),
                Err(_) => printable(&String::from_utf8_lossy(&body)),
            };
            return Err(ApiError::Refused { request: call.name(), fault, status });
        }
        let got = format!("the status {status}");
        Err(ApiError::Protocol { request: call.name(), expected: "204 No Content", got })
    }
}

/// The VMM's text without what would act on a terminal, and not without end.
fn printable(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(MAX_FAULT).collect();
    if text.is_empty() { "for no reason".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// What becomes of a request that is answered with these bytes.
    async fn answered(answer: &[u8]) -> Result<(), ApiError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = async {
            // The first connection is that of whoever looks whether somebody listens.
            drop(listener.accept().await.unwrap());
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"{\"state\":\"Paused\"}") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            assert!(head.starts_with("PATCH /vm HTTP/1.1\r\n"), "{head}");
            assert!(head.contains("content-length: 18\r\n"), "{head}");
            // Whoever is hostile does not care whether it is read.
            let _ = stream.write_all(answer).await;
        };
        let call = async {
            let mut api = Api::at(&path);
            api.ready().await?;
            api.call(&Call::patch("/vm", json!({ "state": "Paused" }))).await
        };
        tokio::join!(serve, call).1
    }

    #[tokio::test]
    async fn an_answer_is_done_refused_or_no_answer() {
        answered(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n").await.unwrap();
        let body = r#"{"fault_message":"not\u001b[2J now"}"#;
        let refused = format!("HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
        let flood = [b"HTTP/1.1 400 \r\nContent-Length: 10000000\r\n\r\n", &[b'x'; 100_000][..]].concat();
        let endless_head = [b"HTTP/1.1 204 \r\nA: ", &[b'x'; 1_000_000][..]].concat();
        for (answer, expected) in [
            (&refused[..], "Firecracker refused PATCH /vm: not[2J now (400 Bad Request)"),
            (b"HTTP/1.1 500 \r\nContent-Length: 3\r\n\r\n\x1bno", "refused PATCH /vm: no (500"),
            (b"HTTP/1.1 400 \r\nContent-Length: 0\r\n\r\n", "refused PATCH /vm: for no reason (400"),
            (b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}", "with the status 200 OK, expected 204"),
            (b"", "PATCH /vm was not answered"),
            (b"HTTP/1.1 204", "PATCH /vm was not answered"),
            (b"\0\0\0\0 I am no server\r\n\r\n", "answered PATCH /vm with invalid HTTP"),
            (&flood, "expected a short answer"),
            (&endless_head, "answered PATCH /vm with"),
        ] {
            let error = answered(answer).await.unwrap_err().to_string();
            assert!(
                error.contains(expected),
                "{:?}: {error}",
                String::from_utf8_lossy(&answer[..answer.len().min(40)])
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let error = Api::at(&path).ready().await.unwrap_err();
        assert_eq!(error.to_string(), "Firecracker did not answer its start within 30 s");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Api::at(&path).call(&Call::put("/vsock", json!({}))).await.unwrap_err();
        assert_eq!(error.to_string(), "Firecracker did not answer PUT /vsock within 60 s");
        let error = Api::at(&path).call(&Call::put("/snapshot/create", json!({}))).await.unwrap_err();
        assert!(error.to_string().ends_with("within 600 s"), "{error}");
    }

    #[tokio::test]
    async fn a_vmm_that_is_gone_is_told_from_one_that_is_not_there_yet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = Api::at(&path).call(&Call::put("/vsock", json!({}))).await.unwrap_err();
        assert!(matches!(error, ApiError::Ended { .. }), "{error}");
    }
}
