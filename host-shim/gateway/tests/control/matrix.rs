//! Each route and each caller: nobody learns from an answer what another team has.
//!
//! ```text
//!                  no key   a wrong key   another team's key                        the team's own
//!  Everybody       ──────────────────── the same success ──────────────────
//!  Caller          401      401           its own answer, nothing of ours in it     `own`
//!  Sandbox         401      401           404, as for one that is not there         `own`
//!  Template        401      401           as for one that is not there              `own`
//!  Link            ───── the same refusal without the link's signature ─────
//! ```
//!
//! [`ROWS`] says for every route which of these it is; a route without a row fails the test that names it. A route that
//! names something else that a team owns gets a kind of its own here, with a way to make one.

use std::collections::BTreeMap;

use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use tiffin_gateway::control::SERVED;

use crate::gateway::{Answer, TestGateway};

/// What a route's answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum About {
    /// The machine: no key is needed.
    Everybody,
    /// The caller's team, or what all teams share.
    Caller,
    /// The sandbox in its path.
    Sandbox,
    /// The template in its path or body, and that template's build.
    Template,
    /// Whoever has the link, which is signed.
    Link,
}

struct Row {
    method: &'static str,
    path: &'static str,
    about: About,
    /// The status for the team's own key.
    own: u16,
    /// `{id}` is our sandbox's, or our template's.
    query: &'static str,
    /// `{id}` in it, too.
    body: fn() -> Value,
}

const fn row(method: &'static str, path: &'static str, about: About, own: u16) -> Row {
    Row { method, path, about, own, query: "", body: || Value::Null }
}

const fn with_body(
    method: &'static str,
    path: &'static str,
    about: About,
    own: u16,
    body: fn() -> Value,
) -> Row {
    Row { method, path, about, own, query: "", body }
}

use About::{Caller, Everybody, Link, Sandbox, Template};

const ROWS: &[Row] = &[
    with_body("POST", "/v2/sandboxes", Caller, 201, || json!({ "templateID": "base" })),
    with_body("POST", "/sandboxes", Caller, 201, || json!({ "templateID": "base" })),
    with_body("POST", "/v2/sandboxes/{sandboxID}/connect", Sandbox, 200, || json!({ "timeout": 60 })),
    with_body("POST", "/sandboxes/{sandboxID}/connect", Sandbox, 200, || json!({ "timeout": 60 })),
    row("GET", "/v2/sandboxes", Caller, 200),
    row("GET", "/sandboxes", Caller, 200),
    row("GET", "/sandboxes/{sandboxID}", Sandbox, 200),
    row("DELETE", "/sandboxes/{sandboxID}", Sandbox, 204),
    with_body("POST", "/sandboxes/{sandboxID}/timeout", Sandbox, 204, || json!({ "timeout": 60 })),
    with_body("POST", "/sandboxes/{sandboxID}/refreshes", Sandbox, 204, || json!({ "duration": 60 })),
    // Its agent is not there to be asked.
    row("GET", "/sandboxes/{sandboxID}/metrics", Sandbox, 502),
    Row { query: "?sandbox_ids={id}", ..row("GET", "/sandboxes/metrics", Caller, 200) },
    row("GET", "/sandboxes/{sandboxID}/logs", Sandbox, 200),
    row("GET", "/v2/sandboxes/{sandboxID}/logs", Sandbox, 200),
    // No WebSocket, which is said only to who may have one.
    row("GET", "/v1/sandboxes/{sandboxID}/tunnel", Sandbox, 400),
    row("GET", "/teams", Caller, 200),
    row("GET", "/templates", Caller, 200),
    row("GET", "/templates/aliases/{alias}", Caller, 200),
    row("POST", "/sandboxes/{sandboxID}/pause", Sandbox, 204),
    with_body("POST", "/sandboxes/{sandboxID}/resume", Sandbox, 409, || json!({ "timeout": 60 })),
    with_body("POST", "/sandboxes/{sandboxID}/fork", Sandbox, 201, || json!({ "count": 1 })),
    with_body("POST", "/sandboxes/{sandboxID}/snapshots", Sandbox, 201, || json!({})),
    row("GET", "/snapshots", Caller, 200),
    with_body("POST", "/v3/templates", Caller, 202, || json!({ "name": "another" })),
    with_body("POST", "/v2/templates", Caller, 202, || json!({ "alias": "another" })),
    with_body(
        "POST",
        "/v2/templates/{templateID}/builds/{buildID}",
        Template,
        202,
        || json!({ "fromImage": "none" }),
    ),
    row("GET", "/templates/{templateID}/builds/{buildID}/status", Template, 200),
    row("DELETE", "/templates/{templateID}/builds/{buildID}", Template, 204),
    row("GET", "/templates/{templateID}/files/{hash}", Template, 201),
    row("GET", "/templates/{templateID}/tags", Template, 200),
    row("DELETE", "/templates/{templateID}", Template, 204),
    // It has no build that has ended, so there is nothing to tag.
    with_body("POST", "/templates/tags", Template, 404, || json!({ "target": "{id}", "tags": ["a"] })),
    with_body("DELETE", "/templates/tags", Template, 404, || json!({ "name": "{id}", "tags": ["a"] })),
    row("PUT", "/uploads/{teamID}/{hash}", Link, 400),
    row("GET", "/health", Everybody, 200),
    row("GET", "/metrics", Everybody, 200),
    row("GET", "/openapi.json", Everybody, 200),
];

/// What nobody but our team may ever read.
const MARK: &str = "only-ours-may-read-this";

