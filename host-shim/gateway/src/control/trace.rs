//! An id, a span and a count for each request.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;
use tracing::field::Empty;

use super::Control;
use crate::ApiError;
use crate::identity::{hex, random};

/// Carries a request's id, both ways.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id of a client's that is taken over.
const MAX_REQUEST_ID: usize = 128;

/// The longest path; the longest of ours has two names of 255 bytes, percent-encoded.
const MAX_PATH: usize = 4096;

/// Follows a request from its route to its answer.
pub(super) async fn trace(State(control): State<Arc<Control>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>().cloned();
    // Never the path itself: it is the client's text.
    let route = matched.as_ref().map_or("none", MatchedPath::as_str);
    let span = tracing::info_span!(
        "request",
        id = id.to_str().unwrap_or_default(),
        %method,
        route,
        team = Empty,
        sandbox = Empty,
        status = Empty,
        duration_ms = Empty,
    );
    let mut response = next.run(request).instrument(span.clone()).await;
    let took = began.elapsed();
    span.record("status", response.status().as_u16());
    span.record("duration_ms", took.as_secs_f64() * 1e3);
    span.in_scope(|| tracing::info!("answered"));
    control.gateway.metrics.request_answered(&method, route, response.status(), took);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's id where it has a plain one, else one of our own.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    match headers.get(REQUEST_ID) {
        Some(id) if (1..=MAX_REQUEST_ID).contains(&id.len()) && id.as_bytes().iter().all(plain) => id.clone(),
        // Without randomness the request is still served, only harder to find in the log.
        _ => random::<8>()
            .ok()
            .and_then(|bytes| HeaderValue::from_str(&hex(&bytes)).ok())
            .unwrap_or_else(|| HeaderValue::from_static("none")),
    }
}

/// Turns away paths that name nothing of ours.
pub(super) async fn limit_names(request: Request, next: Next) -> Response {
    if request.uri().path().len() > MAX_PATH {
        let message = format!("the path is longer than {MAX_PATH} bytes");
        return ApiError::new(StatusCode::URI_TOO_LONG, message).into_response();
    }
    next.run(request).await
}
