//! One sandbox: what it is, when it ends.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use super::access::{Own, OwnAlive, OwnAnyStage};
use super::body::Body;
use super::create::{on_timeout, timeout};
use super::types::{
    ConnectSandbox, CreatedSandbox, ErrorBody, NewTimeout, PauseSandbox, Refresh, ResumeSandbox,
    SandboxDetail,
};
use super::{Control, MAX_TIMEOUT};
use crate::ApiError;
use crate::fleet::{Resume, Sandbox};

/// Seconds from a connect to the sandbox's end, where the client does not say.
const CONNECT_TIMEOUT: u64 = 300;

/// The same, for a resume of older clients.
const RESUME_TIMEOUT: u64 = 15;

/// How often a connect tries: between its look and its change others may pause the sandbox.
const CONNECT_TRIES: u32 = 3;

/// What a refresh gives at least: clients of 0.x ask for 0 seconds every 5.
const MIN_REFRESH: u64 = 15;

/// A sandbox with all that its team may know.
#[utoipa::path(get, path = "/sandboxes/{sandboxID}", tag = "sandboxes", params(("sandboxID" = String, Path)),
    responses((status = 200, body = SandboxDetail), (status = 404, body = ErrorBody)))]
pub(super) async fn info(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
) -> Json<SandboxDetail> {
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

/// Connects to a sandbox: gives what its maker got. Of one that runs it moves the end away if it is nearer than asked for; one
/// that is paused it resumes.
#[utoipa::path(post, path = "/v2/sandboxes/{sandboxID}/connect", tag = "sandboxes", request_body = ConnectSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 200, body = CreatedSandbox, description = "it ran"),
        (status = 201, body = CreatedSandbox, description = "it was resumed"), (status = "4XX", body = ErrorBody)))]
pub(super) async fn connect_v2(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
    Body(wanted): Body<ConnectSandbox>,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    with_memory(wanted.memory)?;
    let timeout = timeout(wanted.timeout.unwrap_or(CONNECT_TIMEOUT), 0)?;
    let status = match control.awaken(&sandbox, timeout).await? {
        true => StatusCode::CREATED,
        false => StatusCode::OK,
    };
    Ok((status, Json(CreatedSandbox::of(sandbox.record(), &control.gateway.config.domain))))
}

/// The same, for older clients.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/connect", tag = "sandboxes", request_body = ConnectSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 200, body = CreatedSandbox, description = "it ran"),
        (status = 201, body = CreatedSandbox, description = "it was resumed"), (status = "4XX", body = ErrorBody)))]
pub(super) async fn connect_v1(
    control: State<Arc<Control>>,
    own: OwnAlive,
    body: Body<ConnectSandbox>,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    connect_v2(control, own, body).await
}

/// Resumes a paused sandbox, for clients that are older still; 409 when it runs.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/resume", tag = "sandboxes", request_body = ResumeSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 201, body = CreatedSandbox), (status = 409, body = ErrorBody, description = "it runs"),
        (status = "4XX", body = ErrorBody)))]
pub(super) async fn resume(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
    Body(wanted): Body<ResumeSandbox>,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    with_memory(wanted.memory)?;
    let wish = Resume {
        timeout: timeout(wanted.timeout.unwrap_or(RESUME_TIMEOUT), 0)?,
        on_timeout: wanted.auto_pause.map(on_timeout),
    };
    match control.gateway.fleet.resume(&sandbox, wish).await? {
        true => {
            let created = CreatedSandbox::of(sandbox.record(), &control.gateway.config.domain);
            Ok((StatusCode::CREATED, Json(created)))
        }
        false => {
            let message = format!("Sandbox \"{}\" is already running", sandbox.id());
            Err(ApiError::new(StatusCode::CONFLICT, message))
        }
    }
}

/// Pauses a sandbox: its memory and disk are kept, and nothing of it runs when this answers. 409 when it is paused already.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/pause", tag = "sandboxes", request_body = PauseSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 204), (status = 409, body = ErrorBody, description = "it is paused already"),
        (status = "4XX", body = ErrorBody)))]
pub(super) async fn pause(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
    Body(wanted): Body<PauseSandbox>,
) -> Result<StatusCode, ApiError> {
    with_memory(wanted.memory)?;
    match control.gateway.fleet.pause(&sandbox).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => {
            let message = format!("Sandbox \"{}\" is already paused", sandbox.id());
            Err(ApiError::new(StatusCode::CONFLICT, message))
        }
    }
}

/// Refuses to leave a memory behind: nothing is downgraded silently.
pub(super) fn with_memory(memory: Option<bool>) -> Result<(), ApiError> {
    match memory {
        Some(false) => {
            Err(ApiError::bad_request("memory: false is not supported by this gateway yet: leave it out"))
        }
        _ => Ok(()),
    }
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
    /// Sees to it that a sandbox runs for so long at least; whether it was resumed for that.
    async fn awaken(&self, sandbox: &Sandbox, timeout: Duration) -> Result<bool, ApiError> {
        let wish = Resume { timeout, on_timeout: None };
        for _ in 0..CONNECT_TRIES {
            if self.gateway.fleet.resume(sandbox, wish).await? {
                return Ok(true);
            }
            match self.extend(sandbox, timeout).await {
                // It was paused meanwhile.
                Err(_) if sandbox.record().stage.is_alive() => {}
                done => return done.map(|()| false),
            }
        }
        let message = format!("Sandbox \"{}\" is paused again and again: try again", sandbox.id());
        Err(ApiError::new(StatusCode::CONFLICT, message))
    }

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