/// A build of ours, as its routes name it. An absent one has the same form.
struct Ours {
    id: String,
    build: String,
}

impl Ours {
    fn absent(&self) -> Self {
        let turned = |text: &str| {
            let parts = text.split('-').map(|part| part.chars().rev().collect::<String>());
            parts.collect::<Vec<_>>().join("-")
        };
        Self { id: turned(&self.id), build: turned(&self.build) }
    }
}

const HASH: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

impl Row {
    fn target(&self, ours: &Ours) -> String {
        let parts = self.path.split('/').map(|part| match part {
            "{sandboxID}" | "{templateID}" | "{teamID}" => &ours.id,
            "{buildID}" => &ours.build,
            "{hash}" => HASH,
            "{alias}" => "base",
            part => {
                assert!(!part.starts_with('{'), "{}: the matrix does not know {part}", self.path);
                part
            }
        });
        format!("{}{}", parts.collect::<Vec<_>>().join("/"), self.query.replace("{id}", &ours.id))
    }

    async fn call(&self, gateway: &TestGateway, key: Option<&str>, ours: &Ours) -> Answer {
        let mut request =
            Request::builder().method(self.method.parse::<Method>().unwrap()).uri(self.target(ours));
        // Links to uploads begin with the name that the client used.
        request = request.header("host", "gateway.test");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        let body = match (self.body)() {
            Value::Null => Full::default(),
            body => {
                request = request.header("content-type", "application/json");
                Full::from(body.to_string().replace("{id}", &ours.id))
            }
        };
        gateway.send(request.body(body).unwrap()).await
    }
}

/// What a client sees of an answer: all but what is different each time.
fn seen(answer: &Answer, ours: &Ours) -> (u16, BTreeMap<String, String>, String) {
    let fixed = answer.headers.iter().filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()));
    let headers = fixed.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
    (
        answer.status.as_u16(),
        headers.collect(),
        answer.text.replace(&ours.id, "<the id>").replace(&ours.build, "<the build>"),
    )
}

#[test]
fn every_route_has_a_row() {
    for route in SERVED {
        let rows = ROWS.iter().filter(|row| (row.method, row.path) == (route.method, route.path));
        let rows: Vec<_> = rows.collect();
        let [row] = rows[..] else {
            panic!(
                "{} {}: {} rows in tests/control/matrix.rs, expected one that says whose answer it is",
                route.method,
                route.path,
                rows.len()
            );
        };
        assert_eq!(!matches!(row.about, Everybody | Link), route.keyed, "{} {}", route.method, route.path);
        assert_eq!(row.about == Sandbox, route.path.contains("{sandboxID}"), "{}", route.path);
    }
    for row in ROWS {
        let is_served = SERVED.iter().any(|route| (row.method, row.path) == (route.method, route.path));
        assert!(is_served, "{} {} is no route any more", row.method, row.path);
    }
}

#[tokio::test]
async fn no_caller_learns_what_another_team_has() {
    let gateway = TestGateway::start().await;
    for row in ROWS {
        let name = format!("{} {}", row.method, row.path);
        // Its own: some of the routes end it.
        let id = gateway.create(json!({ "metadata": { "secret": MARK } })).await;
        let token = gateway.gateway.fleet.get(&id.parse().unwrap()).unwrap().record().access_token.unwrap();
        let ours = if row.about == Template {
            let name = json!({ "name": "ours" });
            let begun = gateway.post("/v3/templates", name).await;
            let begun: Value = serde_json::from_str(&begun.text).unwrap();
            let text = |name: &str| begun[name].as_str().unwrap().to_owned();
            Ours { id: text("templateID"), build: text("buildID") }
        } else {
            Ours { id: id.clone(), build: String::new() }
        };
        let absent = ours.absent();
        let wrong = "e2b_0000000000000000000000000000000000000000";
        let nobody = [None, Some(wrong)];
        let theirs = Some(gateway.theirs.as_str());

        for key in nobody.into_iter().chain([theirs]) {
            let there = row.call(&gateway, key, &ours).await;
            for secret in [MARK, &token, gateway.ours.as_str()] {
                assert!(!there.text.contains(secret), "{name} with {key:?}: {there:?}");
            }
            // Of 403 a client could tell that there is something.
            let status = there.status.as_u16();
            match row.about {
                Everybody => assert_eq!(status, row.own, "{name} with {key:?}: {there:?}"),
                _ if nobody.contains(&key) && row.about != Link => there.refuses(401, ""),
                Caller => assert!(there.status.is_success(), "{name} with another team's key: {there:?}"),
                Link => assert_eq!(status, row.own, "{name} with {key:?}: {there:?}"),
                Sandbox => there.refuses(404, ""),
                Template => assert!(there.status.is_client_error() && status != 403, "{name}: {there:?}"),
            }
            if matches!(row.about, Sandbox | Template) {
                let missing = row.call(&gateway, key, &absent).await;
                assert_eq!(seen(&there, &ours), seen(&missing, &absent), "{name} with {key:?}");
            } else if row.about == Caller && row.query.is_empty() {
                assert!(!there.text.contains(&id), "{name} with {key:?}: {there:?}");
            }
        }
        let own = row.call(&gateway, Some(gateway.ours.as_str()), &ours).await;
        assert_eq!(own.status.as_u16(), row.own, "{name} with our key: {own:?}");
        if row.path == "/v2/sandboxes" && row.method == "GET" {
            assert!(own.text.contains(MARK), "it would not be noticed: {own:?}");
        }
    }
}
