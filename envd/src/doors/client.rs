//! The client door: HTTP/1.1 and HTTP/2 with prior knowledge.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use envd_proto::{filesystem, process};
use futures::TryStreamExt;
use http::header::ALLOW;
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::cors;
use super::linger::Lingering;
use super::seats::Seat;
use crate::connect::{self, Code, Error};
use crate::filesystem::{self as files, FilesQuery, FilesystemService, Operation};
use crate::process::{ProcessService, ProcessTable};
use crate::sandbox::{Leaf, Sandbox, Session};

/// How long a client may take for its request's headers, and stay idle between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Requests at one time on one HTTP/2 connection; each may hold a message in memory.
const MAX_REQUESTS: u32 = 32;

/// What hyper may buffer of an HTTP/1.1 connection in each direction, a request's headers included, and of the answer on
/// an HTTP/2 stream. Its own bound is 400 KiB, which a thousand connections must not take.
const MAX_BUFFER: usize = 128 << 10;

/// What an HTTP/2 client may send of one request before it is read.
const STREAM_WINDOW: u32 = 64 << 10;

/// What it may send of all, so that those which are not read (a process that takes no input, a message that waits for
/// room) stop no other.
const CONNECTION_WINDOW: u32 = MAX_REQUESTS * STREAM_WINDOW;

/// What an HTTP/2 connection with prior knowledge begins with (RFC 9113, 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The client door of a sandbox.
#[derive(Clone, Debug)]
pub struct ClientDoor {
    services: Services,
}

#[derive(Clone, Debug)]
struct Services {
    sandbox: Arc<Sandbox>,
    processes: ProcessService,
    filesystem: FilesystemService,
    /// Of a rehearsal: whose it is, held or not.
    rehearsal: Option<Arc<Session>>,
}

impl ClientDoor {
    /// The door of `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        let processes = ProcessService::new(Arc::clone(&sandbox), ProcessTable::default());
        let filesystem = FilesystemService::new(Arc::clone(&sandbox));
        Self { services: Services { sandbox, processes, filesystem, rehearsal: None } }
    }

    /// A door for the agent alone, open while the tenant is held. What comes through it is the agent's own: started in its
    /// class, as this session's, and in no table that a client sees.
    pub(super) fn for_rehearsal(sandbox: Arc<Sandbox>, session: Arc<Session>) -> Self {
        let mut door = Self::new(sandbox);
        door.services.processes.set_class(Leaf::System);
        door.services.rehearsal = Some(session);
        door
    }

    /// The processes that were started through it.
    pub fn processes(&self) -> &ProcessTable {
        self.services.processes.table()
    }

    /// Whether somebody owns the sandbox.
    pub(super) fn is_configured(&self) -> bool {
        self.services.sandbox.session().is_some()
    }

    /// The sandbox behind the door.
    pub(super) fn sandbox(&self) -> &Arc<Sandbox> {
        &self.services.sandbox
    }

    /// Serves the requests of one connection.
    pub(super) async fn serve<S>(&self, stream: S, seat: Arc<Seat>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_BUFFER);
        let mut http2 = builder.http2();
        http2.timer(TokioTimer::new()).max_concurrent_streams(MAX_REQUESTS);
        http2.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        http2.max_send_buf_size(MAX_BUFFER);
        let Ok(Ok(stream)) = tokio::time::timeout(HEADER_TIMEOUT, until_version(stream)).await else {
            return;
        };
        let services = self.services.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let services = services.clone();
            if services.authorize(request.headers()).is_ok() {
                seat.used();
            }
            async move {
                let call = |request| services.answer(request);
                let (parts, body) = request.into_parts();
                let body = Body::new(Lingering::new(body, &parts.headers));
                Ok::<_, Infallible>(cors::answer(Request::from_parts(parts, body), call).await)
            }
        });
        // A client that breaks off is no event.
        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
    }
}

