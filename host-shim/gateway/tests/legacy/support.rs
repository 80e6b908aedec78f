//! The real agent as an ordinary process behind a hybrid socket, the gateway's old protocol before it, and a client.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use futures::{SinkExt, StreamExt};
use jiff::Timestamp;
use sandbox_folder::VSOCK_SOCKET;
use serde_json::{Value, json};
use tiffin_gateway::fleet::Sandbox;
use tiffin_gateway::identity::TeamId;
use tiffin_gateway::legacy;
use tiffin_gateway::store::{SandboxRecord, Stage};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A sandbox whose machine is this one, and the gateway's port of it.
pub(crate) struct Legacy {
    agent: Child,
    pub folder: tempfile::TempDir,
    pub address: std::net::SocketAddr,
}

impl Drop for Legacy {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// The agent's program, which `make test` builds.
fn envd() -> PathBuf {
    let folder = match std::env::var_os("TIFFIN_BIN") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned(),
    };
    let program = folder.join("envd");
    assert!(program.exists(), "{} is not there: make test-binaries", program.display());
    program
}

impl Legacy {
    pub(crate) async fn start() -> Self {
        Self::with_token(None).await
    }

    pub(crate) async fn with_token(token: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("envd.sock");
        let agent = Command::new("setpriv")
            // It ends with its test, however that ends.
            .args(["--pdeathsig", "KILL"])
            .arg(envd())
            .args(["--listen", &format!("unix:{}", socket.display()), "--no-container"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let legacy = Self { agent, folder, address };
        let vsock = UnixListener::bind(legacy.folder.path().join(VSOCK_SOCKET)).unwrap();
        eventually("the agent listens", async || UnixStream::connect(&socket).await.is_ok()).await;
        tokio::spawn(relay(vsock, socket));
        let sandbox = Arc::new(Sandbox::new(legacy.folder.path().to_owned(), record(token)));
        let app = move |request: Request| legacy::answer(Arc::clone(&sandbox), request);
        let router = axum::Router::new().fallback(app);
        tokio::spawn(async move { axum::serve(listener, router).await });
        legacy
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    pub(crate) async fn connect(&self) -> Client {
        Client { socket: self.upgrade().await.unwrap(), next: 0, told: Vec::new(), answers: BTreeMap::new() }
    }

    pub(crate) async fn upgrade(&self) -> Result<WebSocketStream<TcpStream>, tungstenite::Error> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        Ok(tokio_tungstenite::client_async(format!("ws://{}/ws", self.address), stream).await?.0)
    }

    /// A plain request; its status and body.
    pub(crate) async fn http(&self, request: http::Request<String>) -> (http::StatusCode, String) {
        use http_body_util::BodyExt;
        let stream = TcpStream::connect(self.address).await.unwrap();
        let stream = hyper_util::rt::TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let answer = tokio::time::timeout(DEADLINE, sender.send_request(request)).await.unwrap().unwrap();
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.into()).unwrap())
    }
}

/// `CONNECT <port>`, `OK <n>`, then bytes: what a VMM's hybrid socket speaks.
async fn relay(listener: UnixListener, agent: PathBuf) {
    loop {
        let (near, _) = listener.accept().await.unwrap();
        let agent = agent.clone();
        tokio::spawn(async move {
            let mut near = BufReader::new(near);
            let mut line = String::new();
            near.read_line(&mut line).await?;
            assert_eq!(line, format!("CONNECT {}\n", envd_proto::CLIENT_PORT));
            let mut far = UnixStream::connect(agent).await?;
            near.write_all(b"OK 1\n").await?;
            copy_bidirectional(&mut near, &mut far).await
        });
    }
}

fn record(token: Option<&str>) -> SandboxRecord {
    SandboxRecord {
        id: "abc1".parse().unwrap(),
        team: TeamId("team".into()),
        stage: Stage::Running,
        template: "base".into(),
        alias: None,
        metadata: BTreeMap::new(),
        cpus: 1,
        memory_mib: 512,
        disk_mib: 1024,
        agent_version: "0.1.0".into(),
        access_token: token.map(str::to_owned),
        traffic_token: None,
        started_at: Timestamp::UNIX_EPOCH,
        end_at: Timestamp::UNIX_EPOCH,
        life: Default::default(),
    }
}

