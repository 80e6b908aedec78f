//! What sandboxes use, from their agents. Only the current sample: nothing is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use futures::future::join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Control;
use super::access::{Caller, OwnAlive};
use super::agent::{self, AgentMetrics};
use super::body::Params;
use super::types::ErrorBody;
use crate::ApiError;
use crate::store::Stage;

/// Sandboxes of one question (E2B's own limit).
const MAX_SANDBOXES: usize = 100;

/// What a sandbox used at a time. Memory and disk in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxMetric {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    timestamp: Timestamp,
    /// The same, in seconds since 1970.
    timestamp_unix: i64,
    cpu_count: u32,
    /// Of all CPUs together, 0 to 100.
    cpu_used_pct: f64,
    mem_used: u64,
    mem_total: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

impl SandboxMetric {
    /// `None` where the agent's clock shows no time.
    fn of(sample: &AgentMetrics) -> Option<Self> {
        Some(Self {
            timestamp: Timestamp::from_second(sample.ts).ok()?,
            timestamp_unix: sample.ts,
            cpu_count: sample.cpu_count,
            cpu_used_pct: sample.cpu_used_pct,
            mem_used: sample.mem_used,
            mem_total: sample.mem_total,
            mem_cache: sample.mem_cache,
            disk_used: sample.disk_used,
            disk_total: sample.disk_total,
        })
    }
}

/// Which samples.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Span {
    /// Not those before (seconds since 1970).
    start: Option<i64>,
    /// Not those after (seconds since 1970).
    end: Option<i64>,
}

/// What a sandbox uses: the current sample, if it is in the span that was asked for.
#[utoipa::path(get, path = "/sandboxes/{sandboxID}/metrics", tag = "sandboxes", params(("sandboxID" = String, Path), Span),
    responses((status = 200, body = Vec<SandboxMetric>), (status = "4XX", body = ErrorBody),
        (status = 502, body = ErrorBody, description = "the sandbox's agent did not answer")))]
pub(super) async fn of_sandbox(
    OwnAlive(sandbox): OwnAlive,
    Params(span): Params<Span>,
) -> Result<Json<Vec<SandboxMetric>>, ApiError> {
    let (start, end) = (span.start.unwrap_or(i64::MIN), span.end.unwrap_or(i64::MAX));
    if start > end {
        return Err(ApiError::bad_request(format!("invalid span: start {start} is after end {end}")));
    }
    if sandbox.record().stage != Stage::Running {
        // It uses nothing.
        return Ok(Json(Vec::new()));
    }
    let sample = agent::metrics(&sandbox).await.map_err(|error| {
        let message = format!("the agent of sandbox {} gave no metrics: {error}", sandbox.record().id);
        ApiError::new(StatusCode::BAD_GATEWAY, message)
    })?;
    let wanted = (start..=end).contains(&sample.ts);
    Ok(Json(SandboxMetric::of(&sample).filter(|_| wanted).into_iter().collect()))
}

/// Which sandboxes.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Ids {
    /// Up to 100 ids with commas between.
    sandbox_ids: String,
}

/// Samples by sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SandboxesWithMetrics {
    /// Those of the ids that are the team's, run, and answered.
    sandboxes: BTreeMap<String, SandboxMetric>,
}

/// What several sandboxes use now.
#[utoipa::path(get, path = "/sandboxes/metrics", tag = "sandboxes", params(Ids),
    responses((status = 200, body = SandboxesWithMetrics), (status = 400, body = ErrorBody)))]
pub(super) async fn of_sandboxes(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Params(query): Params<Ids>,
) -> Result<Json<SandboxesWithMetrics>, ApiError> {
    let mut ids: Vec<&str> = query.sandbox_ids.split(',').filter(|id| !id.is_empty()).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > MAX_SANDBOXES {
        let message = format!("{} sandbox_ids, at most {MAX_SANDBOXES} allowed", ids.len());
        return Err(ApiError::bad_request(message));
    }
    let own = ids.into_iter().filter_map(|id| control.own(&caller.team.id, id));
    let running = own.filter(|sandbox| sandbox.record().stage == Stage::Running);
    let samples = running.map(|sandbox| async move {
        let sample = agent::metrics(&sandbox).await.ok()?;
        Some((sandbox.record().id.to_string(), SandboxMetric::of(&sample)?))
    });
    let sandboxes = join_all(samples).await.into_iter().flatten().collect();
    Ok(Json(SandboxesWithMetrics { sandboxes }))
}
