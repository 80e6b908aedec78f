//! The one port: connections, and what each request on them is for.
//!
//! HTTP/1.1 and HTTP/2, over TLS or, with prior knowledge, in the clear. Whoever connects is unknown, so a connection has a place among a limited
//! number, a time for its headers, and a limit for their size; one on which nothing happens is closed. A body may take as
//! long as it likes: streams of a sandbox last for hours.
//!
//! Asked to stop, the gateway accepts no more, lets control calls end (a create must not be lost half-way), gives what
//! streams through it a moment, and then cuts it: the sandboxes go on, and clients connect again.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use crate::control::limit::Peer;
use crate::metrics::HandshakeOutcome;
use crate::proxy::route::{Route, route};
use crate::proxy::{self, Client, Proxy};
use crate::rate::Rates;
use crate::tls::{self, Handshake, HandshakeFailure, Tls};
use crate::{ApiError, Gateway, control};

/// What clients may take of the gateway.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once. Each may have a second one to a sandbox; together they fit [`OPEN_FILES`].
    pub connections: usize,
    /// Handshakes of TLS under way at once. Each may hold 64 KiB of a ClientHello that never ends.
    pub handshakes: usize,
    /// Time for the handshake of TLS, its wait for a place among the others' included.
    pub handshake_timeout: Duration,
    /// What the control API takes.
    pub rates: Rates,
    /// Time for a request's headers, and for silence between two requests.
    pub header_timeout: Duration,
    /// Time that control calls have to end once the gateway is to stop: as much as a create may take.
    pub control_drain: Duration,
    /// Time that everything else has.
    pub stream_drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshakes: 512,
            handshake_timeout: Duration::from_secs(10),
            rates: Rates::default(),
            header_timeout: Duration::from_secs(60),
            control_drain: Duration::from_secs(60),
            stream_drain: Duration::from_secs(5),
        }
    }
}

/// Open files that the program wants: twice the connections, and as many again for sandboxes and files.
pub const OPEN_FILES: u64 = 16384;

/// Bytes of a request's target and headers. Signed URLs and cookies are long, not that long. hyper's own limit is that of its
/// read buffer, whose size uploads need (some 400 KiB).
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Lines of a request's headers.
const MAX_HEADERS: usize = 128;

/// Requests at once on one connection of HTTP/2.
const MAX_STREAMS: u32 = 256;

/// A connection of HTTP/2 whose other end is gone is found out by a ping.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// Silence on a connection after which the system asks whether the other end is there, and between two such questions.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The pause after an accept that failed: mostly there are no file descriptors left, and no signal says when there are.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown`; returns when every connection has ended.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    serve_within(gateway, listener, shutdown, Limits::default()).await
}

/// The same within other limits.
pub async fn serve_within(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    shutdown: CancellationToken,
    limits: Limits,
) -> io::Result<()> {
    serve_with(gateway, listener, None, shutdown, limits).await
}

/// The same, with TLS where there is a certificate.
pub async fn serve_with(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    shutdown: CancellationToken,
    limits: Limits,
) -> io::Result<()> {
    let server = Arc::new(Server {
        control: TowerToHyperService::new(control::router_within(Arc::clone(&gateway), limits.rates)),
        gateway,
        tls,
        handshakes: Semaphore::new(limits.handshakes),
        proxy: Proxy::default(),
        control_calls: TaskTracker::new(),
        connections: TaskTracker::new(),
        requests: AtomicU64::new(0),
        shutdown: shutdown.clone(),
        cut: CancellationToken::new(),
        limits,
    });
    let seats = Arc::new(Semaphore::new(limits.connections));
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = server.proxy.sweep() => {}
        () = accept(&server, &listener, &seats) => {}
    }
    drop(listener);
    server.drain().await;
    Ok(())
}

async fn accept(server: &Arc<Server>, listener: &TcpListener, seats: &Arc<Semaphore>) {
    // It is never closed.
    while let Ok(seat) = Arc::clone(seats).acquire_owned().await {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let client = Client {
            peer,
            secure: server.tls.is_some(),
            _seat: Arc::new(seat),
            connections: server.connections.clone(),
            cut: server.cut.clone(),
        };
        server.connections.spawn(Arc::clone(server).connection(stream, client));
    }
}

struct Server {
    gateway: Arc<Gateway>,
    tls: Option<Arc<Tls>>,
    handshakes: Semaphore,
    control: TowerToHyperService<Router>,
    proxy: Proxy,
    control_calls: TaskTracker,
    connections: TaskTracker,
    /// Requests to sandboxes so far: the next one's number in the log.
    requests: AtomicU64,
    shutdown: CancellationToken,
    cut: CancellationToken,
    limits: Limits,
}

