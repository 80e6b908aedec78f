//! A gateway in front of sandboxes that are no machines: a folder with a hybrid vsock socket, and whatever the test puts
//! behind its doors.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use sandbox_folder::VSOCK_SOCKET;
use tiffin_gateway::Gateway;
use tiffin_gateway::builds::Builds;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::fleet::{Fleet, Sandbox};
use tiffin_gateway::identity::{ApiKey, KeyHash, TeamId};
use tiffin_gateway::metrics::Metrics;
use tiffin_gateway::server::{self, Limits};
use tiffin_gateway::store::{SandboxRecord, Stage, Store};
use tiffin_gateway::tls::Tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const DOMAIN: &str = "boxes.example";

/// The agent's port.
pub(crate) const AGENT: u16 = 49983;

pub(crate) type Serve = Arc<dyn Fn(UnixStream) -> BoxFuture<'static, ()> + Send + Sync>;

/// What listens on a port, served with these bytes.
pub(crate) fn raw<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(UnixStream) -> F + Send + Sync + 'static,
) -> Serve {
    Arc::new(move |stream| serve(stream).boxed())
}

/// What listens on a port, as an HTTP/1.1 server.
pub(crate) fn http(router: Router) -> Serve {
    raw(move |stream| {
        let service = TowerToHyperService::new(router.clone());
        async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .half_close(false)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let _ = connection.await;
        }
    })
}

/// A sandbox whose ports the test serves.
pub(crate) struct Fake {
    pub(crate) sandbox: Arc<Sandbox>,
    /// Streams that were opened to it.
    pub(crate) dials: Arc<AtomicUsize>,
    serving: Option<AbortOnDropHandle<()>>,
    cut: CancellationToken,
    folder: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    /// What a VMM's end does: every stream breaks and nobody listens any more.
    pub(crate) async fn die(&mut self) {
        self.cut.cancel();
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
        assert!(UnixStream::connect(self.folder.path().join(VSOCK_SOCKET)).await.is_err());
    }
}

#[derive(Default)]
pub(crate) struct Builder {
    access_token: Option<String>,
    traffic_token: Option<String>,
    stage: Option<Stage>,
    ports: HashMap<u16, Serve>,
}

impl Builder {
    pub(crate) fn access_token(mut self, token: &str) -> Self {
        self.access_token = Some(token.into());
        self
    }

    pub(crate) fn traffic_token(mut self, token: &str) -> Self {
        self.traffic_token = Some(token.into());
        self
    }

    pub(crate) fn stage(mut self, stage: Stage) -> Self {
        self.stage = Some(stage);
        self
    }

    /// What listens on a port; 49983 is the agent's.
    pub(crate) fn port(mut self, port: u16, serve: Serve) -> Self {
        self.ports.insert(port, serve);
        self
    }

    pub(crate) fn start(self, id: &str, team: &str) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(VSOCK_SOCKET)).unwrap();
        let (dials, cut, ports) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new(), self.ports);
        let counted = Arc::clone(&dials);
        let cutting = cut.clone();
        let serving = tokio::spawn(async move {
            let ports = Arc::new(ports);
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let (ports, cut) = (Arc::clone(&ports), cutting.clone());
                // Through a pair: a server's own tasks outlive a cut, the machine's socket does not.
                let (mut near, far) = UnixStream::pair().unwrap();
                tokio::spawn(async move { hybrid(far, &ports).await });
                tokio::spawn(async move {
                    cut.run_until_cancelled(tokio::io::copy_bidirectional(&mut stream, &mut near)).await
                });
            }
        });
        let record =
            record(id, team, self.stage.unwrap_or(Stage::Running), self.access_token, self.traffic_token);
        let sandbox = Arc::new(Sandbox::new(folder.path().to_owned(), record));
        Fake { sandbox, dials, serving: Some(AbortOnDropHandle::new(serving)), cut, folder }
    }
}

/// Reads a request's head.
pub(crate) async fn read_head(stream: &mut UnixStream) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(char::from(byte)),
            Err(_) => break,
        }
    }
    head
}

