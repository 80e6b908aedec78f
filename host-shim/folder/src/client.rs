//! A client of the client door: the Connect protocol with the binary codec, over any stream.
//!
//! ```no_run
//! # async fn example() -> Result<(), sandbox_folder::client::ClientError> {
//! use sandbox_folder::client::SandboxClient;
//! let sandbox = SandboxClient::unix("/run/my-sandbox/vsock.sock");
//! let done = sandbox.output("/bin/sh", ["-c", "nproc"]).await?;
//! assert_eq!((done.stdout.as_slice(), done.exit.code()), (&b"1\n"[..], 0));
//! # Ok(())
//! # }
//! ```
//!
//! Source: connectrpc.com/docs/protocol.

mod code;
mod exit;
mod file;
mod plain;
mod process;
mod stream;
mod tree;
mod watch;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use envd_proto::filesystem::{
    EntryInfo, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse,
    RemoveRequest, RemoveResponse, StatRequest, StatResponse,
};
use envd_proto::limits::MAX_CONNECT_MESSAGE;
use envd_proto::process::process_selector::Selector;
use envd_proto::process::{
    ListRequest, ListResponse, ProcessInfo, ProcessSelector, SendSignalRequest, SendSignalResponse, Signal,
    StartRequest,
};
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

pub use code::Code;
pub use exit::Exit;
pub use plain::OpenPort;
pub use process::{Completed, Output, Process, Stdin};
pub use tree::{Attributes, Entry, EntryKind};
pub use watch::Watch;

/// A byte stream to the agent.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A byte stream of whatever channel.
pub type Stream = Box<dyn ByteStream>;

/// Opens a stream to a port of the agent.
pub type Dial = Arc<dyn Fn(u32) -> BoxFuture<'static, io::Result<Stream>> + Send + Sync>;

/// What can go wrong with a call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The sandbox refused.
    #[error("{message} ({code})")]
    Call {
        /// The kind of the refusal.
        code: Code,
        /// The sandbox's words.
        message: String,
    },
    /// The sandbox's answer makes no sense.
    #[error("the sandbox broke the protocol: expected {expected}, got {got}")]
    Protocol {
        /// What was expected.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// The connection failed.
    #[error("the connection to the sandbox failed: {0}")]
    Http(#[from] hyper::Error),
    /// The operating system refused.
    #[error("the connection to the sandbox failed: {0}")]
    Io(#[from] io::Error),
}

impl ClientError {
    /// The code of a refusal.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }

    fn protocol(expected: &'static str, got: impl Into<String>) -> Self {
        Self::Protocol { expected, got: got.into() }
    }
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A client of one sandbox. Cheap to clone; each call has a connection of its own.
#[derive(Clone)]
pub struct SandboxClient {
    dial: Dial,
    token: Option<Arc<str>>,
    user: Option<Arc<str>>,
}

impl SandboxClient {
    /// A client over streams of `dial`.
    pub fn new(dial: Dial) -> Self {
        Self { dial, token: None, user: None }
    }

    /// A client over a `vsock.sock`.
    pub fn unix(socket: impl Into<PathBuf>) -> Self {
        let socket = socket.into();
        Self::new(Arc::new(move |port| {
            let socket = socket.clone();
            Box::pin(async move { connect_hybrid(&socket, port).await })
        }))
    }

    /// The same client with an access token.
    pub fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.into());
        self
    }

    /// The same client as another user than the sandbox's default.
    pub fn with_user(mut self, user: &str) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Whether the agent answers; it does so before and after Configure.
    pub async fn health(&self) -> Result<(), ClientError> {
        let response =
            self.send(self.request(Method::GET, "/health").body(empty()).map_err(invalid)?).await?;
        match response.status() {
            status if status.is_success() => Ok(()),
            _ => Err(refusal(response).await),
        }
    }

    /// Starts a process; returns once it runs.
    pub async fn start(&self, request: StartRequest) -> Result<Process, ClientError> {
        Process::start(self.clone(), request).await
    }

    /// Runs a command without input and collects what it prints.
    pub async fn output<A: Into<String>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Completed, ClientError> {
        let process = envd_proto::process::ProcessConfig {
            cmd: program.to_owned(),
            args: args.into_iter().map(Into::into).collect(),
            ..Default::default()
        };
        let request = StartRequest { process: Some(process), stdin: Some(false), ..Default::default() };
        self.start(request).await?.output().await
    }

    /// The processes that are alive.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, ClientError> {
        let response: ListResponse = self.unary("process.Process/List", &ListRequest {}).await?;
        Ok(response.processes)
    }

    /// Sends a signal to a process.
    pub async fn send_signal(&self, pid: u32, signal: Signal) -> Result<(), ClientError> {
        let request = SendSignalRequest { process: by_pid(pid), signal: signal.into(), ..Default::default() };
        self.unary("process.Process/SendSignal", &request).await.map(|SendSignalResponse {}| ())
    }

    /// What is known about a path.
    pub async fn stat(&self, path: &str) -> Result<EntryInfo, ClientError> {
        let request = StatRequest { path: path.to_owned(), ..StatRequest::default() };
        let response: StatResponse = self.unary("filesystem.Filesystem/Stat", &request).await?;
        entry(response.entry)
    }

    /// The entries of a directory, `depth` levels deep.
    pub async fn list_dir(&self, path: &str, depth: u32) -> Result<Vec<EntryInfo>, ClientError> {
        let request = ListDirRequest { path: path.to_owned(), depth, ..ListDirRequest::default() };
        let response: ListDirResponse = self.unary("filesystem.Filesystem/ListDir", &request).await?;
        Ok(response.entries)
    }

    /// Makes a directory and its parents.
    pub async fn make_dir(&self, path: &str) -> Result<EntryInfo, ClientError> {
        let request = MakeDirRequest { path: path.to_owned() };
        let response: MakeDirResponse = self.unary("filesystem.Filesystem/MakeDir", &request).await?;
        entry(response.entry)
    }

    /// Renames a file or directory.
    pub async fn rename(&self, source: &str, destination: &str) -> Result<EntryInfo, ClientError> {
        let request = MoveRequest { source: source.to_owned(), destination: destination.to_owned() };
        let response: MoveResponse = self.unary("filesystem.Filesystem/Move", &request).await?;
        entry(response.entry)
    }

    /// Removes a file or a directory with all that is in it.
    pub async fn remove(&self, path: &str) -> Result<(), ClientError> {
        let request = RemoveRequest { path: path.to_owned() };
        self.unary("filesystem.Filesystem/Remove", &request).await.map(|RemoveResponse {}| ())
    }

    /// Connects to a TCP port inside the sandbox, on its loopback.
    pub async fn connect_port(&self, port: u16) -> Result<Stream, ClientError> {
        Ok(open_port((self.dial)(PORTS_PORT).await?, port).await?)
    }

    /// A unary call on a connection of its own.
    pub async fn unary<M, R>(&self, method: &str, message: &M) -> Result<R, ClientError>
    where
        M: prost::Message,
        R: prost::Message + Default,
    {
        self.unary_on(&mut self.connect().await?, method, message).await
    }

    async fn unary_on<M, R>(
        &self,
        connection: &mut SendRequest<Body>,
        method: &str,
        message: &M,
    ) -> Result<R, ClientError>
    where
        M: prost::Message,
        R: prost::Message + Default,
    {
        let request = self
            .request(Method::POST, &format!("/{method}"))
            .header(header::CONTENT_TYPE, "application/proto")
            .body(full(message.encode_to_vec()))
            .map_err(invalid)?;
        let response = connection.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let body = collect(response).await?;
        R::decode(body).map_err(|error| ClientError::protocol("a protobuf message", error.to_string()))
    }

    fn request(&self, method: Method, target: &str) -> http::request::Builder {
        let mut request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "sandbox")
            .header("connect-protocol-version", "1");
        if let Some(token) = &self.token {
            request = request.header("x-access-token", &**token);
        }
        if let Some(user) = &self.user {
            let basic = format!("Basic {}", BASE64.encode(format!("{user}:")));
            request = request.header(header::AUTHORIZATION, basic);
        }
        request
    }

    async fn connect(&self) -> Result<SendRequest<Body>, ClientError> {
        let stream = (self.dial)(CLIENT_PORT).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the response's body, or with the sender.
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
        Ok(self.connect().await?.send_request(request).await?)
    }
}

