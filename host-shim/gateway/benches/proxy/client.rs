//! The same calls, by three ways.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::process::{ProcessConfig, StartRequest};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

type Body = BoxBody<Bytes, Infallible>;

const AGENT: u16 = envd_proto::CLIENT_PORT as u16;

/// Bytes of an upload's frames.
const CHUNK: usize = 64 << 10;

/// A connection by which the agent is called.
pub(crate) struct Way {
    sender: SendRequest<Body>,
    id: String,
}

impl Way {
    pub(crate) async fn agent(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).await.unwrap(), "none").await
    }

    pub(crate) async fn relay(socket: &Path) -> Self {
        let stream = sandbox_folder::client::connect_hybrid(socket, envd_proto::CLIENT_PORT).await.unwrap();
        Self::over(stream, "none").await
    }

    pub(crate) async fn gateway(address: SocketAddr, id: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream, id).await
    }

    async fn over(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, id: &str) -> Self {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self { sender, id: id.to_owned() }
    }

    async fn send(&mut self, request: http::request::Builder, body: Body) -> Response<Incoming> {
        self.sender.ready().await.unwrap();
        let response = self.sender.send_request(request.body(body).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response
    }

    fn request(&self, method: &str, path: &str) -> http::request::Builder {
        request(&self.id, AGENT, path).method(method)
    }

    /// A small call, as the SDKs make them.
    pub(crate) async fn unary(&mut self) {
        let request =
            self.request("POST", "/process.Process/List").header("content-type", "application/json");
        let response = self.send(request, Full::new(Bytes::from("{}")).boxed()).await;
        response.into_body().collect().await.unwrap();
    }

    /// A process that prints that much.
    pub(crate) async fn output(&mut self, bytes: u64) {
        let args = vec!["-c".to_owned(), bytes.to_string(), "/dev/zero".to_owned()];
        let process = ProcessConfig { cmd: "head".into(), args, ..Default::default() };
        let start = StartRequest { process: Some(process), stdin: Some(false), ..Default::default() };
        let request = self
            .request("POST", "/process.Process/Start")
            .header("content-type", "application/connect+proto");
        let body = Full::new(envelope::encode(0, &start.encode_to_vec())).boxed();
        let response = self.send(request, body).await;
        assert!(read(response).await > bytes);
    }

    pub(crate) async fn upload(&mut self, path: &str, bytes: u64) {
        let chunk = Bytes::from(vec![7; CHUNK]);
        let chunks = (0..bytes / CHUNK as u64).map(move |_| Ok::<_, Infallible>(Frame::data(chunk.clone())));
        let request = self
            .request("POST", &format!("/files?path={path}"))
            .header("content-type", "application/octet-stream")
            .header("content-length", bytes.to_string());
        let body = BodyExt::boxed(StreamBody::new(futures::stream::iter(chunks)));
        read(self.send(request, body).await).await;
    }

    pub(crate) async fn download(&mut self, path: &str, bytes: u64) {
        let request = self.request("GET", &format!("/files?path={path}"));
        let response = self.send(request, Empty::new().boxed()).await;
        assert_eq!(read(response).await, bytes);
    }
}

fn request(id: &str, port: u16, path: &str) -> http::request::Builder {
    Request::builder()
        .uri(path)
        .header("host", "127.0.0.1")
        .header("e2b-sandbox-id", id)
        .header("e2b-sandbox-port", port.to_string())
}

async fn read(response: Response<Incoming>) -> u64 {
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame.unwrap().data_ref().map_or(0, |data| data.len() as u64);
    }
    bytes
}

/// A WebSocket of a sandbox's port.
pub(crate) struct WebSocket(TokioIo<hyper::upgrade::Upgraded>);

impl WebSocket {
    pub(crate) async fn open(address: SocketAddr, id: &str, port: u16) -> Self {
        let mut way = Way::gateway(address, id).await;
        let request = request(id, port, "/ws")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let response = way.sender.send_request(request.body(Empty::new().boxed()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        Self(TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
    }

    /// Whether a text comes back (RFC 6455, 5.2: final text frames, the client's masked with zeros).
    pub(crate) async fn echoes(&mut self) -> bool {
        let mut back = [0; 4];
        let sent = self.0.write_all(&[0x81, 0x82, 0, 0, 0, 0, b'h', b'i']).await;
        sent.is_ok() && self.0.read_exact(&mut back).await.is_ok() && back == [0x81, 2, b'h', b'i']
    }
}
