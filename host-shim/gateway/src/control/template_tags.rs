//! Names of builds: tags of a team's templates; and the templates' end.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Control;
use super::access::Caller;
use super::body::Body;
use super::template_builds::no_template;
use super::types::{ErrorBody, to_millisecond};
use crate::ApiError;
use crate::builds::{DEFAULT_TAG, Wanted, checked_tags};
use crate::fleet::lookup;
use crate::store::TemplateRecord;

/// More tags for the build that a name stands for.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct AssignTags {
    /// `NAME:TAG`, or `NAME` for its tag `default`.
    target: String,
    tags: Vec<String>,
}

/// The build and the tags that it was given.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AssignedTags {
    tags: Vec<String>,
    #[serde(rename = "buildID")]
    build_id: String,
}

/// Tags that are taken away.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct DeleteTags {
    name: String,
    tags: Vec<String>,
}

/// A tag.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct TemplateTag {
    tag: String,
    #[serde(rename = "buildID")]
    build_id: String,
    /// Since when it names that build.
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

/// Gives tags to a build; a tag that named another one moves.
#[utoipa::path(post, path = "/templates/tags", tag = "templates", request_body = AssignTags,
    responses((status = 201, body = AssignedTags), (status = "4XX", body = ErrorBody)))]
pub(super) async fn assign(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Body(wanted): Body<AssignTags>,
) -> Result<(StatusCode, Json<AssignedTags>), ApiError> {
    let tags = at_least_one(checked_tags(&wanted.tags)?)?;
    let target = Wanted::parse(&caller.team, &wanted.target).ok_or_else(|| no_template(&wanted.target))?;
    let template = control.own_template(&caller, target.name.as_str()).await?;
    let assigned = control.gateway.store.assign_tags(&template.id, target.tag(), &tags).await?;
    let build = assigned.ok_or_else(|| no_template(&wanted.target))?;
    control.sweep_later();
    Ok((StatusCode::CREATED, Json(AssignedTags { tags, build_id: build.to_string() })))
}

/// Takes tags away. A build that no tag names any more goes, once no sandbox has it.
#[utoipa::path(delete, path = "/templates/tags", tag = "templates", request_body = DeleteTags,
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn remove(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Body(wanted): Body<DeleteTags>,
) -> Result<StatusCode, ApiError> {
    let tags = at_least_one(checked_tags(&wanted.tags)?)?;
    if tags.iter().any(|tag| tag == DEFAULT_TAG) {
        let message = format!(
            "the tag `{DEFAULT_TAG}` cannot be taken away: give it to another build, or delete the template"
        );
        return Err(ApiError::bad_request(message));
    }
    let target = Wanted::parse(&caller.team, &wanted.name).ok_or_else(|| no_template(&wanted.name))?;
    let template = control.own_template(&caller, target.name.as_str()).await?;
    if control.gateway.store.remove_tags(&template.id, &tags).await? == 0 {
        let message = format!("the template {} has none of these tags: {}", template.name, tags.join(", "));
        return Err(ApiError::not_found(message));
    }
    control.sweep_later();
    Ok(StatusCode::NO_CONTENT)
}

/// The tags of a template.
#[utoipa::path(get, path = "/templates/{templateID}/tags", tag = "templates", params(("templateID" = String, Path)),
    responses((status = 200, body = Vec<TemplateTag>), (status = "4XX", body = ErrorBody)))]
pub(super) async fn list(
    State(control): State<Arc<Control>>,
    caller: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Vec<TemplateTag>>, ApiError> {
    let Path(name) = name.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    let wanted = Wanted::parse(&caller.team, &name).ok_or_else(|| no_template(&name))?;
    let template = control.own_template(&caller, wanted.name.as_str()).await?;
    let tags = control.gateway.store.tags(&template.id).await?.into_iter().map(|tag| TemplateTag {
        tag: tag.tag,
        build_id: tag.build.to_string(),
        created_at: to_millisecond(tag.created_at),
    });
    Ok(Json(tags.collect()))
}

/// Deletes a snapshot by its id or name, or a template with its builds and tags. What was created from them goes on; builds of
/// the template are ended. The machine's templates are its operator's.
#[utoipa::path(delete, path = "/templates/{templateID}", tag = "templates", params(("templateID" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete(
    State(control): State<Arc<Control>>,
    caller: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let Path(name) = name.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    if control.gateway.fleet.delete_snapshot(&caller.team.id, &name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    // A tag would be one build of it, which is no template.
    let wanted = Wanted::parse(&caller.team, &name).filter(|wanted| wanted.tag.is_none());
    let own = match wanted {
        Some(wanted) => control.gateway.store.template(&caller.team.id, wanted.name.as_str()).await?,
        None => None,
    };
    let Some(template) = own else {
        let (data, machine) = (control.gateway.config.data.clone(), name.clone());
        let find = tokio::task::spawn_blocking(move || lookup::of_machine(&data, &machine)).await;
        return Err(match find.map_err(ApiError::internal)? {
            Ok(_) => {
                let message = format!("the template {name} is the machine's, and its operator's to delete");
                ApiError::new(StatusCode::FORBIDDEN, message)
            }
            Err(_) => no_template(&name),
        });
    };
    control.gateway.builds.delete(&template.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl Control {
    /// The caller's template of that name or id.
    async fn own_template(&self, caller: &Caller, name: &str) -> Result<TemplateRecord, ApiError> {
        let found = self.gateway.store.template(&caller.team.id, name).await?;
        found.ok_or_else(|| no_template(name))
    }

    /// What has lost its last tag goes; nobody waits for it.
    fn sweep_later(&self) {
        let gateway = Arc::clone(&self.gateway);
        tokio::spawn(async move { gateway.builds.sweep().await });
    }
}

fn at_least_one(tags: Vec<String>) -> Result<Vec<String>, ApiError> {
    if tags.is_empty() { Err(ApiError::bad_request("expected at least one tag")) } else { Ok(tags) }
}
