//! The client door: HTTP/1.1 and HTTP/2 with prior knowledge.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Query;
use axum::response::{IntoResponse, Response};
use envd_proto::{filesystem, process};
use futures::TryStreamExt;
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use crate::connect::{self, Code, Error};
use crate::filesystem::{self as files, FilesQuery, FilesystemService};
use crate::process::{ProcessService, ProcessTable};
use crate::sandbox::{Sandbox, Session};

/// How long a client may take for its request's headers, and stay idle between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Requests at one time on one HTTP/2 connection; each may hold a message in memory.
const MAX_REQUESTS: u32 = 32;

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
}

impl ClientDoor {
    /// The door of `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        let processes = ProcessService::new(Arc::clone(&sandbox), ProcessTable::default());
        let filesystem = FilesystemService::new(Arc::clone(&sandbox));
        Self { services: Services { sandbox, processes, filesystem } }
    }

    /// The processes that were started through it.
    pub fn processes(&self) -> &ProcessTable {
        self.services.processes.table()
    }

    /// Whether somebody owns the sandbox.
    pub(super) fn is_configured(&self) -> bool {
        self.services.sandbox.session().is_some()
    }

    /// Serves the requests of one connection.
    pub(super) async fn serve<S>(&self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        builder.http2().timer(TokioTimer::new()).max_concurrent_streams(MAX_REQUESTS);
        let Ok(Ok(stream)) = tokio::time::timeout(HEADER_TIMEOUT, until_version(stream)).await else {
            return;
        };
        let services = self.services.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let services = services.clone();
            async move { Ok::<_, Infallible>(services.answer(request.map(Body::new)).await) }
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
                _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
            };
        }
        if let Some(method) = path.strip_prefix("/filesystem.Filesystem/") {
            return match *request.method() {
                Method::POST => self.filesystem_call(method, request).await,
                _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
            };
        }
        match (request.method(), path.as_str()) {
            (&Method::GET, "/health") => StatusCode::NO_CONTENT.into_response(),
            (&Method::GET | &Method::POST, "/files") => self.files(request).await,
            (_, "/health" | "/files") => StatusCode::METHOD_NOT_ALLOWED.into_response(),
            (method, path) => {
                let message = format!("{method} {path} is not served on the client door");
                files::error_response(&Error::new(Code::NotFound, message))
            }
        }
    }

    /// The session, for a call that may be made: the sandbox is configured and the token is right.
    fn authorize(&self, headers: &HeaderMap) -> Result<Arc<Session>, Error> {
        let session = self.sandbox.session().ok_or_else(|| {
            Error::new(Code::Unavailable, "the sandbox is not configured yet: its host has to do that first")
        })?;
        if session.allows(headers) {
            return Ok(session);
        }
        Err(Error::new(Code::Unauthenticated, "unauthorized: X-Access-Token is missing or wrong"))
    }

    async fn process_call(self, method: &str, request: Request<Body>) -> Response {
        let session = match self.authorize(request.headers()) {
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
        let session = match self.authorize(request.headers()) {
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
            other => unknown_method("filesystem.Filesystem", other),
        }
    }

    async fn files(self, request: Request<Body>) -> Response {
        let session = match self.authorize(request.headers()) {
            Ok(session) => session,
            Err(error) => return files::error_response(&error),
        };
        let query = match Query::<FilesQuery>::try_from_uri(request.uri()) {
            Ok(Query(query)) => query,
            Err(error) => {
                return files::error_response(&Error::new(Code::InvalidArgument, error.to_string()));
            }
        };
        match *request.method() {
            Method::GET => files::download(&self.sandbox, &session, query, request.headers()).await,
            _ => files::upload(&self.sandbox, &session, query, request).await,
        }
    }
}

fn unknown_method(service: &str, method: &str) -> Response {
    Error::new(Code::Unimplemented, format!("{service} does not serve '{method}'")).into_unary_response()
}
