//! The gateway itself: its health, its numbers, its document, and who asks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

use super::Control;
use super::access::Caller;
use super::openapi::openapi;
use super::types::ErrorBody;
use crate::ApiError;
use crate::metrics::CONTENT_TYPE;

/// A team.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Team {
    #[serde(rename = "teamID")]
    team_id: String,
    name: String,
    /// The key that asked: others are not known, only their hashes.
    api_key: String,
    /// Whether it is the one that clients take when they know several.
    is_default: bool,
}

/// The teams of whoever asks: the one whose key it is.
#[utoipa::path(get, path = "/teams", tag = "machine", responses((status = 200, body = Vec<Team>)))]
pub(super) async fn teams(caller: Caller) -> Json<Vec<Team>> {
    Json(vec![Team {
        team_id: caller.team.id.to_string(),
        name: caller.team.name,
        api_key: caller.key.to_string(),
        is_default: true,
    }])
}

/// The gateway can serve.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// Its version.
    version: &'static str,
}

/// Whether the gateway can serve: its database answers.
#[utoipa::path(get, path = "/health", tag = "machine", security(()),
    responses((status = 200, body = Health), (status = 503, body = ErrorBody)))]
pub(super) async fn health(State(control): State<Arc<Control>>) -> Result<Json<Health>, ApiError> {
    match control.gateway.store.teams().await {
        Ok(_) => Ok(Json(Health { version: env!("CARGO_PKG_VERSION") })),
        Err(error) => {
            tracing::error!(%error, "not healthy");
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the gateway's database does not answer"))
        }
    }
}

/// Numbers of the whole machine, for Prometheus. They name no team and no sandbox.
#[utoipa::path(get, path = "/metrics", tag = "machine", security(()),
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub(super) async fn metrics(
    State(control): State<Arc<Control>>,
) -> Result<([(HeaderName, &'static str); 1], String), ApiError> {
    let fleet = &control.gateway.fleet;
    control.gateway.metrics.starts_are(fleet.starts(), fleet.parked());
    let all = fleet.all();
    let stages = all.iter().map(|sandbox| sandbox.record().stage);
    let text = control.gateway.metrics.encode(stages).map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "machine", security(()), responses((status = 200, body = Object)))]
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}
