//! One HTTP/1.1 connection to a port of a sandbox.
//!
//! hyper's connection is driven by whoever waits for its answer, not by a task of its own: what was read in one go is then
//! written in one go, without a change of tasks for each frame. A request with a long body, or one that still goes up beside
//! its answer, gets a task: reading and writing then overlap, and a client that does not read its answer yet can still send.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use sandbox_folder::client::{Stream, open_port};
use tokio_util::task::AbortOnDropHandle;

use super::headers::ToPort;
use crate::Gateway;
use crate::fleet::Sandbox;
use crate::metrics::Direction;

/// How long a sandbox may take to open a stream. One that lives does so at once; the machine may be busy.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers of an answer. What a browser's own limit is near to; each costs memory here.
const MAX_HEADERS: usize = 256;

/// Bytes of a request's body after which it counts as long. What starts a process or writes a small file is shorter.
const LONG_BODY: u64 = 256 << 10;

/// A request's body, of which each byte is counted on its way.
#[derive(Debug)]
pub(super) struct Counted {
    body: Incoming,
    gateway: Arc<Gateway>,
    progress: Arc<Progress>,
}

/// How far a request's body is.
#[derive(Debug, Default)]
struct Progress {
    bytes: AtomicU64,
    sent: AtomicBool,
}

impl Counted {
    pub(super) fn new(body: Incoming, gateway: &Arc<Gateway>) -> Self {
        Self { body, gateway: Arc::clone(gateway), progress: Arc::default() }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // hyper drops a body once it has written it, or given it up.
        self.progress.sent.store(true, Ordering::Release);
    }
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
            let bytes = data.len() as u64;
            self.gateway.metrics.proxied(Direction::In, bytes);
            self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
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
pub(super) struct Upstream {
    sender: SendRequest<Counted>,
    driver: Driver,
}

/// Who drives the connection.
enum Driver {
    /// Whoever waits for its answer.
    Waiting(BoxFuture<'static, ()>),
    /// A task.
    Task(AbortOnDropHandle<()>),
    /// Nobody: it has ended.
    Ended,
}

/// A stream to the sandbox could not be opened.
#[derive(Debug)]
pub(crate) enum DialError {
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
        let stream = open(sandbox, to, port).await?;
        let mut builder = http1::Builder::new();
        builder.max_headers(MAX_HEADERS);
        let (sender, connection) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| DialError::Broken(error.to_string()))?;
        // An error of the connection is its answer's too, or its body's.
        let driver = Driver::Waiting(connection.with_upgrades().map(drop).boxed());
        Ok(Self { sender, driver })
    }

    /// Sends a request. Dropping the future closes the connection with it.
    pub(super) async fn send(&mut self, request: Request<Counted>) -> Result<Response<Incoming>, SendError> {
        let progress = Arc::clone(&request.body().progress);
        let mut answer = pin!(self.sender.try_send_request(request));
        let driver = &mut self.driver;
        let answered = poll_fn(|context| match answer.as_mut().poll(context) {
            Poll::Ready(answered) => Poll::Ready(answered),
            Poll::Pending => {
                driver.poll(context);
                if progress.bytes.load(Ordering::Relaxed) > LONG_BODY {
                    driver.spawn();
                }
                answer.as_mut().poll(context)
            }
        });
        let response = answered.await.map_err(|mut error| match error.take_message() {
            Some(request) => SendError::Unsent(Box::new(request)),
            None => SendError::Sent(error.into_error()),
        })?;
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switches || !progress.sent.load(Ordering::Acquire) {
            self.driver.spawn();
        }
        Ok(response)
    }

    /// Lets the connection do what it can now; for whoever waits for more of its answer.
    pub(super) fn drive(&mut self, context: &mut Context<'_>) {
        self.driver.poll(context);
    }

    /// Whether it can take a request now.
    pub(super) fn is_ready(&mut self) -> bool {
        self.look();
        self.sender.is_ready() && !self.sender.is_closed()
    }

    /// Whether it is of no more use.
    pub(super) fn is_closed(&mut self) -> bool {
        self.look();
        self.sender.is_closed()
    }

    /// Takes no more requests; the body of the last one, if it still runs, is sent to its end.
    pub(super) fn finish(self) {
        if let Driver::Task(task) = self.driver {
            task.detach();
        }
    }

    /// Has it see whether the other side closed it. Nobody waits, so nobody is to be woken.
    fn look(&mut self) {
        self.driver.poll(&mut Context::from_waker(Waker::noop()));
    }
}

impl Driver {
    fn poll(&mut self, context: &mut Context<'_>) {
        if let Self::Waiting(connection) = self
            && connection.as_mut().poll(context).is_ready()
        {
            *self = Self::Ended;
        }
    }

    fn spawn(&mut self) {
        *self = match std::mem::replace(self, Self::Ended) {
            Self::Waiting(connection) => Self::Task(AbortOnDropHandle::new(tokio::spawn(connection))),
            other => other,
        };
    }
}

/// Opens a stream to a port of `sandbox`.
pub(super) async fn open(sandbox: &Sandbox, to: ToPort, port: u16) -> Result<Stream, DialError> {
    let dial = async {
        match to {
            ToPort::Agent => sandbox.dial(CLIENT_PORT).await,
            ToPort::Tenant => {
                let stream = sandbox.dial(PORTS_PORT).await?;
                open_port(stream, port).await
            }
        }
    };
    match tokio::time::timeout(DIAL_TIMEOUT, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => match DialError::of(&error) {
            // The shim that serves the socket may outlive the machine by a moment: is it this stream alone?
            DialError::Closed | DialError::Broken(_) if !is_there(sandbox).await => Err(DialError::Gone),
            error => Err(error),
        },
        Err(_) => Err(DialError::Broken("the sandbox did not open a stream in time".into())),
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
