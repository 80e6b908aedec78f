//! Errors of the Connect protocol.

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;

/// The codes that the agent uses, of those that the protocol defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The caller went away.
    Canceled,
    /// What E2B's agent gives for errors that it has no code for.
    Unknown,
    /// The request can never succeed as it is.
    InvalidArgument,
    /// The call's deadline has passed.
    DeadlineExceeded,
    /// What the request names does not exist.
    NotFound,
    /// What the request would make exists.
    AlreadyExists,
    /// The user may not do this.
    PermissionDenied,
    /// A limit is reached.
    ResourceExhausted,
    /// The state of the system does not allow it.
    FailedPrecondition,
    /// The method or option is not served.
    Unimplemented,
    /// The agent or the system failed.
    Internal,
    /// Not now; another try may succeed.
    Unavailable,
    /// The caller did not say, or wrongly said, who it is.
    Unauthenticated,
}

impl Code {
    /// The code's name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Canceled => "canceled",
            Self::Unknown => "unknown",
            Self::InvalidArgument => "invalid_argument",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::PermissionDenied => "permission_denied",
            Self::ResourceExhausted => "resource_exhausted",
            Self::FailedPrecondition => "failed_precondition",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
            Self::Unauthenticated => "unauthenticated",
        }
    }

    /// The status of a unary response with this code.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Canceled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
            Self::InvalidArgument | Self::FailedPrecondition => StatusCode::BAD_REQUEST,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::AlreadyExists => StatusCode::CONFLICT,
            Self::PermissionDenied => StatusCode::FORBIDDEN,
            Self::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Self::Internal | Self::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
        }
    }
}

/// A call's error, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.name())]
pub struct Error {
    code: Code,
    message: String,
}

impl Error {
    /// An error with a message for the client's user.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The call took longer than its own deadline.
    pub fn deadline() -> Self {
        Self::new(Code::DeadlineExceeded, "the call's deadline has passed")
    }

    /// The error's code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The error's message.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "code": self.code.name(), "message": self.message })
    }

    /// The response of a unary call that failed.
    pub fn into_unary_response(self) -> Response {
        super::respond(self.code.status(), "application/json", Body::from(self.to_json().to_string()))
    }
}
