//! Builds of templates: asked for, begun, followed, ended.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Control;
use super::access::Caller;
use super::body::{Body, Params, shown};
use super::templates::{self, BuildStatus};
use super::types::ErrorBody;
use crate::ApiError;
use crate::builds::{BuildId, BuildStart, LogEntry, LogLevel, Size, TemplateId};
use crate::store::BuildStage;

/// Entries of one answer, at most and by default (E2B's own limit).
const MAX_ENTRIES: usize = 100;

/// What is to be built.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewBuild {
    /// `NAME` or `NAME:TAG`.
    name: Option<String>,
    /// What older clients call the name.
    alias: Option<String>,
    /// More tags; `default` where there is none at all.
    tags: Option<Vec<String>>,
    /// Virtual CPUs of its sandboxes: 2 by default.
    cpu_count: Option<u32>,
    /// RAM of its sandboxes: 1024 by default.
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u64>,
    /// Disk that its sandboxes can write, in MiB: 4096 at least.
    min_free_disk_mb: Option<u64>,
}

/// A build that waits for its files and its start.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RequestedBuild {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "buildID")]
    build_id: String,
    /// Whether every team may start it: never.
    public: bool,
    names: Vec<String>,
    /// The tags that it will have.
    tags: Vec<String>,
    aliases: Vec<String>,
}

/// How far a build is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct BuildInfo {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "buildID")]
    build_id: String,
    status: BuildStatus,
    /// Always empty: the entries are the log.
    logs: Vec<String>,
    /// The log from the offset on.
    log_entries: Vec<LogEntry>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reason: Option<Reason>,
}

/// Why a build failed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = BuildStatusReason)]
pub(super) struct Reason {
    message: String,
    /// `base`, a step's number from 1, or `finalize`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    step: Option<String>,
    /// The end of the log.
    log_entries: Vec<LogEntry>,
}

/// Which entries of the log.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatusQuery {
    /// How many the client has.
    logs_offset: Option<usize>,
    /// 1 to 100, the default.
    limit: Option<usize>,
    /// The least level: `debug` (the default), `info`, `warn` or `error`; offsets then count those alone.
    level: Option<String>,
}

/// Asks for a build of a template, which is made where there is none of that name.
#[utoipa::path(post, path = "/v3/templates", tag = "templates", request_body = NewBuild,
    responses((status = 202, body = RequestedBuild), (status = "4XX", body = ErrorBody)))]
pub(super) async fn request_v3(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Body(wanted): Body<NewBuild>,
) -> Result<(StatusCode, Json<RequestedBuild>), ApiError> {
    let begun = control.request(&caller, wanted).await?;
    let name = begun.template.name.to_string();
    let answer = RequestedBuild {
        template_id: begun.template.id.to_string(),
        build_id: begun.build.to_string(),
        public: false,
        names: vec![name.clone()],
        tags: begun.tags,
        aliases: vec![name],
    };
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Asks for a build of a template, for older clients.
#[utoipa::path(post, path = "/v2/templates", tag = "templates", request_body = NewBuild,
    responses((status = 202, body = templates::Template), (status = "4XX", body = ErrorBody)))]
pub(super) async fn request_v2(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Body(wanted): Body<NewBuild>,
) -> Result<(StatusCode, Json<templates::Template>), ApiError> {
    let begun = control.request(&caller, wanted).await?;
    let all = control.gateway.store.templates(&caller.team.id).await?;
    let summary = all.into_iter().find(|one| one.template.id == begun.template.id);
    let summary = summary.ok_or_else(|| no_template(begun.template.name.as_str()))?;
    let mut answer = templates::of_team(&summary);
    answer.build_id = begun.build.to_string();
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Starts a build whose files are there.
#[utoipa::path(post, path = "/v2/templates/{templateID}/builds/{buildID}", tag = "templates", request_body = BuildStart,
    params(("templateID" = String, Path), ("buildID" = String, Path)),
    responses((status = 202), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)))]
pub(super) async fn start(
    State(control): State<Arc<Control>>,
    caller: Caller,
    ids: Result<Path<(String, String)>, PathRejection>,
    Body(wanted): Body<BuildStart>,
) -> Result<StatusCode, ApiError> {
    let (template, build) = ids_of(ids)?;
    control.gateway.builds.start(&caller.team, &template, &build, wanted).await?;
    Ok(StatusCode::ACCEPTED)
}

