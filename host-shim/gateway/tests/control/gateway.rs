//! A gateway's control API on a port of its own.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use template::{DataDir, Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};
use tiffin_gateway::Gateway;
use tiffin_gateway::builds::Builds;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::control::router;
use tiffin_gateway::fleet::Fleet;
use tiffin_gateway::identity::{ApiKey, KeyHash};
use tiffin_gateway::metrics::Metrics;
use tiffin_gateway::store::Store;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

/// Long enough for the slowest machine; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A gateway with the template `base` and two teams.
pub(crate) struct TestGateway {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) ours: ApiKey,
    pub(crate) theirs: ApiKey,
    address: SocketAddr,
    _server: AbortOnDropHandle<()>,
    _processes: Processes,
    _dir: tempfile::TempDir,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Asserts a refusal in the JSON that clients parse, with these words in it.
    #[track_caller]
    pub(crate) fn refuses(&self, status: u16, words: &str) {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        let body = self.json();
        assert_eq!(body["code"], json!(status), "{self:?}");
        assert!(body["message"].as_str().unwrap().contains(words), "{words:?} is not in {self:?}");
    }

    #[track_caller]
    pub(crate) fn is(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        self
    }
}

impl TestGateway {
    pub(crate) async fn start() -> Self {
        Self::with(Capacity::UNLIMITED).await
    }

    pub(crate) async fn with(quota: Capacity) -> Self {
        // Short: sockets must fit into their addresses.
        let dir = tempfile::Builder::new().prefix("control").tempdir_in("/tmp").unwrap();
        let data = DataDir::resolve(Some(dir.path())).unwrap();
        write_template(&data);
        let store = Store::open(&data.path().join("gateway.db")).unwrap();
        let (ours, theirs) = (ApiKey::generate().unwrap(), ApiKey::generate().unwrap());
        for (name, key) in [("ours", &ours), ("theirs", &theirs)] {
            let team = store.create_team(name, quota).await.unwrap();
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
            capacity: Capacity::UNLIMITED,
            builds: Default::default(),
        };
        let fleet = Fleet::open(config.clone(), store.clone()).await.unwrap();
        let builds = Builds::open(config.clone(), store.clone()).await.unwrap();
        let gateway = Arc::new(Gateway { config, store, fleet, builds, metrics: Metrics::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = router(Arc::clone(&gateway));
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            gateway,
            ours,
            theirs,
            address,
            _server: AbortOnDropHandle::new(server),
            _processes: Processes(dir.path().to_owned()),
            _dir: dir,
        }
    }

    /// Sends any request; the answer is held against the document.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let exchange = async {
            let stream = TcpStream::connect(self.address).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
            let response = sender.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let text = String::from_utf8(body.to_vec()).unwrap();
            Answer { status: parts.status, headers: parts.headers, text }
        };
        let answer = tokio::time::timeout(PATIENCE, exchange).await.expect("an answer");
        assert!(answer.header("x-request-id").is_some(), "{answer:?}");
        crate::document::check(&method, &path, &answer);
        answer
    }

    /// A call with a key, and with a JSON body unless it is null.
    pub(crate) async fn call(&self, key: &ApiKey, method: Method, target: &str, body: Value) -> Answer {
        let request = Request::builder().method(method).uri(target).header("x-api-key", key.as_str());
        let request = match body {
            Value::Null => request.body(Full::default()),
            body => request
                .header(header::CONTENT_TYPE, "application/json")
                .body(Full::from(serde_json::to_vec(&body).unwrap())),
        };
        self.send(request.unwrap()).await
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.call(&self.ours, Method::GET, target, Value::Null).await
    }

    pub(crate) async fn post(&self, target: &str, body: Value) -> Answer {
        self.call(&self.ours, Method::POST, target, body).await
    }

    pub(crate) async fn delete(&self, target: &str) -> Answer {
        self.call(&self.ours, Method::DELETE, target, Value::Null).await
    }

    /// A raw body, as it is.
    pub(crate) async fn post_raw(&self, target: &str, content_type: &str, body: impl Into<Bytes>) -> Answer {
        let request = Request::post(target)
            .header("x-api-key", self.ours.as_str())
            .header(header::CONTENT_TYPE, content_type)
            .body(Full::new(body.into()));
        self.send(request.unwrap()).await
    }

    /// A sandbox of ours.
    pub(crate) async fn create(&self, more: Value) -> String {
        let mut body = json!({ "templateID": "base" });
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        let created = self.post("/v2/sandboxes", body).await.is(201).json();
        created["sandboxID"].as_str().unwrap().to_owned()
    }

    /// A connection for bytes that no client library sends.
    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    pub(crate) fn folder(&self, id: &str) -> PathBuf {
        self.gateway.config.data.sandboxes().join(id)
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
