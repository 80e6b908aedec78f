//! How a tunnel ends, and the code that the client is told with it (RFC 6455, 7.4).

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite;

use super::session::Violation;
use super::{IDLE, MAX_MESSAGE, SILENCE};

/// How long the closing may take: the last frame out, and the client's answer to it in.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest reason: a control frame has 125 bytes, two are the code (RFC 6455, 5.5).
const MAX_REASON: usize = 123;

/// The sandbox is gone; no WebSocket to it will ever work again.
const SANDBOX_ENDED: u16 = 4410;

/// Nothing happened for too long.
const TIMED_OUT: u16 = 4408;

/// Why a tunnel ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client has closed the WebSocket.
    Closed,
    /// The client has said, in yamux, that it leaves.
    Left,
    /// The connection broke.
    Lost,
    /// The sandbox has ended.
    Sandbox,
    /// The gateway stops.
    Stopping,
    /// The client breaks the rules of yamux.
    Violation(Violation),
    /// The client breaks the rules of WebSocket.
    Malformed(String),
    /// A message is too long.
    TooLong,
    /// A message is text.
    Text,
    /// The client causes more answers than it reads.
    Flood,
    /// The client said nothing for too long.
    Silent,
    /// There was no stream for too long.
    Idle,
}

impl End {
    /// What a message could not be read for.
    pub(super) fn of(error: axum::Error) -> Self {
        use tungstenite::Error;
        match error.into_inner().downcast::<Error>().map(|error| *error) {
            Ok(Error::Capacity(_)) => Self::TooLong,
            Ok(error @ (Error::Protocol(_) | Error::Utf8(_))) => Self::Malformed(error.to_string()),
            _ => Self::Lost,
        }
    }

    /// The code and the reason; none where the client needs no telling.
    fn code(&self) -> Option<(u16, String)> {
        Some(match self {
            Self::Closed | Self::Lost => return None,
            Self::Left => (1000, String::new()),
            Self::Stopping => (1001, "the gateway stops; the sandbox goes on".into()),
            Self::Violation(violation) => (1002, violation.to_string()),
            Self::Malformed(why) => (1002, why.clone()),
            Self::Text => (1003, "expected binary messages".into()),
            Self::Flood => (1008, "too many frames were caused and not read".into()),
            Self::TooLong => (1009, format!("a message is longer than {MAX_MESSAGE} bytes")),
            Self::Silent => (TIMED_OUT, format!("nothing came for {} seconds", SILENCE.as_secs())),
            Self::Idle => (TIMED_OUT, format!("no stream for {} seconds", IDLE.as_secs())),
            Self::Sandbox => (SANDBOX_ENDED, "the sandbox has ended".into()),
        })
    }
}

/// Tells the client, and waits for its answer: closed before that, the connection may lose what was told.
pub(super) async fn close(
    mut sink: SplitSink<WebSocket, Message>,
    mut messages: SplitStream<WebSocket>,
    end: &End,
) {
    let closing = async {
        if let Some((code, mut reason)) = end.code() {
            while reason.len() > MAX_REASON {
                reason.pop();
            }
            sink.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await?;
        }
        // This sends the answer to the client's own frame too.
        while let Some(Ok(_)) = messages.next().await {}
        Ok::<_, axum::Error>(())
    };
    // Not in time, or broken: then it ends without.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, closing).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_fits_into_its_frame() {
        let window = Violation::Window { stream: u32::MAX, length: u32::MAX, window: u32::MAX };
        for end in [
            End::Left,
            End::Sandbox,
            End::Stopping,
            End::Violation(window),
            End::Violation(Violation::Credit { stream: u32::MAX }),
            End::TooLong,
            End::Text,
            End::Flood,
            End::Silent,
            End::Idle,
        ] {
            let (_, reason) = end.code().unwrap();
            assert!(reason.len() <= MAX_REASON, "{reason}");
        }
        assert!(End::Lost.code().is_none());
    }
}
