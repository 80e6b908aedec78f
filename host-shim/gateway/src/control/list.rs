//! Lists of a team's sandboxes, by pages that stay true while sandboxes come and go.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use sandbox_folder::SandboxId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::Control;
use super::access::Caller;
use super::body::{Params, shown};
use super::types::{ErrorBody, ListedSandbox, SandboxState, to_millisecond};
use crate::ApiError;
use crate::identity::TeamId;
use crate::store::SandboxRecord;

/// Sandboxes of a page, at most and by default (E2B's own limit).
pub(super) const MAX_PAGE: usize = 100;

/// Says where the next page begins; absent on the last one.
pub(super) const NEXT_TOKEN: &str = "x-next-token";

/// What a list asks for.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// `name=value&name=value`, each name and value percent-encoded, and the whole once more.
    metadata: Option<String>,
    /// `running`, `paused`, or both with a comma between.
    state: Option<String>,
    /// By the start: `asc`, or `desc` (the default).
    order: Option<String>,
    /// Only those that were started later (RFC 3339).
    started_after: Option<String>,
    /// Only those of the template with this id or alias.
    template: Option<String>,
    /// 1 to 100, the default.
    limit: Option<usize>,
    /// Where the page begins: X-Next-Token of the page before.
    next_token: Option<String>,
}

/// What the older list asks for.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct OldListQuery {
    /// As for /v2/sandboxes.
    metadata: Option<String>,
}

/// A page of the team's sandboxes. X-Next-Token of the answer says where the next one begins.
#[utoipa::path(get, path = "/v2/sandboxes", tag = "sandboxes", params(ListQuery),
    responses((status = 200, body = Vec<ListedSandbox>,
        headers(("X-Next-Token" = String, description = "where the next page begins; absent on the last one"))),
        (status = 400, body = ErrorBody)))]
pub(super) async fn list_v2(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Params(query): Params<ListQuery>,
) -> Result<(HeaderMap, Json<Vec<ListedSandbox>>), ApiError> {
    let query = Query::parse(query)?;
    let mut found = control.alive_of(&caller.team.id);
    found.retain(|sandbox| query.wants(sandbox));
    let more = query.page(&mut found);
    let mut headers = HeaderMap::new();
    if let (true, Some(last)) = (more, found.last()) {
        let token = HeaderValue::from_str(&Position::of(last).token()).map_err(ApiError::internal)?;
        headers.insert(NEXT_TOKEN, token);
    }
    Ok((headers, Json(found.into_iter().map(ListedSandbox::from).collect())))
}

/// All of the team's sandboxes that run, for older clients.
#[utoipa::path(get, path = "/sandboxes", tag = "sandboxes", params(OldListQuery),
    responses((status = 200, body = Vec<ListedSandbox>), (status = 400, body = ErrorBody)))]
pub(super) async fn list_v1(
    State(control): State<Arc<Control>>,
    caller: Caller,
    Params(query): Params<OldListQuery>,
) -> Result<Json<Vec<ListedSandbox>>, ApiError> {
    let wanted = metadata(query.metadata.as_deref().unwrap_or_default())?;
    let mut found = control.alive_of(&caller.team.id);
    found.retain(|sandbox| SandboxState::of(sandbox.stage) == SandboxState::Running && has(sandbox, &wanted));
    found.sort_by_key(|sandbox| std::cmp::Reverse(Position::of(sandbox)));
    Ok(Json(found.into_iter().map(ListedSandbox::from).collect()))
}

impl Control {
    fn alive_of(&self, team: &TeamId) -> Vec<SandboxRecord> {
        let all = self.gateway.fleet.all();
        let records = all.iter().map(|sandbox| sandbox.record());
        records.filter(|record| record.team == *team && record.stage.is_alive()).collect()
    }
}

/// Where a sandbox is among all: its place never changes, so a page that begins behind it misses and repeats nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) started_at: Timestamp,
    pub(super) id: SandboxId,
}

impl Position {
    fn of(record: &SandboxRecord) -> Self {
        Self { started_at: record.started_at, id: record.id.clone() }
    }

    pub(super) fn token(&self) -> String {
        BASE64.encode(format!("{} {}", self.started_at, self.id))
    }

    pub(super) fn parse(token: &str) -> Option<Self> {
        let text = String::from_utf8(BASE64.decode(token).ok()?).ok()?;
        let (started_at, id) = text.split_once(' ')?;
        Some(Self { started_at: started_at.parse().ok()?, id: id.parse().ok()? })
    }
}

/// A list's query, checked.
#[derive(Debug)]
struct Query {
    metadata: BTreeMap<String, String>,
    running: bool,
    paused: bool,
    ascending: bool,
    started_after: Option<Timestamp>,
    template: Option<String>,
    limit: usize,
    behind: Option<Position>,
}