/// How far a build is, and the log from an offset on. A page that is empty is the log's end for now; of a build that has ended,
/// for ever.
#[utoipa::path(get, path = "/templates/{templateID}/builds/{buildID}/status", tag = "templates",
    params(("templateID" = String, Path), ("buildID" = String, Path), StatusQuery),
    responses((status = 200, body = BuildInfo), (status = "4XX", body = ErrorBody)))]
pub(super) async fn status(
    State(control): State<Arc<Control>>,
    caller: Caller,
    ids: Result<Path<(String, String)>, PathRejection>,
    Params(query): Params<StatusQuery>,
) -> Result<Json<BuildInfo>, ApiError> {
    let (template, build) = ids_of(ids)?;
    let limit = query.limit.unwrap_or(MAX_ENTRIES);
    if !(1..=MAX_ENTRIES).contains(&limit) {
        return Err(ApiError::bad_request(format!("invalid limit {limit}: expected 1 to {MAX_ENTRIES}")));
    }
    let least = match query.level.as_deref() {
        None | Some("" | "debug") => LogLevel::Debug,
        Some("info") => LogLevel::Info,
        Some("warn") => LogLevel::Warn,
        Some("error") => LogLevel::Error,
        Some(other) => {
            let message =
                format!("invalid level {:?}: expected `debug`, `info`, `warn` or `error`", shown(other));
            return Err(ApiError::bad_request(message));
        }
    };
    let _turn = control.log_reads.acquire().await.map_err(ApiError::internal)?;
    let from = query.logs_offset.unwrap_or(0);
    let builds = &control.gateway.builds;
    let (record, log_entries, last) =
        builds.status(&caller.team.id, &template, &build, from, limit, least).await?;
    Ok(Json(BuildInfo {
        template_id: record.template.to_string(),
        build_id: record.id.to_string(),
        status: record.stage.into(),
        logs: Vec::new(),
        log_entries,
        reason: record.reason.map(|reason| Reason {
            message: reason.message,
            step: reason.step,
            log_entries: last,
        }),
    }))
}

/// Ends a build that has not ended; nothing of it runs when this is answered.
#[utoipa::path(delete, path = "/templates/{templateID}/builds/{buildID}", tag = "templates",
    params(("templateID" = String, Path), ("buildID" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn cancel(
    State(control): State<Arc<Control>>,
    caller: Caller,
    ids: Result<Path<(String, String)>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let (template, build) = ids_of(ids)?;
    control.gateway.builds.cancel(&caller.team.id, &template, &build).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Control {
    async fn request(&self, caller: &Caller, wanted: NewBuild) -> Result<crate::builds::Begun, ApiError> {
        let name = wanted.name.or(wanted.alias).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| ApiError::bad_request("expected a name for the template"))?;
        let size = Size {
            cpus: wanted.cpu_count,
            memory_mib: wanted.memory_mb,
            free_disk_mib: wanted.min_free_disk_mb,
        };
        self.gateway.builds.request(&caller.team, &name, &wanted.tags.unwrap_or_default(), size).await
    }
}

impl From<BuildStage> for BuildStatus {
    fn from(stage: BuildStage) -> Self {
        match stage {
            BuildStage::Waiting | BuildStage::Queued => Self::Waiting,
            BuildStage::Building => Self::Building,
            BuildStage::Ready => Self::Ready,
            BuildStage::Error => Self::Error,
        }
    }
}

/// What is no id is nobody's.
fn ids_of(path: Result<Path<(String, String)>, PathRejection>) -> Result<(TemplateId, BuildId), ApiError> {
    let Path((template, build)) = path.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    let no_build = || {
        let message = format!("Build \"{}\" doesn't exist or you don't have access to it", shown(&build));
        ApiError::not_found(message)
    };
    Ok((template.parse().map_err(|()| no_template(&template))?, build.parse().map_err(|()| no_build())?))
}

/// 404 for a template that is not there, or another team's: the two look the same.
pub(super) fn no_template(name: &str) -> ApiError {
    ApiError::not_found(format!("Template \"{}\" doesn't exist or you don't have access to it", shown(name)))
}