/// Reads until it is clear which version of HTTP a connection speaks: hyper waits for that without a limit of time.
async fn until_version<S>(stream: S) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (mut read, write) = tokio::io::split(stream);
    let mut begin = Vec::new();
    while begin.len() < HTTP2_PREFACE.len() && HTTP2_PREFACE.starts_with(&begin) {
        if read.read_buf(&mut begin).await? == 0 {
            break;
        }
    }
    Ok(tokio::io::join(io::Cursor::new(begin).chain(read), write))
}

impl Services {
    /// A match is all the routing that five paths need; a router would be built at each boot.
    async fn answer(self, request: Request<Body>) -> Response {
        let path = request.uri().path().to_owned();
        if let Some(method) = path.strip_prefix("/process.Process/") {
            return match *request.method() {
                Method::POST => self.process_call(method, request).await,
                _ => (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "POST")]).into_response(),
            };
        }
        if let Some(method) = path.strip_prefix("/filesystem.Filesystem/") {
            return match *request.method() {
                Method::POST => self.filesystem_call(method, request).await,
                _ => (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "POST")]).into_response(),
            };
        }
        match (request.method(), path.as_str()) {
            (&Method::GET, "/health") => StatusCode::NO_CONTENT.into_response(),
            (&Method::GET | &Method::HEAD | &Method::POST, "/files") => self.files(request).await,
            (&Method::GET, "/metrics" | "/envs" | "/ports") => self.machine(&path, request.headers()).await,
            (_, "/health" | "/files" | "/metrics" | "/envs" | "/ports") => {
                StatusCode::METHOD_NOT_ALLOWED.into_response()
            }
            (method, path) => {
                let message = format!("{method} {path} is not served on the client door");
                files::error_response(&Error::new(Code::NotFound, message))
            }
        }
    }

    /// The session, for a call that may be made: the sandbox is configured and the token is right.
    fn authorize(&self, headers: &HeaderMap) -> Result<Arc<Session>, Error> {
        if let Some(session) = &self.rehearsal {
            return Ok(Arc::clone(session));
        }
        let session = self.sandbox.session().ok_or_else(|| {
            Error::new(Code::Unavailable, "the sandbox is not configured yet: its host has to do that first")
        })?;
        if session.allows(headers) {
            return Ok(session);
        }
        Err(Error::new(Code::Unauthenticated, "unauthorized: X-Access-Token is missing or wrong"))
    }

    /// As [`Services::authorize`], for a call that the tenant's processes or files have a part in: not while they are held.
    fn authorize_running(&self, headers: &HeaderMap) -> Result<Arc<Session>, Error> {
        self.running(self.authorize(headers)?)
    }

    fn running(&self, session: Arc<Session>) -> Result<Arc<Session>, Error> {
        if self.sandbox.lifecycle().phase().is_frozen() && self.rehearsal.is_none() {
            return Err(Error::new(Code::Unavailable, "the sandbox is frozen: its host has to thaw it"));
        }
        Ok(session)
    }

    async fn machine(self, path: &str, headers: &HeaderMap) -> Response {
        match self.authorize(headers) {
            Ok(session) => super::machine::answer(path, headers, &self.sandbox, &session).await,
            Err(error) => files::error_response(&error),
        }
    }

    async fn process_call(self, method: &str, request: Request<Body>) -> Response {
        let session = match self.authorize_running(request.headers()) {
            Ok(session) => session,
            Err(error) => return error.into_unary_response(),
        };
        let service = self.processes;
        match method {
            "Start" => {
                connect::server_stream(request, |start: process::StartRequest, headers| async move {
                    let events = service.start(&session, start, headers).await?;
                    Ok(events.map_ok(|event| process::StartResponse { event: Some(event) }))
                })
                .await
            }
            "Connect" => {
                connect::server_stream(request, |connect: process::ConnectRequest, headers| async move {
                    let events = service.connect(&connect, &headers)?;
                    Ok(events.map_ok(|event| process::ConnectResponse { event: Some(event) }))
                })
                .await
            }
            "List" => {
                connect::unary(
                    request,
                    |list: process::ListRequest, _| async move { Ok(service.list(&list)) },
                )
                .await
            }
            "SendInput" => {
                connect::unary(request, |input, _| async move { service.send_input(input).await }).await
            }
            "CloseStdin" => {
                connect::unary(request, |close, _| async move { service.close_stdin(&close) }).await
            }
            "SendSignal" => {
                connect::unary(request, |signal, _| async move { service.send_signal(&signal).await }).await
            }
            "Update" => connect::unary(request, |update, _| async move { service.update(&update) }).await,
            "StreamInput" => {
                connect::client_stream(
                    request,
                    |messages, _| async move { service.stream_input(messages).await },
                )
                .await
            }
            other => unknown_method("process.Process", other),
        }
    }

    async fn filesystem_call(self, method: &str, request: Request<Body>) -> Response {
        let session = match self.authorize_running(request.headers()) {
            Ok(session) => session,
            Err(error) => return error.into_unary_response(),
        };
        let service = self.filesystem;
        match method {
            "Stat" => {
                let call = |stat: filesystem::StatRequest, headers: HeaderMap| async move {
                    service.stat(&session, stat, &headers).await
                };
                connect::unary(request, call).await
            }
            "ListDir" => {
                connect::unary(request, |list, headers| async move {
                    service.list_dir(&session, list, &headers).await
                })
                .await
            }
            "MakeDir" => {
                connect::unary(request, |make, headers| async move {
                    service.make_dir(&session, make, &headers).await
                })
                .await
            }
            "Move" => {
                connect::unary(request, |rename, headers| async move {
                    service.rename(&session, rename, &headers).await
                })
                .await
            }
            "Remove" => {
                connect::unary(request, |remove, headers| async move {
                    service.remove(&session, remove, &headers).await
                })
                .await
            }
            "WatchDir" => {
                connect::server_stream(request, |watch, headers| async move {
                    service.watch_dir(&session, watch, &headers).await
                })
                .await
            }
            "CreateWatcher" => {
                connect::unary(request, |create, headers| async move {
                    service.create_watcher(&session, create, &headers).await
                })
                .await
            }
            "GetWatcherEvents" => {
                connect::unary(request, |events, _| async move { service.watcher_events(&events) }).await
            }
            "RemoveWatcher" => {
                connect::unary(request, |remove, _| async move { service.remove_watcher(&remove) }).await
            }
            other => unknown_method("filesystem.Filesystem", other),
        }
    }

    async fn files(self, request: Request<Body>) -> Response {
        let query = FilesQuery::parse(request.uri().query().unwrap_or(""));
        let operation = if *request.method() == Method::POST { Operation::Write } else { Operation::Read };
        let authorized = query.and_then(|query| {
            let session = self.authorize_files(request.headers(), &query, operation)?;
            Ok((self.running(session)?, query))
        });
        let (session, query) = match authorized {
            Ok(authorized) => authorized,
            Err(error) => return files::error_response(&error),
        };
        match operation {
            Operation::Read => {
                files::download(&self.sandbox, &session, query, request.method(), request.headers()).await
            }
            Operation::Write => files::upload(&self.sandbox, &session, query, request).await,
        }
    }

    /// The session, for a call of /files: a token that is given must be right; without one a signature will do.
    fn authorize_files(
        &self,
        headers: &HeaderMap,
        query: &FilesQuery,
        operation: Operation,
    ) -> Result<Arc<Session>, Error> {
        match self.sandbox.session() {
            Some(session) if !headers.contains_key("x-access-token") => {
                if let Some(token) = session.access_token() {
                    query.check_signature(operation, token)?;
                }
                Ok(session)
            }
            _ => self.authorize(headers),
        }
    }
}

fn unknown_method(service: &str, method: &str) -> Response {
    Error::new(Code::Unimplemented, format!("{service} does not serve '{method}'")).into_unary_response()
}
