//! One sandbox: what it is, when it ends.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use super::access::{Own, OwnAnyStage};
use super::body::Body;
use super::create::timeout;
use super::types::{ConnectSandbox, CreatedSandbox, ErrorBody, NewTimeout, Refresh, SandboxDetail};
use super::{Control, MAX_TIMEOUT};
use crate::ApiError;
use crate::fleet::Sandbox;

/// Seconds from a connect to the sandbox's end, where the client does not say.
const CONNECT_TIMEOUT: u64 = 300;

/// What a refresh gives at least: clients of 0.x ask for 0 seconds every 5.
const MIN_REFRESH: u64 = 15;

/// A sandbox with all that its team may know.
#[utoipa::path(get, path = "/sandboxes/{sandboxID}", tag = "sandboxes", params(("sandboxID" = String, Path)),
    responses((status = 200, body = SandboxDetail), (status = 404, body = ErrorBody)))]
pub(super) async fn info(State(control): State<Arc<Control>>, Own(sandbox): Own) -> Json<SandboxDetail> {
    Json(SandboxDetail::of(sandbox.record(), &control.gateway.config.domain))
}

/// Ends a sandbox; nothing of it is left when this answers.
#[utoipa::path(delete, path = "/sandboxes/{sandboxID}", tag = "sandboxes", params(("sandboxID" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn kill(
    State(control): State<Arc<Control>>,
    OwnAnyStage(sandbox): OwnAnyStage,
) -> Result<StatusCode, ApiError> {
    let id = sandbox.record().id;
    match control.gateway.fleet.kill(&id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(ApiError::no_sandbox(id.as_str())),
    }
}

/// Connects to a sandbox: gives what its maker got, and moves its end away if it is nearer than asked for.
#[utoipa::path(post, path = "/v2/sandboxes/{sandboxID}/connect", tag = "sandboxes", request_body = ConnectSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 200, body = CreatedSandbox), (status = "4XX", body = ErrorBody)))]
pub(super) async fn connect_v2(
    State(control): State<Arc<Control>>,
    Own(sandbox): Own,
    Body(wanted): Body<ConnectSandbox>,
) -> Result<Json<CreatedSandbox>, ApiError> {
    if wanted.memory == Some(false) {
        let message = "memory: false is not supported by this gateway yet: leave it out";
        return Err(ApiError::bad_request(message));
    }
    let timeout = timeout(wanted.timeout.unwrap_or(CONNECT_TIMEOUT), 0)?;
    control.extend(&sandbox, timeout).await?;
    Ok(Json(CreatedSandbox::of(sandbox.record(), &control.gateway.config.domain)))
}

/// The same, for older clients.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/connect", tag = "sandboxes", request_body = ConnectSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 200, body = CreatedSandbox), (status = "4XX", body = ErrorBody)))]
pub(super) async fn connect_v1(
    control: State<Arc<Control>>,
    own: Own,
    body: Body<ConnectSandbox>,
) -> Result<Json<CreatedSandbox>, ApiError> {
    connect_v2(control, own, body).await
}

/// Moves a sandbox's end, also nearer.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/timeout", tag = "sandboxes", request_body = NewTimeout,
    params(("sandboxID" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn set_timeout(
    State(control): State<Arc<Control>>,
    Own(sandbox): Own,
    Body(wanted): Body<NewTimeout>,
) -> Result<StatusCode, ApiError> {
    let timeout = timeout(wanted.timeout, 0)?;
    let _turn = control.ends.lock().await;
    control.end_in(&sandbox, timeout).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Keeps a sandbox for a while longer; never shortens.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/refreshes", tag = "sandboxes", request_body = Refresh,
    params(("sandboxID" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn refresh(
    State(control): State<Arc<Control>>,
    Own(sandbox): Own,
    Body(wanted): Body<Refresh>,
) -> Result<StatusCode, ApiError> {
    let timeout = timeout(wanted.duration.unwrap_or(0).max(MIN_REFRESH), 0)?;
    control.extend(&sandbox, timeout).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Control {
    /// Moves a sandbox's end away, if it is nearer.
    async fn extend(&self, sandbox: &Sandbox, timeout: Duration) -> Result<(), ApiError> {
        let _turn = self.ends.lock().await;
        if sandbox.record().end_at >= after(timeout) {
            return Ok(());
        }
        self.end_in(sandbox, timeout).await
    }

    /// Moves a sandbox's end.
    async fn end_in(&self, sandbox: &Sandbox, timeout: Duration) -> Result<(), ApiError> {
        let id = sandbox.record().id;
        match self.gateway.fleet.set_end(&id, after(timeout)).await? {
            true => Ok(()),
            false => Err(ApiError::no_sandbox(id.as_str())),
        }
    }
}

fn after(timeout: Duration) -> Timestamp {
    let timeout = SignedDuration::try_from(timeout.min(MAX_TIMEOUT)).unwrap_or(SignedDuration::ZERO);
    // The end of all times is 7000 years away.
    Timestamp::now().checked_add(timeout).unwrap_or(Timestamp::MAX)
}
