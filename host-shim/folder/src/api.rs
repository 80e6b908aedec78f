//! A client of `api.sock`: the owner's calls.
//!
//! ```text
//! GET  /info        ─► State
//! POST /stop        StopRequest        ─► 202, and then the shim ends
//! POST /configure   what a parked one shall be ─► State
//! POST /pause       {}                 ─► the snapshot is whole; then the shim ends
//! POST /snapshot    {"path": DIR}      ─► DIR is a template
//! POST /fork        {"path": DIR}      ─► the spec of a sandbox that goes on from here
//! ```
//!
//! What is not carried out is `{"code":409,"message":"…"}` with that status.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;

use crate::calls::{PauseRequest, Taken, TargetRequest};
use crate::network::{NetworkReport, NetworkRequest};
use crate::stop::StopRequest;

/// The longest answer that is read. A state with its labels and a fork's spec with its environment are far below.
const MAX_ANSWER: usize = 4 << 20;

/// What can go wrong with a call.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody serves the socket: there is no shim, or it has not come that far, or not any more.
    #[error("nobody answers at {}: {source}", path.display())]
    NotThere {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The shim refused.
    #[error("{message}")]
    Refused {
        /// The status: 409 when the sandbox is not in the state for it, 501 when this shim cannot do it.
        status: StatusCode,
        /// The shim's words.
        message: String,
    },
    /// The connection broke: the shim is gone.
    #[error("host-shim went away during {call}: {reason}")]
    Broken {
        /// The call.
        call: &'static str,
        /// How the connection ended.
        reason: String,
    },
    /// The answer makes no sense.
    #[error("host-shim's answer to {call} makes no sense: {reason}")]
    Answer {
        /// The call.
        call: &'static str,
        /// What was expected and what came.
        reason: String,
    },
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

/// A client of one `api.sock`. Each call has a connection of its own.
#[derive(Clone, Debug)]
pub struct ApiClient {
    socket: PathBuf,
}

impl ApiClient {
    /// A client of the socket at this path.
    pub fn unix(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The sandbox's state as JSON: a field of a later version is kept.
    pub async fn info(&self) -> Result<Value, ApiError> {
        self.call("/info", Method::GET, None::<&()>).await
    }

    /// Asks for the sandbox's end; returns when it was heard.
    pub async fn stop(&self, request: StopRequest) -> Result<(), ApiError> {
        match self.call::<Value>("/stop", Method::POST, Some(&request)).await {
            // The shim may be gone before its answer is.
            Err(ApiError::Broken { .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Makes a parked sandbox somebody's; gives its new state.
    pub async fn configure(&self, wish: &Value) -> Result<Value, ApiError> {
        self.call("/configure", Method::POST, Some(wish)).await
    }

    /// Puts the sandbox on the disk; returns when all of it is there. Its shim ends then.
    pub async fn pause(&self) -> Result<Taken, ApiError> {
        self.call("/pause", Method::POST, Some(&PauseRequest {})).await
    }

    /// Makes a template of the running sandbox.
    pub async fn snapshot(&self, path: &Path) -> Result<Taken, ApiError> {
        self.call("/snapshot", Method::POST, Some(&TargetRequest { path: path.to_owned() })).await
    }

    /// Writes what sandboxes need that go on from here, into a folder that is not there yet. The answer has their spec.
    pub async fn fork(&self, path: &Path) -> Result<Taken, ApiError> {
        self.call("/fork", Method::POST, Some(&TargetRequest { path: path.to_owned() })).await
    }

    /// The sandbox's network, after a change where there is one.
    pub async fn network(&self, change: Option<&NetworkRequest>) -> Result<NetworkReport, ApiError> {
        let method = if change.is_some() { Method::POST } else { Method::GET };
        self.call("/network", method, change).await
    }

    async fn call<R: DeserializeOwned>(
        &self,
        call: &'static str,
        method: Method,
        body: Option<&impl Serialize>,
    ) -> Result<R, ApiError> {
        let makes_no_sense = |reason: String| ApiError::Answer { call, reason };
        let broken = |error: hyper::Error| ApiError::Broken { call, reason: error.to_string() };
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| makes_no_sense(error.to_string()))?,
            None => Vec::new(),
        };
        let connected = UnixStream::connect(&self.socket).await;
        let stream = connected.map_err(|source| ApiError::NotThere { path: self.socket.clone(), source })?;
        let request = Request::builder()
            .method(method)
            .uri(call)
            .header(header::HOST, "sandbox")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| makes_no_sense(error.to_string()))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(broken)?;
        let connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| makes_no_sense(error.to_string()))?.to_bytes();
        drop(connection);
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| makes_no_sense(error.to_string()));
        }
        let message = match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => refusal.message,
            Err(_) => format!("host-shim answered {call} with {status}"),
        };
        Err(ApiError::Refused { status, message })
    }
}
