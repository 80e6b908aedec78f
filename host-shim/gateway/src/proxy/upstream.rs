//! One HTTP/1.1 connection to a port of a sandbox.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio_util::task::AbortOnDropHandle;

use super::headers::ToPort;
use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::Direction;

/// How long a sandbox may take to open a stream. One that lives does so at once; the machine may be busy.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers of an answer. What a browser's own limit is near to; each costs memory here.
const MAX_HEADERS: usize = 256;

/// A request's body, of which each byte is counted on its way.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) body: Incoming,
    pub(super) gateway: Arc<Gateway>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            self.gateway.metrics.proxied(Direction::In, data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection. Dropped, it is closed at once, and what runs in the sandbox sees that.
#[derive(Debug)]
pub(super) struct Upstream {
    sender: SendRequest<Counted>,
    driver: AbortOnDropHandle<()>,
}

/// A stream to the sandbox could not be opened.
#[derive(Debug)]
pub(super) enum DialError {
    /// The sandbox's socket does not answer: it is gone.
    Gone,
    /// Nobody listens on the port.
    Closed,
    /// The connection broke as it was made.
    Broken(String),
}

impl DialError {
    /// The socket itself gives the system's error; whoever serves it ends the stream when nobody listens behind.
    fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Broken(error.to_string()),
            _ if error.raw_os_error().is_none() => Self::Closed,
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                Self::Gone
            }
            _ => Self::Broken(error.to_string()),
        }
    }
}

/// A request that got no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// Nothing of it was sent: it may go another way.
    Unsent(Box<Request<Counted>>),
    /// Some of it may have arrived.
    Sent(hyper::Error),
}

impl Upstream {
    /// Connects to a port of `sandbox`.
    pub(super) async fn dial(sandbox: &Sandbox, to: ToPort, port: u16) -> Result<Self, DialError> {
        let dial = async {
            match to {
                ToPort::Agent => sandbox.dial(CLIENT_PORT).await,
                ToPort::Tenant => {
                    let stream = sandbox.dial(PORTS_PORT).await?;
                    sandbox_folder::client::open_port(stream, port).await
                }
            }
        };
        let stream = match tokio::time::timeout(DIAL_TIMEOUT, dial).await {
            Ok(dialled) => dialled.map_err(|error| DialError::of(&error))?,
            Err(_) => return Err(DialError::Broken("the sandbox did not open a stream in time".into())),
        };
        let mut builder = http1::Builder::new();
        builder.max_headers(MAX_HEADERS);
        let (sender, connection) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| DialError::Broken(error.to_string()))?;
        // It ends with an error when either side breaks off: that is the body's or the answer's error too.
        let driver = tokio::spawn(async move { drop(connection.with_upgrades().await) });
        Ok(Self { sender, driver: AbortOnDropHandle::new(driver) })
    }

    /// Sends a request. Dropping the future closes the connection with it.
    pub(super) async fn send(&mut self, request: Request<Counted>) -> Result<Response<Incoming>, SendError> {
        self.sender.try_send_request(request).await.map_err(|mut error| match error.take_message() {
            Some(request) => SendError::Unsent(Box::new(request)),
            None => SendError::Sent(error.into_error()),
        })
    }

    /// Whether it can take a request now.
    pub(super) fn is_ready(&self) -> bool {
        self.sender.is_ready() && !self.sender.is_closed()
    }

    /// Whether it is of no more use.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Takes no more requests; the body of the last one, if it still runs, is sent to its end.
    pub(super) fn finish(self) {
        self.driver.detach();
    }
}

/// Whether the sandbox's agent can still be reached.
pub(super) async fn is_there(sandbox: &Sandbox) -> bool {
    let dial = tokio::time::timeout(DIAL_TIMEOUT, sandbox.dial(CLIENT_PORT));
    tokio::select! {
        dialled = dial => matches!(dialled, Ok(Ok(_))),
        () = sandbox.gone() => false,
    }
}
