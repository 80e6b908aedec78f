//! Why a request did not come to its end, and whether it is worth another.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use super::text::printable;

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may go well in a while.
    Transient {
        reason: String,
        /// What the registry asked to wait.
        after: Option<Duration>,
        /// Whether it is a limit on how much somebody may ask.
        limited: bool,
    },
    /// Nobody is there, at least now.
    Unreachable(String),
    /// The registry has no such thing.
    Missing(String),
    /// It will not go well another time.
    Final(String),
    /// This machine is at fault, or the user wants to stop: no other registry helps.
    Local(crate::error::Error),
}

#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    errors: Vec<RefusalError>,
}

#[derive(Deserialize)]
struct RefusalError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Failure {
    pub(super) fn transient(reason: impl Into<String>) -> Self {
        Self::Transient { reason: reason.into(), after: None, limited: false }
    }

    /// An answer that is not the one that was hoped for. `body` is the beginning of what came with it.
    pub(super) fn refused(
        what: &str,
        host: &str,
        status: StatusCode,
        after: Option<Duration>,
        body: &[u8],
    ) -> Self {
        let refusal: Refusal = serde_json::from_slice(body).unwrap_or_default();
        let mut text = refusal
            .errors
            .iter()
            .take(3)
            .map(|error| format!("{} {}", error.code, error.message))
            .collect::<Vec<_>>()
            .join("; ");
        if text.is_empty() && !body.starts_with(b"<") {
            text = String::from_utf8_lossy(body).into_owned();
        }
        let text = printable(&text);
        let colon = if text.is_empty() { "" } else { ": " };
        let reason = format!("{what}: {status}{colon}{text}");
        match status.as_u16() {
            404 => Self::Missing(reason),
            429 => Self::Transient { reason, after, limited: true },
            408 | 500 | 502 | 503 | 504 => Self::Transient { reason, after, limited: false },
            401 | 403 => Self::Final(format!(
                "{reason}; it may be private, or not be there: log in with `image-builder login {host}`"
            )),
            _ => Self::Final(reason),
        }
    }

    /// The reason for people.
    pub(super) fn reason(&self, host: &str) -> String {
        match self {
            Self::Transient { reason, limited: false, .. } | Self::Unreachable(reason) => reason.clone(),
            Self::Missing(reason) | Self::Final(reason) => reason.clone(),
            Self::Transient { reason, after, limited: true } => {
                let wait = match after {
                    Some(after) => format!(" in {} s", after.as_secs()),
                    None => " later".to_owned(),
                };
                format!(
                    "{reason}\nThe registry limits how much one address or account may ask of it. Try again{wait}, log in for \
                     a higher limit (`image-builder login {host}`), or name a mirror in registries.conf"
                )
            }
            Self::Local(error) => error.to_string(),
        }
    }
}

/// `Retry-After`: seconds or a date (RFC 9110, section 10.2.3).
pub(super) fn retry_after(header: &str) -> Option<Duration> {
    if let Ok(seconds) = header.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(header).ok()?;
    Some(date.duration_since(std::time::SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after("17"), Some(Duration::from_secs(17)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let later = std::time::SystemTime::now() + Duration::from_secs(1000);
        let wait = retry_after(&httpdate::fmt_http_date(later)).unwrap().as_secs();
        assert!((900..=1000).contains(&wait), "{wait}");
        for bad in ["", "-1", "soon", "99999999999999999999999"] {
            assert_eq!(retry_after(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_refusal_is_repeated_in_part_and_says_what_to_do() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m","detail":{"x":1}}]}"#;
        let refused = |status: u16, body: &[u8]| {
            Failure::refused("manifest x", "reg.example", StatusCode::from_u16(status).unwrap(), None, body)
                .reason("reg.example")
        };
        let denied = refused(403, body);
        assert!(
            denied.contains("DENIED no [31m") && denied.contains("image-builder login reg.example"),
            "{denied}"
        );
        let limited = refused(429, b"");
        assert!(limited.contains("mirror") && limited.contains("Try again later"), "{limited}");
        assert!(!refused(502, b"<html>").contains("html"));
        assert!(refused(418, &[b'x'; 8000]).len() < 700);
        let deep = format!("{{\"errors\":{}", "[".repeat(8000));
        assert!(refused(400, deep.as_bytes()).len() < 700);
    }
}
