//! A gateway that serves, sandboxes whose ports the test serves, and clients.

use std::collections::HashMap;
use std::fs;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, SinkExt, StreamExt};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use template::{DataDir, Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};
use tiffin_gateway::Gateway;
use tiffin_gateway::builds::Builds;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::fleet::Fleet;
use tiffin_gateway::identity::{ApiKey, KeyHash};
use tiffin_gateway::metrics::Metrics;
use tiffin_gateway::server::{self, Limits};
use tiffin_gateway::store::Store;
use tiffin_gateway::tunnel::frame::Header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) type Serve = Arc<dyn Fn(UnixStream) -> BoxFuture<'static, ()> + Send + Sync>;
pub(crate) type Stream = Compat<yamux::Stream>;

/// What listens on a port.
pub(crate) fn serve<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(UnixStream) -> F + Send + Sync + 'static,
) -> Serve {
    Arc::new(move |stream| serve(stream).boxed())
}

/// What sends back what it gets, the end too.
pub(crate) fn echo() -> Serve {
    serve(|stream| async move {
        let (mut read, mut write) = stream.into_split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.shutdown().await;
    })
}

/// A future that must end.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// A gateway with the template `base` and two teams.
pub(crate) struct Front {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) ours: ApiKey,
    pub(crate) theirs: ApiKey,
    pub(crate) shutdown: CancellationToken,
    address: SocketAddr,
    _server: AbortOnDropHandle<()>,
    _processes: Processes,
    _dir: tempfile::TempDir,
}

impl Front {
    pub(crate) async fn start() -> Self {
        // Short: sockets must fit into their addresses.
        let dir = tempfile::Builder::new().prefix("tunnel").tempdir_in("/tmp").unwrap();
        let data = DataDir::resolve(Some(dir.path())).unwrap();
        write_template(&data);
        let store = Store::open(&data.path().join("gateway.db")).unwrap();
        let (ours, theirs) = (ApiKey::generate().unwrap(), ApiKey::generate().unwrap());
        for (name, key) in [("ours", &ours), ("theirs", &theirs)] {
            let team = store.create_team(name, Capacity::UNLIMITED).await.unwrap();
            store.add_key(&team.id, &KeyHash::of(key.as_str()), name, "").await.unwrap();
        }
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            domain: "sandbox.test".into(),
            data,
            host_shim: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_shim.py"),
            image_builder: "/nonexistent".into(),
            kernel: None,
            guest_image: None,
            channel: Default::default(),
            allow_emulation: true,
            builds: Default::default(),
            capacity: Capacity::UNLIMITED,
        };
        let fleet = Fleet::open(config.clone(), store.clone()).await.unwrap();
        let builds = Builds::open(config.clone(), store.clone()).await.unwrap();
        let gateway = Arc::new(Gateway { config, store, fleet, builds, metrics: Metrics::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let limits = Limits { stream_drain: Duration::from_millis(100), ..Limits::default() };
        let serving = server::serve_within(Arc::clone(&gateway), listener, shutdown.clone(), limits);
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self {
            gateway,
            ours,
            theirs,
            shutdown,
            address,
            _server: AbortOnDropHandle::new(server),
            _processes: Processes(dir.path().to_owned()),
            _dir: dir,
        }
    }

    /// A call of the control API.
    pub(crate) async fn call(
        &self,
        headers: &[(&str, &str)],
        method: Method,
        target: &str,
        body: Value,
    ) -> (StatusCode, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let mut request = Request::builder().method(method).uri(target).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = match body {
            Value::Null => Full::default(),
            body => {
                request = request.header("content-type", "application/json");
                Full::new(Bytes::from(body.to_string()))
            }
        };
        let response = soon("an answer", sender.send_request(request.body(body).unwrap())).await.unwrap();
        let status = response.status();
        let text = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(text.to_vec()).unwrap())
    }

