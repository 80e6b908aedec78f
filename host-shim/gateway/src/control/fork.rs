//! Forks of a sandbox.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::Control;
use super::access::OwnAlive;
use super::body::Body;
use super::create::timeout;
use super::types::{CreatedSandbox, ErrorBody, ForkSandbox};
use crate::ApiError;

/// Seconds that forks have where the client does not say.
const FORK_TIMEOUT: u64 = 15;

/// Forks of one request (E2B's own limit; its clients ask for 20 at most).
const MAX_FORKS: u32 = 100;

/// What became of one fork: one of the two.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ForkResult {
    /// It runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    sandbox: Option<CreatedSandbox>,
    /// It did not start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    error: Option<ErrorBody>,
}

/// Starts sandboxes that go on from where a running one is. It goes on too; each fork starts or fails by itself, and has tokens
/// and an identity of its own.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/fork", tag = "sandboxes", request_body = ForkSandbox,
    params(("sandboxID" = String, Path)),
    responses((status = 201, body = Vec<ForkResult>), (status = "4XX", body = ErrorBody)))]
pub(super) async fn fork(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
    Body(wanted): Body<ForkSandbox>,
) -> Result<(StatusCode, Json<Vec<ForkResult>>), ApiError> {
    let count = wanted.count.unwrap_or(1);
    if !(1..=MAX_FORKS).contains(&count) {
        return Err(ApiError::bad_request(format!("invalid count {count}: expected 1 to {MAX_FORKS}")));
    }
    let timeout = timeout(wanted.timeout.unwrap_or(FORK_TIMEOUT), 1)?;
    let forks = control.gateway.fleet.fork(&sandbox, count, timeout).await?;
    let domain = &control.gateway.config.domain;
    let results = forks.into_iter().map(|fork| match fork {
        Ok(fork) => ForkResult { sandbox: Some(CreatedSandbox::of(fork.record(), domain)), error: None },
        Err(error) => ForkResult { sandbox: None, error: Some(ErrorBody::of(&error)) },
    });
    Ok((StatusCode::CREATED, Json(results.collect())))
}
