//! A client that speaks the protocol by hand, so that nothing of the agent's own code judges the agent.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::UnixStream;

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// An agent in a folder of its own.
pub(crate) struct Agent {
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
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .arg("--listen")
            .arg(format!("unix:{}", folder.path().join("envd.sock").display()))
            .arg("--no-container")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, folder };
        let listening = async {
            while UnixStream::connect(agent.socket()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, listening).await.expect("the agent listens");
        agent
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("envd.sock")
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Sends a request on a connection of its own.
    pub(crate) async fn send(&self, version: Version, request: Request<Body>) -> Response<Incoming> {
        let stream = TokioIo::new(UnixStream::connect(self.socket()).await.unwrap());
        let sending = async {
            match version {
                Version::Http1 => {
                    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
                    tokio::spawn(connection);
                    sender.send_request(request).await
                }
                Version::Http2 => {
                    let (mut sender, connection) =
                        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
                    tokio::spawn(connection);
                    sender.send_request(request).await
                }
            }
        };
        tokio::time::timeout(DEADLINE, sending).await.expect("an answer").unwrap()
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn exchange(&self, version: Version, request: Request<Body>) -> Answer {
        let (parts, body) = self.send(version, request).await.into_parts();
        let body = tokio::time::timeout(DEADLINE, body.collect()).await.expect("a body").unwrap().to_bytes();
        Answer { status: parts.status, headers: parts.headers, body }
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The code of a unary error.
    pub(crate) fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_else(|| panic!("no code in {:?}", self.body)).to_owned()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

impl Version {
    pub(crate) const ALL: [Self; 2] = [Self::Http1, Self::Http2];

    /// The URI of a path: HTTP/2 has the host in it.
    pub(crate) fn request(self, method: &str, path: &str) -> http::request::Builder {
        let builder = Request::builder().method(method);
        match self {
            Self::Http1 => builder.uri(path).header("host", "sandbox"),
            Self::Http2 => builder.uri(format!("http://sandbox{path}")),
        }
    }
}

pub(crate) type Body = BoxBody<Bytes, std::convert::Infallible>;

pub(crate) fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// A body whose length nobody knows ahead: chunked in HTTP/1.1.
pub(crate) fn in_pieces(bytes: impl Into<Bytes>, size: usize) -> Body {
    let bytes: Bytes = bytes.into();
    let pieces: Vec<_> =
        bytes.chunks(size).map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
    BodyExt::boxed(StreamBody::new(futures::stream::iter(pieces)))
}

/// An envelope of a stream.
pub(crate) fn envelope(flags: u8, message: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flags];
    bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}

/// Takes the next envelope from what arrived so far: its flags and its message.
pub(crate) fn next_envelope(input: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let mut header = input.get(..5)?;
    let flags = header.get_u8();
    let length = header.get_u32() as usize;
    let message = input.get(5..5 + length)?.to_vec();
    input.drain(..5 + length);
    Some((flags, message))
}
