//! The way into a tunnel: who may open one, and to which sandbox.

use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, StatusCode};
use axum::response::Response;

use super::access::{self, Own};
use super::types::ErrorBody;
use super::{Control, body};
use crate::fleet::Sandbox;
use crate::proxy::Client;
use crate::store::Stage;
use crate::{ApiError, identity, tunnel};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");

/// Opens a WebSocket that carries many streams to the sandbox's ports: yamux in binary messages, each stream begins with the
/// line `CONNECT <port>`. For a key of the sandbox's team or the sandbox's own access token.
#[utoipa::path(get, path = "/v1/sandboxes/{sandboxID}/tunnel", tag = "sandboxes", params(("sandboxID" = String, Path)),
    security(("ApiKeyAuth" = []), ("BearerAuth" = []), ("AccessTokenAuth" = [])),
    responses((status = 101, description = "a WebSocket"),
        (status = 401, body = ErrorBody, description = "no key or token, or one that nobody has"),
        (status = 404, body = ErrorBody),
        (status = 429, body = ErrorBody, description = "too many tunnels to this sandbox")))]
pub(super) async fn open(
    State(control): State<Arc<Control>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (mut parts, _) = request.into_parts();
    let sandbox = sandbox(&control, &mut parts).await?;
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &())
        .await
        .map_err(|rejection| ApiError::new(rejection.status(), rejection.body_text()))?;
    let client: Client = parts
        .extensions
        .remove()
        .ok_or_else(|| ApiError::internal("a request came without the connection that it came on"))?;
    let seat = control.tunnels.take(sandbox.id()).ok_or_else(|| {
        let message = "too many tunnels to this sandbox: close one first, each carries many streams";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
    })?;
    let upgrade = upgrade.max_message_size(tunnel::MAX_MESSAGE).max_frame_size(tunnel::MAX_MESSAGE);
    // From now on: the gateway waits for it when it stops.
    let tracked = client.connections.token();
    Ok(upgrade.on_upgrade(move |socket| async move {
        let _held = (&seat, &tracked);
        tunnel::serve(Arc::clone(&control.gateway), sandbox, socket, client.cut.clone()).await;
    }))
}

/// The running sandbox that the path names, for its team or for who has its token.
async fn sandbox(control: &Arc<Control>, parts: &mut Parts) -> Result<Arc<Sandbox>, ApiError> {
    if let (false, Some(token)) = (parts.headers.contains_key(API_KEY), parts.headers.get(ACCESS_TOKEN)) {
        let token = token.to_str().unwrap_or_default().to_owned();
        return by_token(control, parts, &token).await;
    }
    let caller = access::caller(control, &parts.headers).await?;
    tracing::Span::current().record("team", tracing::field::display(&caller.team.id));
    parts.extensions.insert(caller);
    let Own(sandbox) = Own::from_request_parts(parts, control).await?;
    Ok(sandbox)
}

/// Whoever has no token learns nothing about ids: a wrong one and no sandbox look the same.
async fn by_token(control: &Control, parts: &mut Parts, token: &str) -> Result<Arc<Sandbox>, ApiError> {
    let unknown = || ApiError::unauthorized("the access token is not that of a sandbox with this id");
    let Path(id) = Path::<String>::from_request_parts(parts, &()).await.map_err(|_| unknown())?;
    let sandbox = control.find(&id).ok_or_else(unknown)?;
    let record = sandbox.record();
    let known = record.access_token.as_deref().is_some_and(|known| identity::same(known, token));
    if !known {
        return Err(unknown());
    }
    tracing::Span::current().record("sandbox", tracing::field::display(&record.id));
    match record.stage {
        Stage::Running => Ok(sandbox),
        _ => Err(ApiError::no_sandbox(&body::shown(&id))),
    }
}
