//! Bodies and queries of requests, read within limits and parsed into what a route asks for.

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::ApiError;

/// The longest body: the largest environment and metadata of a create fit several times.
pub(super) const MAX_BODY: usize = 1 << 20;

/// How long a body may take to come.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// Characters of a client's own text that are shown back to it.
const MAX_SHOWN: usize = 64;

/// A client's own text, as much as an error message should carry of it.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The bytes of a JSON body; none where the client sent none.
#[derive(Debug)]
pub(super) struct Raw(pub(super) Bytes);

impl<S: Sync> FromRequest<S> for Raw {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
        let reading = Limited::new(request.into_body(), MAX_BODY).collect();
        let bytes = match tokio::time::timeout(BODY_DEADLINE, reading).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let message = format!("the body is longer than {MAX_BODY} bytes");
                return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
            }
            Ok(Err(error)) => return Err(ApiError::bad_request(format!("the body broke off: {error}"))),
            Err(_) => {
                let message = format!("the body did not come within {} s", BODY_DEADLINE.as_secs());
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        match content_type {
            Some(other) if !bytes.is_empty() && !is_json(other.as_bytes()) => {
                let message = format!(
                    "expected a body of type application/json, got {}",
                    shown(&String::from_utf8_lossy(other.as_bytes()))
                );
                Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
            }
            _ => Ok(Self(bytes)),
        }
    }
}

fn is_json(content_type: &[u8]) -> bool {
    let essence = content_type.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
}

impl Raw {
    /// What the body says. Fields that are not known are ignored: they are a newer client's.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        // No body and an empty object say the same: nothing.
        let text = if self.0.is_empty() { b"{}" } else { &self.0[..] };
        let Json(value) =
            Json::from_bytes(text).map_err(|rejection| ApiError::bad_request(rejection.body_text()))?;
        Ok(value)
    }
}

/// What a JSON body says.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Ok(Self(Raw::from_request(request, state).await?.parse()?))
    }
}

/// What the query says.
#[derive(Debug)]
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::bad_request(rejection.body_text())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body as HttpBody;
    use futures::stream::{self, StreamExt};

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_comes_is_given_up() {
        let begin = stream::iter([Ok::<_, std::io::Error>("{")]).chain(stream::pending());
        let request = Request::new(HttpBody::from_stream(begin));
        let error = Raw::from_request(request, &()).await.unwrap_err();
        assert_eq!(error.status, StatusCode::REQUEST_TIMEOUT);
        assert_eq!(error.message, "the body did not come within 30 s");
    }

    #[test]
    fn a_clients_text_is_cut_between_characters() {
        assert_eq!(shown("short"), "short");
        assert_eq!(shown(&"ä".repeat(100)), format!("{}…", "ä".repeat(MAX_SHOWN)));
    }
}