impl Query {
    fn parse(query: ListQuery) -> Result<Self, ApiError> {
        let invalid = |what: &str, value: &str, expected: &str| {
            ApiError::bad_request(format!("invalid {what} {:?}: expected {expected}", shown(value)))
        };
        let states: Vec<&str> =
            query.state.iter().flat_map(|states| states.split(',')).map(str::trim).collect();
        if let Some(other) = states.iter().find(|state| !matches!(**state, "running" | "paused" | "")) {
            return Err(invalid("state", other, "`running`, `paused` or both with a comma between"));
        }
        let any = states.iter().all(|state| state.is_empty());
        let started_after = query.started_after.as_deref().map(|text| {
            // A `+` that was not encoded comes as a space.
            text.replace(' ', "+").parse().map_err(|_| invalid("startedAfter", text, "a time as in RFC 3339"))
        });
        let behind = query.next_token.as_deref().filter(|token| !token.is_empty()).map(|token| {
            Position::parse(token).ok_or_else(|| invalid("nextToken", token, "the X-Next-Token of a page"))
        });
        let limit = query.limit.unwrap_or(MAX_PAGE);
        if !(1..=MAX_PAGE).contains(&limit) {
            return Err(invalid("limit", &limit.to_string(), &format!("1 to {MAX_PAGE}")));
        }
        Ok(Self {
            metadata: metadata(query.metadata.as_deref().unwrap_or_default())?,
            running: any || states.contains(&"running"),
            paused: any || states.contains(&"paused"),
            ascending: match query.order.as_deref() {
                None | Some("" | "desc") => false,
                Some("asc") => true,
                Some(other) => return Err(invalid("order", other, "`asc` or `desc`")),
            },
            started_after: started_after.transpose()?,
            template: query.template.filter(|template| !template.is_empty()),
            limit,
            behind: behind.transpose()?,
        })
    }

    fn wants(&self, sandbox: &SandboxRecord) -> bool {
        // As the client saw the start of the last one that it knows.
        let later = |than: &Timestamp| to_millisecond(sandbox.started_at) > to_millisecond(*than);
        let named = |template: &String| {
            sandbox.template == *template || sandbox.alias.as_deref() == Some(template.as_str())
        };
        let position = Position::of(sandbox);
        let ahead = |last: &Position| if self.ascending { position > *last } else { position < *last };
        let in_state = match SandboxState::of(sandbox.stage) {
            SandboxState::Running => self.running,
            SandboxState::Paused => self.paused,
        };
        in_state
            && has(sandbox, &self.metadata)
            && self.started_after.as_ref().is_none_or(later)
            && self.template.as_ref().is_none_or(named)
            && self.behind.as_ref().is_none_or(ahead)
    }

    /// Cuts a page off; whether there is more.
    fn page(&self, found: &mut Vec<SandboxRecord>) -> bool {
        found.sort_by_key(Position::of);
        if !self.ascending {
            found.reverse();
        }
        let more = found.len() > self.limit;
        found.truncate(self.limit);
        more
    }
}

fn has(sandbox: &SandboxRecord, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(name, value)| sandbox.metadata.get(name) == Some(value))
}

/// The metadata filter behind the query's own decoding: clients encode each name and value, then make a query of them,
/// then encode that as a value.
fn metadata(text: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let decode = |text: &str| {
        let plain = text.replace('+', " ");
        let decoded = percent_decode_str(&plain).decode_utf8().map(|text| text.into_owned());
        decoded.map_err(|_| ApiError::bad_request("invalid metadata: expected percent-encoded UTF-8"))
    };
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or_else(|| {
                ApiError::bad_request(format!("invalid metadata {:?}: expected name=value", shown(pair)))
            })?;
            Ok((decode(&decode(name)?)?, decode(&decode(value)?)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_decoded_as_the_published_clients_encode_it() {
        // What is left of the wire's text when the query was decoded once. Python: urlencode({quote(k): quote(v)}); JavaScript:
        // new URLSearchParams({[encodeURIComponent(k)]: encodeURIComponent(v)}).
        for (text, name, value) in [
            ("user=abc", "user", "abc"),
            ("a%2520b=50%2525", "a b", "50%"),
            ("k=a%252Bb%2526c%253Dd", "k", "a+b&c=d"),
            ("k=%25C3%25A9", "k", "é"),
            // Encoded once only, by hand.
            ("k=a+b", "k", "a b"),
            ("k=", "k", ""),
        ] {
            let expected = [(name.to_owned(), value.to_owned())].into();
            assert_eq!(metadata(text), Ok(expected), "{text}");
        }
        assert_eq!(metadata("a=1&b=2").unwrap().len(), 2);
        assert!(metadata("").unwrap().is_empty());
        assert!(metadata("novalue").is_err());
        assert!(metadata("k=%25FF").is_err());
    }

    #[test]
    fn a_token_is_what_it_was_made_of_or_nothing() {
        let position = Position { started_at: Timestamp::now(), id: "abc1".parse().unwrap() };
        assert_eq!(Position::parse(&position.token()), Some(position));
        for bad in ["", "x", "é", &BASE64.encode("now abc1"), &BASE64.encode("2026-01-02T03:04:05Z ../x")] {
            assert_eq!(Position::parse(bad), None, "{bad}");
        }
    }
}
