//! Browsers: any page may call the client door and read its answers (the Fetch standard, "CORS protocol").
//!
//! A page proves itself as every client does, with the access token in a header. There are no cookies here, so a page
//! gains nothing by running in the browser of somebody else.

use axum::body::Body;
use axum::response::Response;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HeaderName, HeaderValue, ORIGIN, VARY,
};
use http::{Method, Request, StatusCode};

/// Every method that the door serves.
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST");

/// What a page may read of an answer beside the few headers that are always open to it: those of the Connect protocol
/// and those of /files.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "Connect-Content-Encoding, Connect-Accept-Encoding, Connect-Protocol-Version, Content-Encoding, \
     Content-Disposition, Content-Range, Accept-Ranges, Accept-Post, Retry-After",
);

/// How long a browser may remember that, in seconds: the most that Chromium takes.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");

/// Answers what a browser asks before a call, and opens the answers of calls to the page that made them.
pub(super) async fn answer<F>(request: Request<Body>, call: impl FnOnce(Request<Body>) -> F) -> Response
where
    F: Future<Output = Response>,
{
    let headers = request.headers();
    if !headers.contains_key(ORIGIN) {
        return call(request).await;
    }
    let preflight =
        request.method() == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight { answer_preflight(&request) } else { call(request).await };
    response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    response.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    response
}

fn answer_preflight(request: &Request<Body>) -> Response {
    const ASKED: HeaderName = ACCESS_CONTROL_REQUEST_HEADERS;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    if let Some(asked) = request.headers().get(ASKED) {
        // Named one by one: a star does not cover Authorization.
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        headers.insert(VARY, HeaderValue::from_name(ASKED));
    }
    response
}
