//! A request to a sandbox's port, and the answer, streamed.
//!
//! Nothing is collected and nothing is timed: a frame goes on as it comes, in both directions, and a reader that stops
//! reading stops the writer. When either side goes, so does the other: the client's end drops the answer, and with it the
//! connection to the sandbox; the sandbox's end is an error of the body, and the client sees its answer cut, never ended.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Method, Request, StatusCode, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use sandbox_folder::SandboxId;

use super::headers::{self, ToPort};
use super::pool::Pool;
use super::refusal::Refusal;
use super::route::Target;
use super::upstream::{self, Counted, DialError, SendError, Upstream};
use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::{Direction, OpenStream, StreamKind};

/// What a request could not be forwarded for; the request, where nobody has read of it.
pub(super) type Failed = (Refusal, Option<Box<Request<Counted>>>);

/// Sends a request to a port of `sandbox`; gives the answer's head with a body that streams.
pub(super) async fn forward(
    gateway: &Arc<Gateway>,
    pool: &Arc<Pool>,
    sandbox: &Arc<Sandbox>,
    target: &Target,
    peer: IpAddr,
    request: Request<Incoming>,
) -> Result<Response, Failed> {
    let to = super::listener(target.port);
    let method = request.method().clone();
    let request = prepare(gateway, request, to, peer);
    let may_switch = request.headers().contains_key(header::UPGRADE);
    let answered = tokio::select! {
        answered = send(pool, sandbox, to, target, request) => answered,
        () = sandbox.gone() => Err((Refusal::NotFound, None)),
    };
    let (response, upstream) = answered?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS && !may_switch {
        return Err((Refusal::Broken("it switches protocols without being asked".into()), None));
    }
    let (mut head, body) = response.into_parts();
    // Only its end says where this body ends, and a machine that dies ends it too.
    let ends_unsaid = method != Method::HEAD
        && !body.is_end_stream()
        && !head.headers.contains_key(header::CONTENT_LENGTH)
        && !head.headers.contains_key(header::TRANSFER_ENCODING)
        && head.status != StatusCode::SWITCHING_PROTOCOLS;
    headers::to_client(head.status, &mut head.headers);
    // The version is the connection's matter: hyper writes the client's.
    head.version = http::Version::default();
    let end = if ends_unsaid { End::Unsaid(Arc::clone(sandbox)) } else { End::Said };
    let idle = (to == ToPort::Agent).then(|| (Arc::clone(pool), target.id.clone()));
    let body = Streamed {
        body,
        end,
        upstream: Some(upstream),
        idle,
        gateway: Arc::clone(gateway),
        _open: gateway.metrics.stream_opened(StreamKind::Http),
    };
    Ok(Response::from_parts(head, Body::new(body)))
}

fn prepare(
    gateway: &Arc<Gateway>,
    request: Request<Incoming>,
    to: ToPort,
    peer: IpAddr,
) -> Box<Request<Counted>> {
    let (mut head, body) = request.into_parts();
    headers::to_sandbox(&mut head, to, peer, !body.is_end_stream());
    Box::new(Request::from_parts(head, Counted::new(body, gateway)))
}

async fn send(
    pool: &Pool,
    sandbox: &Arc<Sandbox>,
    to: ToPort,
    target: &Target,
    mut request: Box<Request<Counted>>,
) -> Result<(http::Response<Incoming>, Upstream), Failed> {
    if to == ToPort::Agent {
        while let Some(mut upstream) = pool.take(&target.id) {
            match upstream.send(*request).await {
                Ok(response) => return Ok((response, upstream)),
                // It was closed while it waited.
                Err(SendError::Unsent(unsent)) => request = unsent,
                Err(SendError::Sent(error)) => return Err((broken(sandbox, &error).await, None)),
            }
        }
    }
    let mut upstream = match Upstream::dial(sandbox, to, target.port).await {
        Ok(upstream) => upstream,
        Err(DialError::Gone) => return Err((Refusal::NotFound, Some(request))),
        Err(DialError::Closed) => return Err((Refusal::PortNotOpen, Some(request))),
        Err(DialError::Broken(why)) => return Err((Refusal::Broken(why), Some(request))),
    };
    match upstream.send(*request).await {
        Ok(response) => Ok((response, upstream)),
        Err(SendError::Unsent(request)) => {
            let why = "the connection was closed at once".to_owned();
            Err((
                if upstream::is_there(sandbox).await { Refusal::Broken(why) } else { Refusal::NotFound },
                Some(request),
            ))
        }
        Err(SendError::Sent(error)) => Err((broken(sandbox, &error).await, None)),
    }
}

/// A connection broke before an answer: the server's doing, or the machine's end?
async fn broken(sandbox: &Sandbox, error: &hyper::Error) -> Refusal {
    if !upstream::is_there(sandbox).await {
        return Refusal::NotFound;
    }
    Refusal::Broken(if error.is_parse() {
        format!("what listens there does not speak HTTP/1.1: {error}")
    } else {
        error.to_string()
    })
}

/// An answer's body, as it comes. Dropped before its end, it closes the connection.
struct Streamed {
    body: Incoming,
    end: End,
    upstream: Option<Upstream>,
    /// Where the connection waits for its next request.
    idle: Option<(Arc<Pool>, SandboxId)>,
    gateway: Arc<Gateway>,
    _open: OpenStream,
}

/// How the body's end is known.
enum End {
    /// By a length or by the last chunk: hyper tells a cut body from a whole one.
    Said,
    /// By the connection's end: whole only if the sandbox still lives.
    Unsaid(Arc<Sandbox>),
    /// Is it?
    Asked(BoxFuture<'static, bool>),
}

impl Streamed {
    fn poll_body(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        let Some(upstream) = &mut self.upstream else { return Poll::Pending };
        upstream.drive(context);
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn finish(&mut self) {
        let Some(upstream) = self.upstream.take() else { return };
        match &self.idle {
            Some((pool, id)) => pool.put(id, upstream),
            None => upstream.finish(),
        }
    }
}

impl HttpBody for Streamed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        loop {
            if let End::Asked(asked) = &mut self.end {
                let lives = ready!(asked.as_mut().poll(context));
                self.end = End::Said;
                return Poll::Ready(if lives {
                    self.finish();
                    None
                } else {
                    Some(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the sandbox ended")))
                });
            }
            match ready!(self.poll_body(context)) {
                Some(frame) => {
                    if let Some(data) = frame.as_ref().ok().and_then(Frame::data_ref) {
                        self.gateway.metrics.proxied(Direction::Out, data.len() as u64);
                    }
                    return Poll::Ready(Some(frame.map_err(io::Error::other)));
                }
                None => match &self.end {
                    End::Unsaid(sandbox) => {
                        let sandbox = Arc::clone(sandbox);
                        self.end = End::Asked(async move { upstream::is_there(&sandbox).await }.boxed());
                    }
                    End::Said | End::Asked(_) => {
                        self.finish();
                        return Poll::Ready(None);
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.end, End::Said) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        // With a length said, nobody asks for more after the last byte.
        if self.is_end_stream() {
            self.finish();
        }
    }
}
