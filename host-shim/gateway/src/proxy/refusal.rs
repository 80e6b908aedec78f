//! What the proxy says when there is nothing to forward: the words that SDKs look for.
//!
//! The SDKs tell a sandbox that is gone from one whose server is not up by `was not found` and `port is not open` in the
//! text of a 502.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Version, header};
use http_body::Body as HttpBody;
use http_body_util::BodyExt;
use serde_json::json;

use super::route::Target;

/// How much of a refused request's body is read and thrown away. Unread bytes make the system reset the connection, and the
/// client may lose the answer with it.
const MAX_DISCARDED: usize = 1 << 20;

/// How long that may take.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a request was not forwarded, or got no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// There is no such sandbox, or it is not for requests yet or any more.
    NotFound,
    /// Nobody listens there.
    PortNotOpen,
    /// The connection ended before there was an answer.
    Broken(String),
    /// It is paused, and could not go on now.
    NotResumed(String),
    /// It needs a traffic token, and there is none.
    NoTrafficToken,
    /// It needs another traffic token.
    WrongTrafficToken,
}

impl Refusal {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NotFound | Self::PortNotOpen | Self::Broken(_) => StatusCode::BAD_GATEWAY,
            Self::NotResumed(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoTrafficToken | Self::WrongTrafficToken => StatusCode::FORBIDDEN,
        }
    }

    fn message(&self) -> String {
        let secured = "Sandbox is secured with traffic access token.";
        let header = super::headers::TRAFFIC_TOKEN;
        match self {
            Self::NotFound => "The sandbox was not found".into(),
            Self::PortNotOpen => "The sandbox is running but port is not open".into(),
            Self::Broken(why) => format!("The sandbox is running but the port gave no answer: {why}"),
            Self::NotResumed(why) => format!("The sandbox is paused and could not be resumed: {why}"),
            Self::NoTrafficToken => format!("{secured} Token header '{header}' is missing"),
            Self::WrongTrafficToken => format!("{secured} Provided token in header '{header}' is invalid"),
        }
    }

    /// The answer to a request for `target`.
    pub(super) fn answer(&self, target: &Target) -> Response {
        let status = self.status();
        let mut body = json!({
            "sandboxId": target.id,
            "message": self.message(),
            "code": status.as_u16(),
        });
        if matches!(self, Self::PortNotOpen | Self::Broken(_)) {
            body["port"] = target.port.into();
        }
        // The SDKs repeat a 502 unless they are told that it cannot help.
        let once = [("should-retry", HeaderValue::from_static("false"))];
        (status, once, Json(body)).into_response()
    }

    /// The same, for a request whose body nobody has read.
    pub(super) async fn answer_to<B>(&self, target: &Target, request: Request<B>) -> Response<Body>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        discard(request).await;
        self.answer(target)
    }
}

/// Reads a body that nobody wants, within bounds.
pub(crate) async fn discard(request: Request<impl HttpBody<Data = Bytes> + Unpin>) {
    // A stream of HTTP/2 is reset by itself. A client that waits for `100 Continue` has sent nothing, and reading would ask
    // it to.
    if request.version() == Version::HTTP_2 || request.headers().contains_key(header::EXPECT) {
        return;
    }
    let mut body = request.into_body();
    let reading = async {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, |data| data.len());
            if read > MAX_DISCARDED {
                break;
            }
        }
    };
    // Not read in time: then the answer goes out without that.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, reading).await;
}