/// Opens a stream to a port of the agent over a `vsock.sock`.
pub async fn connect_hybrid(socket: &std::path::Path, port: u32) -> io::Result<Stream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    read_ok(&mut stream, port).await?;
    Ok(Box::new(stream))
}

/// Makes a stream of the ports door one to a TCP port inside the sandbox. That nobody listens there is
/// [`io::ErrorKind::ConnectionRefused`].
pub async fn open_port(mut stream: Stream, port: u16) -> io::Result<Stream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    read_ok(&mut stream, port).await?;
    Ok(stream)
}

/// Reads `OK\n` or `OK <n>\n`, and not a byte more.
async fn read_ok(stream: &mut (impl AsyncRead + Unpin), port: impl std::fmt::Display) -> io::Result<()> {
    /// `OK 4294967295\n`.
    const MAX_ANSWER: usize = 16;
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER {
        match stream.read_u8().await {
            Ok(b'\n') if answer == b"OK" || answer.starts_with(b"OK ") => return Ok(()),
            Ok(byte) => answer.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let reason = format!("the sandbox's port {port} is not open");
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, reason));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "expected the answer `OK`"))
}

fn by_pid(pid: u32) -> Option<ProcessSelector> {
    Some(ProcessSelector { selector: Some(Selector::Pid(pid)) })
}

fn entry(entry: Option<EntryInfo>) -> Result<EntryInfo, ClientError> {
    entry.ok_or_else(|| ClientError::protocol("an entry", "none"))
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

fn empty() -> Body {
    full(Bytes::new())
}

fn invalid(error: http::Error) -> ClientError {
    ClientError::Io(io::Error::new(io::ErrorKind::InvalidInput, error))
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let limited = Limited::new(response.into_body(), MAX_CONNECT_MESSAGE).collect().await;
    limited
        .map(|body| body.to_bytes())
        .map_err(|error| ClientError::protocol("a whole body", error.to_string()))
}

/// The error of an answer that is none.
async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    match collect(response).await {
        Ok(body) => code::refusal(&body).unwrap_or_else(|| code::of_status(status)),
        Err(error) => error,
    }
}