    /// A sandbox of ours with these ports; 49983 is its agent's.
    pub(crate) async fn sandbox(&self, ports: impl IntoIterator<Item = (u16, Serve)>) -> TestBox {
        let key = [("x-api-key", self.ours.as_str())];
        let (status, text) =
            self.call(&key, Method::POST, "/v2/sandboxes", json!({ "templateID": "base" })).await;
        assert_eq!(status, 201, "{text}");
        let created: Value = serde_json::from_str(&text).unwrap();
        let id = created["sandboxID"].as_str().unwrap().to_owned();
        let socket = self.gateway.config.data.sandboxes().join(&id).join("vsock.sock");
        let listener = UnixListener::bind(socket).unwrap();
        let ports = Arc::new(ports.into_iter().collect::<HashMap<_, _>>());
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let ports = Arc::clone(&ports);
                tokio::spawn(async move { hybrid(stream, &ports).await });
            }
        });
        let token = created["envdAccessToken"].as_str().unwrap().to_owned();
        TestBox { id, token, _serving: AbortOnDropHandle::new(serving) }
    }

    /// A WebSocket to its tunnel.
    pub(crate) async fn dial(
        &self,
        headers: &[(&'static str, &str)],
        id: &str,
    ) -> Result<WebSocketStream<TcpStream>, Error> {
        let target = format!("ws://{}/v1/sandboxes/{id}/tunnel", self.address);
        let mut request = target.into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(self.address).await.unwrap();
        Ok(soon("an answer", tokio_tungstenite::client_async(request, stream)).await?.0)
    }

    /// The same with our key.
    pub(crate) async fn websocket(&self, id: &str) -> WebSocketStream<TcpStream> {
        self.dial(&[("x-api-key", self.ours.as_str())], id).await.unwrap()
    }

    /// A tunnel with our key.
    pub(crate) async fn tunnel(&self, id: &str) -> Tunnel {
        Tunnel::over(self.websocket(id).await)
    }

    pub(crate) async fn metrics(&self) -> String {
        self.call(&[], Method::GET, "/metrics", Value::Null).await.1
    }
}

/// A sandbox that runs.
pub(crate) struct TestBox {
    pub(crate) id: String,
    pub(crate) token: String,
    _serving: AbortOnDropHandle<()>,
}

/// The dialect of `vsock.sock`, and of the ports door behind it.
async fn hybrid(mut stream: UnixStream, ports: &HashMap<u16, Serve>) {
    let Some(door) = connect_line(&mut stream).await else { return };
    let port = if door == envd_proto::CLIENT_PORT {
        door
    } else {
        assert_eq!(door, envd_proto::PORTS_PORT, "no other door may be asked for");
        stream.write_all(b"OK 1073741824\n").await.unwrap();
        let Some(port) = connect_line(&mut stream).await else { return };
        port
    };
    let Some(serve) = ports.get(&u16::try_from(port).unwrap()) else { return };
    if stream.write_all(b"OK\n").await.is_ok() {
        serve(stream).await;
    }
}

async fn connect_line(stream: &mut UnixStream) -> Option<u32> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        line.push(char::from(stream.read_u8().await.ok()?));
    }
    Some(line.strip_prefix("CONNECT ").unwrap().trim_end().parse().unwrap())
}

/// A client as a good one is: the crate `yamux` over binary messages.
pub(crate) struct Tunnel {
    open: mpsc::Sender<oneshot::Sender<yamux::Stream>>,
    closed: oneshot::Receiver<Option<(u16, String)>>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Tunnel {
    pub(crate) fn over(socket: WebSocketStream<TcpStream>) -> Self {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (mut far_read, mut far_write) = tokio::io::split(far);
        let (mut sink, mut messages) = socket.split();
        let (tell, closed) = oneshot::channel();
        let inward = tokio::spawn(async move {
            let mut code = None;
            while let Some(Ok(message)) = messages.next().await {
                let bytes = match message {
                    Message::Binary(bytes) => bytes,
                    Message::Close(frame) => {
                        code = frame.map(|frame| (frame.code.into(), frame.reason.as_str().to_owned()));
                        continue;
                    }
                    _ => continue,
                };
                if far_write.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            // The other half of it is the other task's.
            let _ = far_write.shutdown().await;
            let _ = tell.send(code);
        });
        let outward = tokio::spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = far_read.read(&mut buffer).await {
                let message = Message::Binary(Bytes::copy_from_slice(&buffer[..count]));
                if sink.send(message).await.is_err() {
                    break;
                }
            }
        });
        let (open, mut requests) = mpsc::channel::<oneshot::Sender<yamux::Stream>>(1);
        let mut connection =
            yamux::Connection::new(near.compat(), yamux::Config::default(), yamux::Mode::Client);
        let driver = tokio::spawn(async move {
            let mut wanted: Option<oneshot::Sender<yamux::Stream>> = None;
            poll_fn(|context| {
                loop {
                    if wanted.is_none()
                        && let Poll::Ready(Some(reply)) = requests.poll_recv(context)
                    {
                        wanted = Some(reply);
                    }
                    if wanted.is_some()
                        && let Poll::Ready(Ok(stream)) = connection.poll_new_outbound(context)
                    {
                        let _ = wanted.take().map(|reply| reply.send(stream));
                        continue;
                    }
                    return match connection.poll_next_inbound(context) {
                        Poll::Ready(Some(Ok(_))) => panic!("the gateway opens no streams"),
                        Poll::Ready(_) => Poll::Ready(()),
                        Poll::Pending => Poll::Pending,
                    };
                }
            })
            .await;
        });
        let tasks = [inward, outward, driver].map(AbortOnDropHandle::new).into();
        Self { open, closed, _tasks: tasks }
    }