impl Server {
    async fn connection(self: Arc<Self>, stream: TcpStream, client: Client) {
        if prepare(&stream).is_err() {
            return;
        }
        let Some(tls) = &self.tls else { return self.http(stream, client).await };
        let (within, peer) = (self.limits.handshake_timeout, client.peer);
        let handshake = tokio::select! {
            handshake = tls.accept(stream, within, &self.handshakes) => handshake,
            // Nobody has asked for anything yet.
            () = self.shutdown.cancelled() => return,
        };
        let outcome = match &handshake {
            Ok(Handshake::Done(_)) => HandshakeOutcome::Done,
            Ok(Handshake::Plain(_)) => HandshakeOutcome::Plain,
            Err(HandshakeFailure::Late) => HandshakeOutcome::Late,
            Err(HandshakeFailure::Broken(_)) => HandshakeOutcome::Broken,
        };
        self.gateway.metrics.handshake_ended(outcome);
        match handshake {
            Ok(Handshake::Done(stream)) => self.http(*stream, client).await,
            Ok(Handshake::Plain(stream)) => {
                self.cut.run_until_cancelled(tls::refuse_plain(stream, within)).await;
            }
            // Anybody may cause it, as often as they like: no line of the log by default.
            Err(error) => tracing::debug!(%peer, %error, "no handshake"),
        }
    }

    /// Serves what is asked on a connection until it ends.
    async fn http<S>(self: Arc<Self>, stream: S, client: Client)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_headers(MAX_HEADERS);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_header_list_size(MAX_HEADER_BYTES as u32)
            .max_concurrent_streams(MAX_STREAMS)
            .keep_alive_interval(PING_INTERVAL);
        let activity = Arc::new(Activity::default());
        let service = service_fn(|request| {
            let running = activity.start();
            let (server, client) = (Arc::clone(&self), client.clone());
            async move {
                let mut response = server.answer(&client, request).await;
                let _call = response.extensions_mut().remove::<ControlCall>();
                Ok::<_, Infallible>(response.map(|body| Answered { body, _running: running, _call }))
            }
        });
        let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        let (mut stopping, mut seen) = (false, 0);
        loop {
            tokio::select! {
                // A client that breaks off is no event.
                _ = connection.as_mut() => return,
                () = self.cut.cancelled() => return,
                () = self.shutdown.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                // hyper's own timeout knows neither the wait for the version of HTTP nor HTTP/2.
                () = activity.silence(self.limits.header_timeout, &mut seen) => {
                    if stopping {
                        return;
                    }
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    async fn answer(&self, client: &Client, request: Request<Incoming>) -> Response {
        if request.method() == Method::CONNECT {
            let why = "CONNECT is not served: a sandbox's ports are reached by requests to it";
            return ApiError::new(StatusCode::METHOD_NOT_ALLOWED, why).into_response();
        }
        if header_bytes(&request) > MAX_HEADER_BYTES {
            let why = format!("the request's target and headers are longer than {MAX_HEADER_BYTES} bytes");
            return ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, why).into_response();
        }
        let (head, body) = request.into_parts();
        let route = route(&head, self.gateway.config.domain_name());
        let request = Request::from_parts(head, body);
        match route {
            Route::Sandbox(target) => {
                let number = self.requests.fetch_add(1, Ordering::Relaxed);
                let span = tracing::info_span!("request", number, sandbox = %target.id, port = target.port);
                let answering = async {
                    let response = self.proxy.answer(&self.gateway, client, &target, request).await;
                    tracing::debug!(status = response.status().as_u16(), "answered");
                    response
                };
                answering.instrument(span).await
            }
            Route::Control => {
                let call = self.control_calls.token();
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(Peer(client.peer));
                request.extensions_mut().insert(client.clone());
                let mut response = match self.control.call(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                };
                response.extensions_mut().insert(ControlCall(Arc::new(call)));
                response
            }
            Route::Bad(why) => {
                proxy::discard(request).await;
                ApiError::bad_request(why).into_response()
            }
        }
    }

    async fn drain(&self) {
        self.control_calls.close();
        self.connections.close();
        let control = tokio::time::timeout(self.limits.control_drain, self.control_calls.wait());
        let streams = tokio::time::timeout(self.limits.stream_drain, self.connections.wait());
        let _ = tokio::join!(control, streams);
        self.cut.cancel();
        self.connections.wait().await;
    }
}

fn header_bytes(request: &Request<Incoming>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let lines = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    target + lines.sum::<usize>()
}

/// What happens on a connection.
#[derive(Debug, Default)]
struct Activity {
    running: AtomicUsize,
    /// Starts and ends of requests.
    events: AtomicUsize,
}

impl Activity {
    fn start(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        self.events.fetch_add(1, Ordering::Relaxed);
        Running(Arc::clone(self))
    }

    /// Returns once nothing has happened and nothing runs: after between one and two times `timeout`. `seen` is its memory.
    async fn silence(&self, timeout: Duration, seen: &mut usize) {
        loop {
            tokio::time::sleep(timeout).await;
            let events = self.events.load(Ordering::Relaxed);
            if self.running.load(Ordering::Relaxed) == 0 && events == *seen {
                return;
            }
            *seen = events;
        }
    }
}

/// A request on a connection, until its answer's body is through.
struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.events.fetch_add(1, Ordering::Relaxed);
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A body whose request runs until it is dropped.
struct Answered {
    body: Body,
    _running: Running,
    _call: Option<ControlCall>,
}

/// A call of the control API, which the gateway waits for before it stops.
#[derive(Clone)]
struct ControlCall(#[allow(dead_code, reason = "it is tracked until it is dropped")] Arc<TaskTrackerToken>);

/// Frames are sent when they are there, and a client whose machine is gone does not stay for ever.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE)?;
    Ok(())
}

impl HttpBody for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
