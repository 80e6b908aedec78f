//! The processes that are measured, and those around them.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sandbox_folder::VSOCK_SOCKET;
use tiffin_gateway::Gateway as State;
use tiffin_gateway::builds::Builds;
use tiffin_gateway::config::{Capacity, Config};
use tiffin_gateway::fleet::{Fleet, Sandbox};
use tiffin_gateway::identity::TeamId;
use tiffin_gateway::metrics::Metrics;
use tiffin_gateway::rate::Rates;
use tiffin_gateway::server::{self, Limits};
use tiffin_gateway::store::{SandboxRecord, Stage, Store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// What a relay reads at once; a virtio-vsock packet is as long.
const CHUNK: usize = 64 << 10;

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The id of a sandbox.
pub(crate) fn id(number: usize) -> String {
    format!("box{number:04}")
}

/// The real agent.
pub(crate) struct Agent {
    pub(crate) socket: PathBuf,
    _child: Ended,
}

impl Agent {
    pub(crate) async fn start(folder: &Path) -> Self {
        let (socket, ports) = (folder.join("envd.sock"), folder.join("ports.sock"));
        let child = Command::new("setpriv")
            // It ends with the bench, however that ends.
            .args(["--pdeathsig", "KILL"])
            .arg(envd())
            .args(["--listen", &format!("unix:{}", socket.display())])
            .args(["--listen-ports", &format!("unix:{}", ports.display()), "--no-container"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let child = Ended(child);
        while UnixStream::connect(&socket).await.is_err() || UnixStream::connect(&ports).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { socket, _child: child }
    }
}

/// The agent's program: `TIFFIN_AGENT`, or what a build of the workspace puts beside this one.
fn envd() -> PathBuf {
    let program = match std::env::var_os("TIFFIN_AGENT") {
        Some(program) => PathBuf::from(program),
        None => std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("envd"),
    };
    assert!(program.exists(), "{} is not there: cargo build --locked --release -p envd", program.display());
    program
}

/// Starts this program again as something else, and gives the line that it prints when it is ready.
fn again(what: &str, folder: &Path) -> (Ended, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(what)
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (Ended(child), line.trim().to_owned())
}

/// What a shim does for its sandbox: the dialect of `vsock.sock`, and bytes.
pub(crate) struct Relay {
    folder: PathBuf,
    _child: Ended,
}

impl Relay {
    pub(crate) async fn start(folder: &Path, sandboxes: usize) -> Self {
        for number in 0..sandboxes {
            std::fs::create_dir(folder.join(id(number))).unwrap();
        }
        let (child, ready) = again("relay", folder);
        assert_eq!(ready, "ready");
        Self { folder: folder.to_owned(), _child: child }
    }

    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.folder.join(id(number)).join(VSOCK_SOCKET)
    }
}

/// The relay's process.
pub(crate) fn relay(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for number in 0.. {
            let sandbox = folder.join(id(number));
            if !sandbox.is_dir() {
                break;
            }
            let listener = UnixListener::bind(sandbox.join(VSOCK_SOCKET)).unwrap();
            let folder = folder.to_owned();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let folder = folder.clone();
                    tokio::spawn(async move { join(stream, &folder).await });
                }
            });
        }
        println!("ready");
        std::future::pending::<()>().await;
    });
}

async fn join(mut stream: UnixStream, folder: &Path) -> Option<()> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        line.push(char::from(stream.read_u8().await.ok()?));
    }
    let door: u32 = line.strip_prefix("CONNECT ")?.trim().parse().ok()?;
    let socket = if door == envd_proto::CLIENT_PORT { "envd.sock" } else { "ports.sock" };
    let mut agent = UnixStream::connect(folder.join(socket)).await.ok()?;
    stream.write_all(b"OK 1073741824\n").await.ok()?;
    tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut agent, CHUNK, CHUNK).await.ok()?;
    Some(())
}

/// The gateway.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    child: Ended,
}

impl Gateway {
    pub(crate) async fn start(folder: &Path) -> Self {
        let (child, ready) = again("gateway", folder);
        Self { address: ready.parse().unwrap(), child }
    }

    /// Bytes that it has in memory (proc_pid_status(5), VmRSS).
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Gateway {
    /// Processor time that it has used (proc_pid_stat(5), utime and stime).
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.0.id())).unwrap();
        // The second field is in brackets and may hold anything.
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        // Without the state, which is no number: utime and stime are fields 14 and 15 of all.
        let ticks = fields[10] + fields[11];
        Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }
}

/// The gateway's process.
pub(crate) fn gateway(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let data = folder.join("data");
        let config = Config {
            listen: address,
            domain: "localhost".into(),
            data: template::DataDir::resolve(Some(&data)).unwrap(),
            host_shim: "/nonexistent/host-shim".into(),
            image_builder: "/nonexistent/image-builder".into(),
            kernel: None,
            guest_image: None,
            channel: Default::default(),
            allow_emulation: true,
            capacity: Capacity::default(),
            builds: Default::default(),
        };
        let store = Store::open(&data.join("gateway.db")).unwrap();
        let fleet = Fleet::open(config.clone(), store.clone()).await.unwrap();
        for number in 0.. {
            let dir = folder.join(id(number));
            if !dir.is_dir() {
                break;
            }
            fleet.hold(Arc::new(Sandbox::new(dir, record(number))));
        }
        let builds = Builds::open(config.clone(), store.clone()).await.unwrap();
        let gateway = Arc::new(State { config, store, fleet, builds, metrics: Metrics::default() });
        println!("{address}");
        let limits = Limits { rates: Rates::UNLIMITED, ..Limits::default() };
        server::serve_within(gateway, listener, CancellationToken::new(), limits).await.unwrap();
    });
}

fn record(number: usize) -> SandboxRecord {
    SandboxRecord {
        id: id(number).parse().unwrap(),
        team: TeamId("team".into()),
        stage: Stage::Running,
        template: "base".into(),
        alias: Some("base".into()),
        metadata: [("purpose".to_owned(), "bench".to_owned())].into(),
        cpus: 2,
        memory_mib: 512,
        disk_mib: 10240,
        agent_version: "0.1.0".into(),
        access_token: Some("0".repeat(64)),
        traffic_token: None,
        started_at: Timestamp::now(),
        end_at: Timestamp::now(),
        life: Default::default(),
    }
}

/// A server of WebSockets that echo, on a port of this machine, which is the agent's too.
pub(crate) async fn websocket_server() -> u16 {
    use axum::extract::ws::WebSocketUpgrade;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = |upgrade: WebSocketUpgrade| async {
        upgrade.on_upgrade(|mut socket| async move {
            while let Some(Ok(message)) = socket.recv().await {
                if socket.send(message).await.is_err() {
                    break;
                }
            }
        })
    };
    let router = axum::Router::new().route("/ws", axum::routing::any(echo));
    let service = hyper_util::service::TowerToHyperService::new(router);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let stream = hyper_util::rt::TokioIo::new(stream);
            let server = hyper::server::conn::http1::Builder::new().serve_connection(stream, service.clone());
            tokio::spawn(server.with_upgrades());
        }
    });
    port
}