    /// A stream, before its line.
    pub(crate) async fn stream(&self) -> Stream {
        let (reply, opened) = oneshot::channel();
        self.open.send(reply).await.unwrap();
        soon("a stream", opened).await.unwrap().compat()
    }

    /// A stream whose line was `line`, and the answer to it.
    pub(crate) async fn ask(&self, line: &str) -> (Stream, String) {
        let mut stream = self.stream().await;
        stream.write_all(line.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut answer = String::new();
        while !answer.ends_with('\n') {
            answer.push(char::from(soon("an answer", stream.read_u8()).await.unwrap()));
        }
        (stream, answer)
    }

    /// A stream to a port.
    pub(crate) async fn connect(&self, port: u16) -> Stream {
        let (stream, answer) = self.ask(&format!("CONNECT {port}\n")).await;
        assert_eq!(answer, "OK\n");
        stream
    }

    /// Waits for its end: the code and the reason.
    pub(crate) async fn closed(self) -> (u16, String) {
        soon("the tunnel ends", self.closed).await.unwrap().expect("a close frame")
    }
}

/// Everything that the gateway sends until it closes, and how it closes.
pub(crate) async fn drain(socket: &mut WebSocketStream<TcpStream>) -> (Vec<u8>, Option<(u16, String)>) {
    let (mut bytes, mut code) = (Vec::new(), None);
    let reading = async {
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Binary(more) => bytes.extend_from_slice(&more),
                Message::Close(frame) => {
                    code = frame.map(|frame| (frame.code.into(), frame.reason.as_str().to_owned()));
                }
                _ => {}
            }
        }
    };
    soon("the gateway closes", reading).await;
    (bytes, code)
}

/// The next frame without a body; of data frames the body is left out.
pub(crate) struct Frames {
    held: Vec<u8>,
}

impl Frames {
    pub(crate) fn new() -> Self {
        Self { held: Vec::new() }
    }

    pub(crate) async fn next(&mut self, socket: &mut WebSocketStream<TcpStream>) -> (Header, Vec<u8>) {
        loop {
            if let Some(header) = self.held.first_chunk::<12>() {
                let header = Header::decode(*header).unwrap();
                let body = match header.kind {
                    tiffin_gateway::tunnel::frame::Kind::Data => header.length as usize,
                    _ => 0,
                };
                if self.held.len() >= 12 + body {
                    let rest = self.held.split_off(12 + body);
                    let frame = std::mem::replace(&mut self.held, rest);
                    return (header, frame[12..].to_vec());
                }
            }
            match soon("a message", socket.next()).await.expect("more").unwrap() {
                Message::Binary(bytes) => self.held.extend_from_slice(&bytes),
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn write_template(data: &DataDir) {
    let new = NewTemplate::begin(&data.templates(), &"base".parse().unwrap()).unwrap();
    fs::write(new.rootfs(), b"rootfs").unwrap();
    let digest = format!("sha256:{}", "a".repeat(64));
    let template = Template {
        schema_version: SCHEMA_VERSION,
        image: SourceImage { reference: "base".into(), digest: digest.parse().unwrap() },
        kernel: None,
        guest_image: None,
        rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
        runtime: RuntimeConfig::default(),
        machine: Machine { cpus: 2, memory_mib: 256, disk_mib: 16 },
        snapshot_only: false,
    };
    new.publish(&template).unwrap();
}

/// Whatever was started with this folder in its command line ends with the test.
struct Processes(PathBuf);

impl Drop for Processes {
    fn drop(&mut self) {
        let needle = self.0.to_str().unwrap();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if let (Some(pid), true) = (pid, String::from_utf8_lossy(&command).contains(needle)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}
