//! The control API: create, list, end sandboxes.
//!
//! ```text
//! request ─► trace ─► the route ─► auth ─────► Caller ─► Own ─────────────► the answer
//!            id,      or 404, 405  key → team, or 401    the team's own      JSON, also where it refuses
//!            span,    in JSON      not too fast, or 429  sandbox, or 404
//!            counts
//! ```
//!
//! [`SERVED`] and [`NOT_SERVED`] are the whole surface: the router is made from them, the README's table too, and a test
//! holds the OpenAPI document against them. Names, defaults and words are those that the published SDKs expect.

mod access;
mod agent;
mod body;
mod create;
mod fork;
pub(crate) mod limit;
mod list;
mod logs;
mod machine;
mod metrics;
mod not_served;
mod openapi;
mod routes;
mod sandbox;
mod snapshots;
mod template_builds;
mod template_files;
mod template_tags;
mod templates;
mod trace;
mod tunnel;
mod types;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use tokio::sync::{Mutex, Semaphore};

use crate::tunnel::Seats;
use crate::{ApiError, Gateway};
use create::InFlight;

use crate::rate::Rates;

pub use not_served::{NOT_SERVED, NotServed};
pub use openapi::openapi;
pub use routes::{Route, SERVED};

/// What stands for the node in E2B's answers; the same everywhere, and part of the ids that 1.x clients build.
pub const CLIENT_ID: &str = "6532622b";

/// The version of E2B's envd whose features the agent has. Clients ask for nothing that is newer; the newest that they ask
/// for is of 0.6.4 (watching network mounts). Later ones have calls that the agent has not (`/files/compose`).
pub const ENVD_VERSION: &str = "0.6.4";

/// Marks a request that came over TLS: addresses in its answer begin with https.
#[derive(Clone, Copy, Debug)]
pub struct OverTls;

/// How far away a sandbox's end may be.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Reads of log files at a time, each of some MiB.
const LOG_READS: usize = 4;

/// What the control API's answers need beside the gateway itself.
#[derive(Debug)]
struct Control {
    gateway: Arc<Gateway>,
    /// Held from the look at a sandbox's end to its change: of two that extend it, the longer wins.
    ends: Mutex<()>,
    creates: InFlight,
    log_reads: Semaphore,
    rates: Rates,
    asked: limit::Asked,
    tunnels: Seats,
}

/// The control API, for as many requests as come.
pub fn router(gateway: Arc<Gateway>) -> Router {
    router_within(gateway, Rates::UNLIMITED)
}

/// The control API within limits. Addresses are known where the requests come from [`crate::server`].
pub fn router_within(gateway: Arc<Gateway>, rates: Rates) -> Router {
    let control = Arc::new(Control {
        gateway,
        ends: Mutex::new(()),
        creates: InFlight::default(),
        log_reads: Semaphore::new(LOG_READS),
        rates,
        asked: limit::Asked::default(),
        tunnels: Seats::default(),
    });
    let (mut keyed, mut open) = (Router::new(), Router::new());
    for route in SERVED {
        let router = if route.keyed && !route.or_token { &mut keyed } else { &mut open };
        *router = std::mem::take(router).route(route.path, (route.answer)());
    }
    for route in NOT_SERVED {
        keyed = keyed.route(route.path, route.answer());
    }
    keyed
        .route_layer(from_fn_with_state(Arc::clone(&control), access::authenticate))
        .merge(open.route_layer(from_fn_with_state(Arc::clone(&control), limit::keyless)))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(trace::limit_names))
        .layer(from_fn_with_state(Arc::clone(&control), trace::trace))
        .with_state(control)
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {method} {} (see /openapi.json)", body::shown(uri.path())))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} does not take {method} (see /openapi.json)",
        body::shown(uri.path())
    ))
}
