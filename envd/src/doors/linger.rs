//! What becomes of a request's body that its call does not read to the end.
//!
//! A call that is refused is answered while its client may still be sending. To close the connection then would cost the
//! client the answer: what it sends next is answered with a reset, and many clients read only once they have sent all. So
//! the rest of a body is taken and thrown away beside the answer (RFC 9112, 9.6), for a while.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::runtime::Handle;

/// How long the rest of a body is taken in all.
const LINGER: Duration = Duration::from_secs(30);

/// How long a client may send nothing of it meanwhile.
const STALL: Duration = Duration::from_secs(5);

/// A request's body that is taken to its end also when it is dropped.
#[derive(Debug)]
pub(super) struct Lingering {
    body: Option<Incoming>,
    /// The client sends nothing before it is told to.
    waits: bool,
    runtime: Handle,
}

impl Lingering {
    /// The body of a request with these headers. Must be called within a tokio runtime.
    pub(super) fn new(body: Incoming, headers: &HeaderMap) -> Self {
        let expect = headers.get(header::EXPECT).map(http::HeaderValue::as_bytes);
        let waits = expect.is_some_and(|expect| expect.eq_ignore_ascii_case(b"100-continue"));
        Self { body: Some(body), waits, runtime: Handle::current() }
    }
}

impl Body for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        // Whoever reads it has the client told.
        self.waits = false;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take() else { return };
        if body.is_end_stream() || self.waits {
            return;
        }
        self.runtime.spawn(async move {
            let rest =
                async { while let Ok(Some(Ok(_))) = tokio::time::timeout(STALL, body.frame()).await {} };
            let _ = tokio::time::timeout(LINGER, rest).await;
        });
    }
}
