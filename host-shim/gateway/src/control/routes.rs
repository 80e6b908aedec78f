//! The routes that are served.

use std::sync::Arc;

use axum::routing::{MethodRouter, delete, get, post, put};

use super::{
    Control, create, fork, list, logs, machine, metrics, sandbox, snapshots, template_builds, template_files,
    template_tags, templates, tunnel,
};

/// A route that is served.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The method.
    pub method: &'static str,
    /// The path, with `{names}`.
    pub path: &'static str,
    /// Whether it needs a team's key.
    pub keyed: bool,
    /// Whether a sandbox's access token does as well. The answer then looks at both by itself.
    pub or_token: bool,
    pub(super) answer: fn() -> MethodRouter<Arc<Control>>,
}

/// A route that needs a key.
const fn keyed(
    method: &'static str,
    path: &'static str,
    answer: fn() -> MethodRouter<Arc<Control>>,
) -> Route {
    Route { method, path, keyed: true, or_token: false, answer }
}

/// A route for everybody.
const fn open(path: &'static str, answer: fn() -> MethodRouter<Arc<Control>>) -> Route {
    Route { method: "GET", path, keyed: false, or_token: false, answer }
}

/// A route that needs a key, or the access token of the sandbox that it names.
const fn keyed_or_token(path: &'static str, answer: fn() -> MethodRouter<Arc<Control>>) -> Route {
    Route { method: "GET", path, keyed: true, or_token: true, answer }
}

/// Every route that is served.
pub const SERVED: &[Route] = &[
    keyed("POST", "/v2/sandboxes", || post(create::create_v2)),
    keyed("POST", "/sandboxes", || post(create::create_v1)),
    keyed("POST", "/v2/sandboxes/{sandboxID}/connect", || post(sandbox::connect_v2)),
    keyed("POST", "/sandboxes/{sandboxID}/connect", || post(sandbox::connect_v1)),
    keyed("POST", "/sandboxes/{sandboxID}/pause", || post(sandbox::pause)),
    keyed("POST", "/sandboxes/{sandboxID}/resume", || post(sandbox::resume)),
    keyed("POST", "/sandboxes/{sandboxID}/fork", || post(fork::fork)),
    keyed("POST", "/sandboxes/{sandboxID}/snapshots", || post(snapshots::create)),
    keyed("GET", "/snapshots", || get(snapshots::list)),
    keyed("GET", "/v2/sandboxes", || get(list::list_v2)),
    keyed("GET", "/sandboxes", || get(list::list_v1)),
    keyed("GET", "/sandboxes/{sandboxID}", || get(sandbox::info)),
    keyed("DELETE", "/sandboxes/{sandboxID}", || delete(sandbox::kill)),
    keyed("POST", "/sandboxes/{sandboxID}/timeout", || post(sandbox::set_timeout)),
    keyed("POST", "/sandboxes/{sandboxID}/refreshes", || post(sandbox::refresh)),
    keyed("GET", "/sandboxes/{sandboxID}/metrics", || get(metrics::of_sandbox)),
    keyed("GET", "/sandboxes/metrics", || get(metrics::of_sandboxes)),
    keyed("GET", "/sandboxes/{sandboxID}/logs", || get(logs::logs_v1)),
    keyed("GET", "/v2/sandboxes/{sandboxID}/logs", || get(logs::logs_v2)),
    keyed_or_token("/v1/sandboxes/{sandboxID}/tunnel", || get(tunnel::open)),
    keyed("GET", "/teams", || get(machine::teams)),
    keyed("GET", "/templates", || get(templates::list)),
    keyed("GET", "/templates/aliases/{alias}", || get(templates::alias)),
    keyed("POST", "/v3/templates", || post(template_builds::request_v3)),
    keyed("POST", "/v2/templates", || post(template_builds::request_v2)),
    keyed("POST", "/v2/templates/{templateID}/builds/{buildID}", || post(template_builds::start)),
    keyed("GET", "/templates/{templateID}/builds/{buildID}/status", || get(template_builds::status)),
    keyed("DELETE", "/templates/{templateID}/builds/{buildID}", || delete(template_builds::cancel)),
    keyed("GET", "/templates/{templateID}/files/{hash}", || get(template_files::link)),
    keyed("DELETE", "/templates/{templateID}", || delete(template_tags::delete)),
    keyed("GET", "/templates/{templateID}/tags", || get(template_tags::list)),
    keyed("POST", "/templates/tags", || post(template_tags::assign)),
    keyed("DELETE", "/templates/tags", || delete(template_tags::remove)),
    // Signed in its query: the clients send no key with it.
    Route {
        method: "PUT",
        path: "/uploads/{teamID}/{hash}",
        keyed: false,
        or_token: false,
        answer: || put(template_files::receive),
    },
    open("/health", || get(machine::health)),
    open("/metrics", || get(machine::metrics)),
    open("/openapi.json", || get(machine::document)),
];
