//! Who calls, and what of the machine is theirs.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sandbox_folder::SandboxId;

use super::{CLIENT_ID, Control, body};
use crate::ApiError;
use crate::fleet::{Sandbox, must_run};
use crate::identity::{KeyHash, TeamId};
use crate::store::Team;

/// The longest key that is looked up; ours have 44 characters.
const MAX_KEY: usize = 256;

/// The team that calls.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) team: Team,
    /// The key as it was sent.
    pub(super) key: Arc<str>,
}

/// Lets only requests with a team's key through.
///
/// The key's hash is looked up, not the key: how long the look-up takes tells about the hash only.
pub(super) async fn authenticate(
    State(control): State<Arc<Control>>,
    mut request: Request,
    next: Next,
) -> Response {
    match caller(&control, request.headers()).await {
        Ok(caller) => {
            let (asked, metrics) = (&control.asked, &control.gateway.metrics);
            if let Err(error) = asked.by_team(&caller.team, control.rates, metrics) {
                return error.into_response();
            }
            tracing::Span::current().record("team", tracing::field::display(&caller.team.id));
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            let (asked, metrics) = (&control.asked, &control.gateway.metrics);
            let refused = asked.by_address(request.extensions(), control.rates, metrics);
            refused.err().unwrap_or(error).into_response()
        }
    }
}

pub(super) async fn caller(control: &Control, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let key = api_key(headers).ok_or_else(|| {
        ApiError::unauthorized(
            "authorization header is missing: send a key of `tiffin-gateway keys create` as X-API-KEY",
        )
    })?;
    let unknown = || ApiError::unauthorized("Cannot get the team for the given API key");
    if key.len() > MAX_KEY {
        return Err(unknown());
    }
    let team = control.gateway.store.team_by_key(&KeyHash::of(key)).await?.ok_or_else(unknown)?;
    Ok(Caller { team, key: key.into() })
}

/// `X-API-KEY`, or the `Authorization: Bearer` of old clients.
fn api_key(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get("x-api-key") {
        // What is no text is a key that nobody has.
        return Some(key.to_str().unwrap_or_default());
    }
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

impl FromRequestParts<Arc<Control>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Control>) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| ApiError::internal("a route that needs a key was reached without one"))
    }
}

/// The running sandbox that the path names, if it is the caller's; 409 for one that is paused.
#[derive(Debug)]
pub(super) struct Own(pub(super) Arc<Sandbox>);

impl FromRequestParts<Arc<Control>> for Own {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, control: &Arc<Control>) -> Result<Self, ApiError> {
        let OwnAnyStage(sandbox) = OwnAnyStage::from_request_parts(parts, control).await?;
        must_run(&sandbox)?;
        Ok(Self(sandbox))
    }
}

/// The same, awake or asleep.
#[derive(Debug)]
pub(super) struct OwnAlive(pub(super) Arc<Sandbox>);

impl FromRequestParts<Arc<Control>> for OwnAlive {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, control: &Arc<Control>) -> Result<Self, ApiError> {
        let OwnAnyStage(sandbox) = OwnAnyStage::from_request_parts(parts, control).await?;
        match sandbox.record().stage.is_alive() {
            true => Ok(Self(sandbox)),
            false => Err(ApiError::no_sandbox(sandbox.id().as_str())),
        }
    }
}

/// The same, also while it is being ended: whoever ends it again waits for that.
#[derive(Debug)]
pub(super) struct OwnAnyStage(pub(super) Arc<Sandbox>);

impl FromRequestParts<Arc<Control>> for OwnAnyStage {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, control: &Arc<Control>) -> Result<Self, ApiError> {
        let Caller { team, .. } = Caller::from_request_parts(parts, control).await?;
        let mut names = Path::<BTreeMap<String, String>>::from_request_parts(parts, control)
            .await
            .map_err(|_| ApiError::no_sandbox("?"))?;
        let id = names.remove("sandboxID").unwrap_or_default();
        let sandbox = control.own(&team.id, &id).ok_or_else(|| ApiError::no_sandbox(&body::shown(&id)))?;
        tracing::Span::current().record("sandbox", tracing::field::display(&sandbox.record().id));
        Ok(Self(sandbox))
    }
}

impl Control {
    /// The team's sandbox of that id.
    pub(super) fn own(&self, team: &TeamId, id: &str) -> Option<Arc<Sandbox>> {
        self.find(id).filter(|sandbox| sandbox.record().team == *team)
    }

    /// The sandbox of that id, whosever it is. Clients of 1.x say `<id>-<client id>`.
    pub(super) fn find(&self, id: &str) -> Option<Arc<Sandbox>> {
        let plain = id.strip_suffix(CLIENT_ID).and_then(|rest| rest.strip_suffix('-')).unwrap_or(id);
        let id: SandboxId = plain.parse().ok()?;
        self.gateway.fleet.get(&id)
    }
}
