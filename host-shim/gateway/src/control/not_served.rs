//! What clients know and this gateway does not serve yet: answered 501, in the document, and in the README's table.

use std::sync::Arc;

use axum::routing::{MethodFilter, MethodRouter, on};

use super::Control;
use crate::ApiError;

/// A route that is answered with 501.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotServed {
    /// The method.
    pub method: &'static str,
    /// The path, with `{names}`.
    pub path: &'static str,
    /// What it would do.
    pub what: &'static str,
}

impl NotServed {
    pub(super) fn answer(self) -> MethodRouter<Arc<Control>> {
        let filter = match self.method {
            "GET" => MethodFilter::GET,
            "POST" => MethodFilter::POST,
            "PUT" => MethodFilter::PUT,
            "PATCH" => MethodFilter::PATCH,
            _ => MethodFilter::DELETE,
        };
        on(filter, move || async move { ApiError::not_served(self.what) })
    }
}

const fn not(method: &'static str, path: &'static str, what: &'static str) -> NotServed {
    NotServed { method, path, what }
}

/// The first way to build templates, which needs a registry of the gateway's own and Docker at the client's.
const DOCKER_PUSH: &str =
    "building a template by docker push (use Template.build of the SDKs, or `e2b template create`)";

/// Every route that is answered with 501.
pub const NOT_SERVED: &[NotServed] = &[
    not("PUT", "/sandboxes/{sandboxID}/network", "changing a sandbox's network"),
    not("POST", "/templates", DOCKER_PUSH),
    not("POST", "/templates/{templateID}", DOCKER_PUSH),
    not("POST", "/templates/{templateID}/builds/{buildID}", DOCKER_PUSH),
    not("PATCH", "/templates/{templateID}", "publishing a template"),
    not("PATCH", "/v2/templates/{templateID}", "publishing a template"),
    not("GET", "/volumes", "volumes"),
    not("POST", "/volumes", "volumes"),
    not("GET", "/volumes/{volumeID}", "volumes"),
    not("DELETE", "/volumes/{volumeID}", "volumes"),
    not("GET", "/volumecontent/{volumeID}/dir", "volumes"),
    not("POST", "/volumecontent/{volumeID}/dir", "volumes"),
    not("GET", "/volumecontent/{volumeID}/file", "volumes"),
    not("PUT", "/volumecontent/{volumeID}/file", "volumes"),
    not("GET", "/volumecontent/{volumeID}/path", "volumes"),
    not("PATCH", "/volumecontent/{volumeID}/path", "volumes"),
    not("DELETE", "/volumecontent/{volumeID}/path", "volumes"),
    not("GET", "/secrets", "secrets"),
    not("POST", "/secrets", "secrets"),
    not("GET", "/secrets/{secretID}", "secrets"),
    not("POST", "/secrets/{secretID}", "secrets"),
    not("DELETE", "/secrets/{secretID}", "secrets"),
];
