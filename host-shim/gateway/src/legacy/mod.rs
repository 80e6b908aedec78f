//! The JSON-RPC over WebSocket of the first SDKs (0.x), translated to the agent's calls.
//!
//! ```text
//! @e2b/sdk 0.12  ── ws://49982-<id>-<client>.<domain>/ws ──► connection ──► session ──► the agent: processes, terminals
//!                                                              │   └─────────────────► the agent: files, watches, ports
//!                ── http://49982-.../file ─────────────────────┴─► files ────────────► the agent: /files
//! ```
//!
//! These SDKs send no token with any of it: whoever knows a sandbox's id is let in. So only a sandbox that was made without
//! one (the first API's create, without `secure`) can be reached this way; for every other the answer is 401.

mod call;
mod connection;
mod feeds;
mod files;
mod outbox;
pub mod rpc;
mod run;
mod session;
mod text;

use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};

use crate::fleet::Sandbox;
use crate::{ApiError, Gateway};
use session::Session;

/// The port in the host label of what comes here.
pub const PORT: u16 = 49982;

/// Answers a request to a sandbox's port [`PORT`].
pub async fn serve(_gateway: Arc<Gateway>, sandbox: Arc<Sandbox>, request: Request) -> Response {
    answer(sandbox, request).await
}

/// Answers a request of the old protocol.
pub async fn answer(sandbox: Arc<Sandbox>, request: Request) -> Response {
    let outcome = match refusal(&sandbox) {
        Some(error) => Err(error),
        None => route(sandbox, request).await,
    };
    outcome.unwrap_or_else(IntoResponse::into_response)
}

fn refusal(sandbox: &Sandbox) -> Option<ApiError> {
    let message = "this sandbox has an access token, which the WebSocket protocol of the 0.x SDKs cannot send: \
                   use a newer SDK, or create it with POST /sandboxes and without \"secure\"";
    sandbox.record().access_token.is_some().then(|| ApiError::unauthorized(message))
}

async fn route(sandbox: Arc<Sandbox>, request: Request) -> Result<Response, ApiError> {
    match (request.method(), request.uri().path()) {
        (_, "/ws") => upgrade(sandbox, request).await,
        (&Method::GET, "/ping") => Ok("pong".into_response()),
        // The agent's clock is set by its host; there is nothing to wait for.
        (_, "/sync") => Ok("synced".into_response()),
        (&Method::GET | &Method::HEAD | &Method::POST | &Method::OPTIONS, "/file") => {
            let session = Session::of(&sandbox);
            let client = session.client().await.map_err(|error| {
                tracing::debug!(%error, "the agent does not answer");
                ApiError::new(StatusCode::BAD_GATEWAY, "the sandbox does not answer")
            })?;
            files::forward(client, request).await
        }
        (_, "/file" | "/ping") => Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "expected GET or POST")),
        (_, path) => {
            let message = format!("{path:?}: expected /ws, /file, /ping or /sync");
            Err(ApiError::new(StatusCode::NOT_FOUND, message))
        }
    }
}

async fn upgrade(sandbox: Arc<Sandbox>, request: Request) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade,
        Err(rejection) => return Err(ApiError::new(rejection.status(), rejection.body_text())),
    };
    let Some(seat) = Session::of(&sandbox).seat() else {
        let message = "too many WebSocket connections to this sandbox: close one first";
        return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, message));
    };
    let upgrade = upgrade.max_message_size(connection::MAX_MESSAGE).max_frame_size(connection::MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        connection::serve(seat, socket, sandbox.gone()).await;
    }))
}
