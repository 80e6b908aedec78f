//! What a client may know of its machine: GET /metrics, /envs, /ports.

use axum::response::{IntoResponse, Response};
use http::{HeaderMap, header};
use serde_json::{Value, json};

use crate::connect::{Code, Error};
use crate::filesystem::error_response;
use crate::sandbox::{Sandbox, Session};
use crate::{listening, metrics};

const JSON: &str = "application/json";
/// Prometheus's text exposition format.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers a GET of one of the three paths, which was authorized.
pub(super) async fn answer(
    path: &str,
    headers: &HeaderMap,
    sandbox: &Sandbox,
    session: &Session,
) -> Response {
    let answer = match path {
        "/envs" => Ok((JSON, json!(session.env()).to_string())),
        "/ports" => ports().await.map(|ports| (JSON, ports.to_string())),
        _ => sandbox.metrics().stats(sandbox).await.map(|stats| {
            let accept =
                headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
            match metrics::prefers_prometheus(accept) {
                true => (PROMETHEUS, metrics::prometheus(&stats)),
                false => (JSON, metrics::e2b_json(&stats).to_string()),
            }
        }),
    };
    match answer {
        Ok((kind, body)) => ([(header::CONTENT_TYPE, kind)], body).into_response(),
        Err(error) => error_response(&Error::new(Code::Internal, format!("{path}: {error}"))),
    }
}

async fn ports() -> std::io::Result<Value> {
    let ports = tokio::task::spawn_blocking(listening::ports).await.map_err(std::io::Error::other)??;
    Ok(ports.iter().map(|port| json!({"address": port.address, "port": port.port})).collect())
}
