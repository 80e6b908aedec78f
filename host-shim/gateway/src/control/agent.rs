//! What the agent says of its sandbox, over its client door. Its words are the tenant's: bounded in size and time.

use std::io;
use std::time::Duration;

use envd_proto::CLIENT_PORT;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use crate::fleet::Sandbox;

/// How long the agent may take for an answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// The longest answer; a real one has some 300 bytes.
const MAX_ANSWER: usize = 64 << 10;

/// The agent's /metrics, as far as clients are told.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct AgentMetrics {
    /// Seconds since 1970.
    pub(super) ts: i64,
    pub(super) cpu_count: u32,
    pub(super) cpu_used_pct: f64,
    pub(super) mem_total: u64,
    pub(super) mem_used: u64,
    #[serde(default)]
    pub(super) mem_cache: u64,
    pub(super) disk_used: u64,
    pub(super) disk_total: u64,
}

/// The agent did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Late,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("the connection failed: {0}")]
    Http(#[from] hyper::Error),
    #[error("expected the status 200, got {0}")]
    Status(StatusCode),
    #[error("expected metrics, got {0}")]
    Body(String),
}

/// What a sandbox uses now.
pub(super) async fn metrics(sandbox: &Sandbox) -> Result<AgentMetrics, AgentError> {
    tokio::time::timeout(DEADLINE, ask(sandbox)).await.unwrap_or(Err(AgentError::Late))
}

async fn ask(sandbox: &Sandbox) -> Result<AgentMetrics, AgentError> {
    let stream = sandbox.dial(CLIENT_PORT).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with this call, also where the agent goes on sending.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut request = Request::get("/metrics")
        .header(header::HOST, "sandbox")
        .header(header::ACCEPT, "application/json")
        .body(Empty::<bytes::Bytes>::new())
        .map_err(io::Error::other)?;
    if let Some(token) = &sandbox.record().access_token {
        let token = token.parse().map_err(io::Error::other)?;
        request.headers_mut().insert("x-access-token", token);
    }
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(AgentError::Status(response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    let body = body.map_err(|error| AgentError::Body(error.to_string()))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| AgentError::Body(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_says_nothing_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock.sock")).unwrap();
        let record = serde_json::json!({ "id": "abc1", "team": "t", "stage": "running", "template": "base",
            "metadata": {}, "cpus": 1, "memory_mib": 1, "disk_mib": 1, "agent_version": "",
            "started_at": "2026-01-02T03:04:05Z", "end_at": "2026-01-02T03:04:05Z" });
        let sandbox = Sandbox::new(dir.path().to_owned(), serde_json::from_value(record).unwrap());
        let silent = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = metrics(&sandbox) => assert!(matches!(answer, Err(AgentError::Late)), "{answer:?}"),
            () = silent => {}
        }
    }
}