/// The dialect of `vsock.sock`, and of the ports door behind it.
async fn hybrid(mut stream: UnixStream, ports: &HashMap<u16, Serve>) {
    let Some(door) = connect_line(&mut stream).await else { return };
    if door == u32::from(AGENT) {
        let Some(serve) = ports.get(&AGENT) else { return };
        stream.write_all(b"OK 1073741824\n").await.unwrap();
        return serve(stream).await;
    }
    assert_eq!(door, envd_proto::PORTS_PORT);
    stream.write_all(b"OK 1073741824\n").await.unwrap();
    let Some(port) = connect_line(&mut stream).await else { return };
    let Some(serve) = ports.get(&u16::try_from(port).unwrap()) else { return };
    stream.write_all(b"OK\n").await.unwrap();
    serve(stream).await;
}

async fn connect_line(stream: &mut UnixStream) -> Option<u32> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        line.push(char::from(stream.read_u8().await.ok()?));
    }
    Some(line.strip_prefix("CONNECT ").unwrap().trim_end().parse().unwrap())
}

fn record(
    id: &str,
    team: &str,
    stage: Stage,
    access_token: Option<String>,
    traffic_token: Option<String>,
) -> SandboxRecord {
    SandboxRecord {
        id: id.parse().unwrap(),
        team: TeamId(team.into()),
        stage,
        template: "base".into(),
        alias: None,
        metadata: Default::default(),
        cpus: 1,
        memory_mib: 512,
        disk_mib: 1024,
        agent_version: "0.1.0".into(),
        access_token,
        traffic_token,
        started_at: Timestamp::now(),
        end_at: Timestamp::now(),
        life: Default::default(),
    }
}

/// The real agent as a process of its own, behind a `vsock.sock`.
pub(crate) struct Agent {
    pub(crate) fake: Fake,
    _child: Ended,
    pub(crate) home: tempfile::TempDir,
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Agent {
    pub(crate) async fn start(id: &str, team: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let (socket, ports) = (home.path().join("envd.sock"), home.path().join("ports.sock"));
        let child = Command::new("setpriv")
            // It ends with its test, however that ends.
            .args(["--pdeathsig", "KILL"])
            .arg(envd())
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--listen-ports")
            .arg(format!("unix:{}", ports.display()))
            .arg("--no-container")
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let child = Ended(child);
        let listening = async {
            while UnixStream::connect(&socket).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, listening).await.expect("the agent listens");
        let relay = raw(move |mut stream| {
            let socket = socket.clone();
            async move {
                let mut agent = UnixStream::connect(&socket).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut agent).await;
            }
        });
        Self { fake: Builder::default().port(AGENT, relay).start(id, team), _child: child, home }
    }
}

/// The agent's program, which a build of the workspace puts beside the tests.
fn envd() -> PathBuf {
    let folder = match std::env::var_os("TIFFIN_BIN") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned(),
    };
    let program = folder.join("envd");
    assert!(program.exists(), "{} is not there: cargo build --locked -p envd", program.display());
    program
}

/// A gateway that serves.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) store: Store,
    serving: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
    _kept: Option<AbortOnDropHandle<()>>,
    _data: tempfile::TempDir,
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}

impl Front {
    pub(crate) async fn of(fakes: &[&Fake]) -> Self {
        Self::within(Limits::default(), fakes).await
    }

    pub(crate) async fn within(limits: Limits, fakes: &[&Fake]) -> Self {
        Self::with(None, limits, fakes).await
    }

