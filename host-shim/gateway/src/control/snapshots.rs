//! Snapshots of sandboxes: templates that are their team's alone.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Control;
use super::access::{Caller, OwnAlive};
use super::body::{Body, Params, shown};
use super::list::{MAX_PAGE, NEXT_TOKEN, Position};
use super::sandbox::with_memory;
use super::types::{ErrorBody, NewSnapshot};
use crate::ApiError;
use crate::fleet::parse_snapshot_name;
use crate::store::SnapshotRecord;

/// A snapshot.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SnapshotInfo {
    /// What a create takes as `templateID`.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    /// What it is called, with a tag; creates take that too.
    names: Vec<String>,
}

impl From<SnapshotRecord> for SnapshotInfo {
    fn from(record: SnapshotRecord) -> Self {
        Self { snapshot_id: record.id.to_string(), names: record.name.into_iter().collect() }
    }
}

/// Which snapshots.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub(super) struct SnapshotsQuery {
    /// Only those of this sandbox; it may be gone.
    #[serde(rename = "sandboxID")]
    sandbox_id: Option<String>,
    /// Only the one of this name, which may have a tag.
    name: Option<String>,
    /// 1 to 100, the default.
    limit: Option<usize>,
    /// Where the page begins: X-Next-Token of the page before.
    next_token: Option<String>,
}

/// Makes a snapshot of a running sandbox, which goes on. Sandboxes that are created from it go on from here.
#[utoipa::path(post, path = "/sandboxes/{sandboxID}/snapshots", tag = "snapshots", request_body = NewSnapshot,
    params(("sandboxID" = String, Path)),
    responses((status = 201, body = SnapshotInfo), (status = "4XX", body = ErrorBody)))]
pub(super) async fn create(
    State(control): State<Arc<Control>>,
    OwnAlive(sandbox): OwnAlive,
    Body(wanted): Body<NewSnapshot>,
) -> Result<(StatusCode, Json<SnapshotInfo>), ApiError> {
    with_memory(wanted.memory)?;
    let name = wanted.name.as_deref().filter(|name| !name.is_empty());
    let made = control.gateway.fleet.snapshot(&sandbox, name).await?;
    Ok((StatusCode::CREATED, Json(made.into())))
}

/// A page of the team's snapshots, the latest first.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", params(SnapshotsQuery),
    responses((status = 200, body = Vec<SnapshotInfo>,
        headers(("X-Next-Token" = String, description = "where the next page begins; absent on the last one"))),
        (status = 400, body = ErrorBody)))]
pub(super) async fn list(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Params(query): Params<SnapshotsQuery>,
) -> Result<(HeaderMap, Json<Vec<SnapshotInfo>>), ApiError> {
    let limit = query.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(ApiError::bad_request(format!("invalid limit {limit}: expected 1 to {MAX_PAGE}")));
    }
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let behind = given(query.next_token).map(|token| {
        let invalid = || ApiError::bad_request(format!("invalid nextToken {:?}", shown(&token)));
        Position::parse(&token).ok_or_else(invalid)
    });
    let behind = behind.transpose()?;
    let name = given(query.name).map(|name| parse_snapshot_name(&name)).transpose()?.map(|(_, kept)| kept);
    let sandbox = given(query.sandbox_id);
    let mut found = control.gateway.fleet.snapshots(&caller.team.id).await?;
    let place = |one: &SnapshotRecord| Position { started_at: one.created_at, id: one.id.clone() };
    found.retain(|one| {
        behind.as_ref().is_none_or(|behind| place(one) < *behind)
            && name.as_ref().is_none_or(|name| one.name.as_ref() == Some(name))
            && sandbox.as_ref().is_none_or(|sandbox| one.sandbox.as_str() == sandbox)
    });
    found.reverse();
    let mut headers = HeaderMap::new();
    if found.len() > limit {
        found.truncate(limit);
        if let Some(last) = found.last() {
            let token = HeaderValue::from_str(&place(last).token()).map_err(ApiError::internal)?;
            headers.insert(NEXT_TOKEN, token);
        }
    }
    Ok((headers, Json(found.into_iter().map(SnapshotInfo::from).collect())))
}
