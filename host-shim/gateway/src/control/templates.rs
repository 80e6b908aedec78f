//! Templates: the machine's, which belong to no team, so that whoever has a key may start them; and the team's own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use jiff::Timestamp;
use serde::Serialize;
use template::{TemplateFolder, TemplateName};
use utoipa::ToSchema;

use super::access::Caller;
use super::types::{ErrorBody, to_millisecond};
use super::{Control, ENVD_VERSION};
use crate::ApiError;
use crate::builds::{Wanted, of_folder};
use crate::fleet::lookup;
use crate::store::TemplateSummary;

/// A template.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Template {
    /// Its id; of one of the machine its name.
    #[serde(rename = "templateID")]
    template_id: String,
    /// Of one of the machine made of its root file system's digest.
    #[serde(rename = "buildID")]
    pub(super) build_id: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    /// Whether every team may start it.
    public: bool,
    aliases: Vec<String>,
    names: Vec<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// When its build came to its end.
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
    /// Nobody is known.
    #[schema(value_type = Option<Object>)]
    created_by: Option<String>,
    /// When the last of the caller's sandboxes that run was started from it.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_spawned_at: Option<Timestamp>,
    /// How many of the caller's sandboxes run from it.
    spawn_count: usize,
    build_count: u32,
    /// The version of E2B's envd whose features its sandboxes have.
    envd_version: &'static str,
    build_status: BuildStatus,
}

/// How far a template's build is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BuildStatus {
    /// For its files, or its turn.
    Waiting,
    Building,
    Ready,
    Error,
}

/// What an alias stands for.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TemplateAlias {
    #[serde(rename = "templateID")]
    template_id: String,
    /// Whether every team may start it.
    public: bool,
}

/// The templates that the caller may start, and those that it builds.
#[utoipa::path(get, path = "/templates", tag = "templates", responses((status = 200, body = Vec<Template>)))]
pub(super) async fn list(
    State(control): State<Arc<Control>>,
    caller: Caller,
) -> Result<Json<Vec<Template>>, ApiError> {
    let folder = control.gateway.config.data.templates();
    let mut templates =
        tokio::task::spawn_blocking(move || read(folder)).await.map_err(ApiError::internal)??;
    templates.extend(control.gateway.store.templates(&caller.team.id).await?.iter().map(of_team));
    for sandbox in control.gateway.fleet.all() {
        let record = sandbox.record();
        let own = record.team == caller.team.id;
        if let (true, Some(template)) =
            (own, templates.iter_mut().find(|one| one.template_id == record.template))
        {
            template.spawn_count += 1;
            template.last_spawned_at = template.last_spawned_at.max(Some(to_millisecond(record.started_at)));
        }
    }
    Ok(Json(templates))
}

fn read(folder: PathBuf) -> Result<Vec<Template>, ApiError> {
    let names = TemplateFolder::list(&folder).map_err(ApiError::internal)?;
    let of_machine = names.iter().filter(|name| of_folder(name.as_str()).is_none());
    Ok(of_machine.filter_map(|name| describe(&folder, name)).collect())
}

/// `None` for one that cannot be used, or is being replaced just now.
fn describe(folder: &std::path::Path, name: &TemplateName) -> Option<Template> {
    let path = folder.join(name.as_str());
    let opened = TemplateFolder::open(&path);
    let found =
        opened.inspect_err(|error| tracing::warn!(template = name.as_str(), %error, "not listed")).ok()?;
    let template = found.template();
    let modified = path.join(template::TEMPLATE_FILE).metadata().and_then(|file| file.modified());
    let created_at = Timestamp::try_from(modified.unwrap_or(SystemTime::UNIX_EPOCH)).ok()?;
    let created_at = to_millisecond(created_at);
    Some(Template {
        template_id: name.to_string(),
        build_id: build_id(template.rootfs.digest.digest()),
        cpu_count: template.machine.cpus,
        memory_mb: template.machine.memory_mib,
        disk_size_mb: template.machine.disk_mib,
        public: true,
        aliases: vec![name.to_string()],
        names: vec![name.to_string()],
        created_at,
        updated_at: created_at,
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: 1,
        envd_version: ENVD_VERSION,
        build_status: BuildStatus::Ready,
    })
}

/// A template of a team.
pub(super) fn of_team(summary: &TemplateSummary) -> Template {
    let TemplateSummary { template, build, builds } = summary;
    let name = template.name.to_string();
    Template {
        template_id: template.id.to_string(),
        build_id: build.id.to_string(),
        cpu_count: build.cpus,
        memory_mb: build.memory_mib,
        disk_size_mb: build.disk_mib,
        public: false,
        aliases: vec![name.clone()],
        names: vec![name],
        created_at: to_millisecond(template.created_at),
        updated_at: to_millisecond(build.finished_at.unwrap_or(build.requested_at)),
        created_by: None,
        last_spawned_at: None,
        spawn_count: 0,
        build_count: *builds,
        envd_version: ENVD_VERSION,
        build_status: build.stage.into(),
    }
}

/// Clients expect the shape of a UUID.
fn build_id(digest: &str) -> String {
    let mut id = String::new();
    for (index, digit) in digest.chars().take(32).enumerate() {
        if matches!(index, 8 | 12 | 16 | 20) {
            id.push('-');
        }
        id.push(digit);
    }
    id
}

/// The template that a create would find by that name.
#[utoipa::path(get, path = "/templates/aliases/{alias}", tag = "templates", params(("alias" = String, Path)),
    responses((status = 200, body = TemplateAlias), (status = 404, body = ErrorBody)))]
pub(super) async fn alias(
    State(control): State<Arc<Control>>,
    caller: Caller,
    alias: Result<Path<String>, PathRejection>,
) -> Result<Json<TemplateAlias>, ApiError> {
    let Path(alias) = alias.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    let gateway = &control.gateway;
    if let Some(wanted) = Wanted::parse(&caller.team, &alias) {
        let tagged = gateway.store.tagged(&caller.team.id, wanted.name.as_str(), wanted.tag()).await?;
        if let Some((template, _)) = tagged {
            return Ok(Json(TemplateAlias { template_id: template.id.to_string(), public: false }));
        }
    }
    let data = gateway.config.data.clone();
    let found = tokio::task::spawn_blocking(move || lookup::of_machine(&data, &alias)).await;
    let (name, _) = found.map_err(ApiError::internal)??;
    Ok(Json(TemplateAlias { template_id: name.to_string(), public: true }))
}
