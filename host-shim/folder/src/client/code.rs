//! The Connect protocol's error codes and their JSON.

use std::fmt;

use http::StatusCode;
use serde::Deserialize;

use super::ClientError;

/// The longest text of a refusal that is kept.
const MAX_MESSAGE: usize = 4 << 10;

macro_rules! codes {
    ($($name:ident = $text:literal, $meaning:literal;)*) => {
        /// The kind of a refusal (connectrpc.com/docs/protocol, "Error Codes").
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $(#[doc = $meaning] $name,)*
        }

        impl Code {
            /// The code's name on the wire.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            fn parse(text: &str) -> Self {
                match text { $($text => Self::$name,)* _ => Self::Unknown }
            }
        }
    };
}

codes! {
    Canceled = "canceled", "The caller gave up.";
    Unknown = "unknown", "Nobody knows.";
    InvalidArgument = "invalid_argument", "The request makes no sense.";
    DeadlineExceeded = "deadline_exceeded", "It took too long.";
    NotFound = "not_found", "What was named is not there.";
    AlreadyExists = "already_exists", "What was to be made is there.";
    PermissionDenied = "permission_denied", "The user may not.";
    ResourceExhausted = "resource_exhausted", "A limit was met.";
    FailedPrecondition = "failed_precondition", "Not in this state.";
    Aborted = "aborted", "Another call interfered.";
    OutOfRange = "out_of_range", "Beyond the end.";
    Unimplemented = "unimplemented", "Not known here.";
    Internal = "internal", "The sandbox failed.";
    Unavailable = "unavailable", "Not now.";
    DataLoss = "data_loss", "Something was lost.";
    Unauthenticated = "unauthenticated", "No or a wrong token, or an unknown user.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Connect error has a name as its code, an error of /files the HTTP status.
#[derive(Deserialize)]
#[serde(untagged)]
enum Wire {
    Name(String),
    Status(u16),
}

#[derive(Deserialize)]
struct Refusal {
    code: Wire,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct EndOfStream {
    #[serde(default)]
    error: Option<Refusal>,
}

impl From<Refusal> for ClientError {
    fn from(refusal: Refusal) -> Self {
        // It can reach a terminal.
        let plain = |c: &char| *c == '\n' || !c.is_control();
        let message = refusal.message.chars().filter(plain).take(MAX_MESSAGE).collect();
        let code = match refusal.code {
            Wire::Name(name) => Code::parse(&name),
            Wire::Status(400 | 406) => Code::InvalidArgument,
            Wire::Status(401) => Code::Unauthenticated,
            Wire::Status(403) => Code::PermissionDenied,
            Wire::Status(404) => Code::NotFound,
            Wire::Status(503) => Code::Unavailable,
            Wire::Status(507) => Code::ResourceExhausted,
            Wire::Status(_) => Code::Internal,
        };
        Self::Call { code, message }
    }
}

/// The error in the body of a unary answer.
pub(super) fn refusal(body: &[u8]) -> Option<ClientError> {
    serde_json::from_slice::<Refusal>(body).ok().map(ClientError::from)
}

/// The error in a stream's last envelope, if there is one.
pub(super) fn end_of_stream(json: &[u8]) -> Result<(), ClientError> {
    match serde_json::from_slice::<EndOfStream>(json) {
        Ok(EndOfStream { error: None }) => Ok(()),
        Ok(EndOfStream { error: Some(refusal) }) => Err(refusal.into()),
        Err(error) => Err(ClientError::protocol("the JSON of a stream's end", error.to_string())),
    }
}

/// The error of an answer without a code ("HTTP to Error Code" of the protocol).
pub(super) fn of_status(status: StatusCode) -> ClientError {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    ClientError::Call { code, message: format!("the sandbox answered HTTP {status}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_typed_and_harmless() {
        let error =
            refusal(br#"{"code":"not_found","message":"no\u001b[2J such file","details":[]}"#).unwrap();
        assert_eq!(error.code(), Some(Code::NotFound));
        assert_eq!(error.to_string(), "no[2J such file (not_found)");
        assert_eq!(refusal(br#"{"code":"novel"}"#).unwrap().code(), Some(Code::Unknown));
        let file = refusal(br#"{"code":404,"message":"path '/x' does not exist"}"#).unwrap();
        assert_eq!(file.code(), Some(Code::NotFound));
        assert!(refusal(b"<html>").is_none());
        assert_eq!(of_status(StatusCode::UNAUTHORIZED).code(), Some(Code::Unauthenticated));
    }

    #[test]
    fn a_stream_ends_well_badly_or_not_at_all() {
        assert!(end_of_stream(b"{}").is_ok());
        assert!(end_of_stream(br#"{"metadata":{"a":["b"]}}"#).is_ok());
        let error = end_of_stream(br#"{"error":{"code":"internal","message":"x"}}"#).unwrap_err();
        assert_eq!(error.code(), Some(Code::Internal));
        assert!(matches!(end_of_stream(b""), Err(ClientError::Protocol { .. })));
    }
}