    /// With that certificate, which is followed as the program does.
    pub(crate) async fn with(tls: Option<Arc<Tls>>, limits: Limits, fakes: &[&Fake]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Config {
            listen: address,
            domain: DOMAIN.into(),
            data: template::DataDir::resolve(Some(data.path())).unwrap(),
            host_shim: "/nonexistent/host-shim".into(),
            image_builder: "/nonexistent/image-builder".into(),
            kernel: None,
            guest_image: None,
            channel: Default::default(),
            allow_emulation: true,
            capacity: Capacity::default(),
            builds: Default::default(),
        };
        let store = Store::open(&data.path().join("gateway.db")).unwrap();
        let fleet = Fleet::open(config.clone(), store.clone()).await.unwrap();
        for fake in fakes {
            fleet.hold(Arc::clone(&fake.sandbox));
        }
        let builds = Builds::open(config.clone(), store.clone()).await.unwrap();
        let gateway =
            Arc::new(Gateway { config, store: store.clone(), fleet, builds, metrics: Metrics::default() });
        let shutdown = CancellationToken::new();
        let kept =
            tls.clone().map(|tls| AbortOnDropHandle::new(tokio::spawn(tls.keep(Arc::clone(&gateway)))));
        let serving = tokio::spawn(server::serve_with(gateway, listener, tls, shutdown.clone(), limits));
        Self { _kept: kept, address, shutdown, store, serving: Some(serving), _data: data }
    }

    /// A key of a fresh team.
    pub(crate) async fn key(&self) -> String {
        self.key_of("red").await
    }

    /// A key of a fresh team of that name.
    pub(crate) async fn key_of(&self, name: &str) -> String {
        let quota = Capacity { sandboxes: 1, cpus: 1, memory_mib: 512 };
        let (key, store) = (ApiKey::generate().unwrap(), &self.store);
        let team = store.create_team(name, quota).await.unwrap();
        store.add_key(&team.id, &KeyHash::of(key.as_str()), "test", "").await.unwrap();
        key.as_str().to_owned()
    }

    /// Waits until it has stopped.
    pub(crate) async fn stopped(&mut self) {
        let serving = self.serving.take().unwrap();
        tokio::time::timeout(DEADLINE, serving).await.expect("it stops").unwrap().unwrap();
    }

    /// A connection of HTTP/1.1.
    pub(crate) async fn connect(&self) -> Http1 {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(async move { drop(connection.with_upgrades().await) });
        Http1 { sender, _driver: AbortOnDropHandle::new(driver) }
    }

    /// A connection of HTTP/2.
    pub(crate) async fn connect_http2(&self) -> http2::SendRequest<Body> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One request on a connection of its own.
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        self.connect().await.send(request).await
    }

    /// What the gateway writes to a client that writes `bytes` and waits for the connection's end.
    pub(crate) async fn talk(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // It may be refused before all of it is written.
        let _ = stream.write_all(bytes.as_ref()).await;
        let mut answer = Vec::new();
        let reading = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer));
        let _ = reading.await.expect("the connection ends");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

pub(crate) type Body = BoxBody<Bytes, Infallible>;

pub(crate) fn empty() -> Body {
    Empty::new().boxed()
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// A request to a port of a sandbox, by the headers.
pub(crate) fn to(id: &str, port: u16, path: &str) -> http::request::Builder {
    Request::builder()
        .uri(path)
        .header("host", "127.0.0.1")
        .header("e2b-sandbox-id", id)
        .header("e2b-sandbox-port", port.to_string())
}

pub(crate) struct Http1 {
    pub(crate) sender: http1::SendRequest<Body>,
    _driver: AbortOnDropHandle<()>,
}

impl Http1 {
    pub(crate) async fn open(&mut self, request: Request<Body>) -> Response<Incoming> {
        let ready = tokio::time::timeout(DEADLINE, self.sender.ready());
        ready.await.expect("no hang").expect("the connection is kept");
        tokio::time::timeout(DEADLINE, self.sender.send_request(request)).await.expect("no hang").unwrap()
    }

    pub(crate) async fn send(&mut self, request: Request<Body>) -> Answer {
        Answer::of(self.open(request).await).await
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn of(response: Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        let body = tokio::time::timeout(DEADLINE, body.collect()).await.expect("no hang").unwrap();
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        Self { status: head.status, headers: head.headers, text }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

/// Waits until something is so.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}