/// Waits until something is so; `what` is for the failure.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Whether a process of this machine is there, and no zombie.
pub(crate) fn is_running(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// The content of a file, once it is there and not empty.
pub(crate) async fn content(path: &str) -> String {
    let read = || std::fs::read_to_string(Path::new(path)).unwrap_or_default();
    eventually(path, async || !read().is_empty()).await;
    read().trim().to_owned()
}

/// What a subscription told, and which.
pub(crate) type Told = (String, Value);

/// A client as the published one is: calls, answers by id, and notifications.
pub(crate) struct Client {
    pub socket: WebSocketStream<TcpStream>,
    next: u32,
    told: Vec<Told>,
    answers: BTreeMap<String, Value>,
}

impl Client {
    /// Sends a call without waiting; gives its id.
    pub(crate) async fn send(&mut self, method: &str, params: Value) -> String {
        self.next += 1;
        let id = format!("id{}", self.next);
        let call = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        self.socket.send(Message::text(call.to_string())).await.unwrap();
        id
    }

    /// Calls; the whole answer.
    pub(crate) async fn answer(&mut self, method: &str, params: Value) -> Value {
        let id = self.send(method, params).await;
        self.answer_to(&id).await
    }

    pub(crate) async fn answer_to(&mut self, id: &str) -> Value {
        loop {
            if let Some(answer) = self.answers.remove(id) {
                return answer;
            }
            self.read().await;
        }
    }

    /// Calls; the result.
    pub(crate) async fn call(&mut self, method: &str, params: Value) -> Value {
        let mut answer = self.answer(method, params).await;
        assert!(answer.get("result").is_some(), "{method}: {answer}");
        answer["result"].take()
    }

    /// Calls; the error's code and message.
    pub(crate) async fn refused(&mut self, method: &str, params: Value) -> (i64, String) {
        let answer = self.answer(method, params).await;
        let error = &answer["error"];
        let code = error["code"].as_i64().unwrap_or_else(|| panic!("{method}: {answer}"));
        (code, error["message"].as_str().unwrap().to_owned())
    }

    pub(crate) async fn subscribe(&mut self, method: &str, params: Value) -> String {
        let id = self.call(method, params).await;
        let id = id.as_str().unwrap();
        assert!(id.starts_with("0x"), "{id}");
        id.to_owned()
    }

    /// Subscribes to stdout, stderr and the end of a process, and starts it.
    pub(crate) async fn start(&mut self, id: &str, command: &str) -> [String; 3] {
        let mut subscriptions = [const { String::new() }; 3];
        for (at, topic) in ["onExit", "onStdout", "onStderr"].into_iter().enumerate() {
            subscriptions[at] = self.subscribe("process_subscribe", json!([topic, id])).await;
        }
        let started = self.call("process_start", json!([id, command, {"PYTHONUNBUFFERED": "1"}, ""])).await;
        assert_eq!(started, id);
        subscriptions
    }

    /// What is told next.
    pub(crate) async fn told(&mut self) -> Told {
        while self.told.is_empty() {
            self.read().await;
        }
        self.told.remove(0)
    }

    /// Everything up to what the subscription `last` tells.
    pub(crate) async fn told_until(&mut self, last: &str) -> Vec<Told> {
        let mut all = Vec::new();
        loop {
            all.push(self.told().await);
            if all.last().unwrap().0 == last {
                return all;
            }
        }
    }

    /// The next text, whatever it is.
    pub(crate) async fn text(&mut self) -> Value {
        loop {
            let frame = tokio::time::timeout(DEADLINE, self.socket.next()).await.expect("a frame");
            match frame.expect("more").unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn read(&mut self) {
        let mut message = self.text().await;
        assert_eq!(message["jsonrpc"], "2.0");
        match message.get("id") {
            None => {
                assert!(message["method"].as_str().unwrap().ends_with("_subscription"), "{message}");
                let id = message["params"]["subscription"].as_str().unwrap().to_owned();
                self.told.push((id, message["params"]["result"].take()));
            }
            Some(id) => {
                let id = id.as_str().unwrap().to_owned();
                assert!(self.answers.insert(id, message).is_none());
            }
        }
    }
}
