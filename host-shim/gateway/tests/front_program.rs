//! The program `tiffin-gateway` as those see it who reach it from outside, and who keep its database: HTTPS, rates, backups.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use template::{Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};

const GATEWAY: &str = env!("CARGO_BIN_EXE_tiffin-gateway");

const DOMAIN: &str = "boxes.example";

/// There only to catch a hang.
const DEADLINE: Duration = Duration::from_secs(60);

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("front").tempdir_in("/tmp").unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(GATEWAY);
        command
            .args(args)
            .env("TIFFIN_DATA_DIR", self.path("data"))
            .env("FAKE_KVM", "ok")
            .stdin(Stdio::null());
        for name in ["LISTEN", "DOMAIN", "KERNEL", "GUEST_IMAGE", "LOG", "TLS_CERT", "TLS_KEY"] {
            command.env_remove(format!("TIFFIN_{name}"));
        }
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn ok(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stderr}");
        stdout
    }

    fn serve(&self, more: &[&str]) -> Command {
        let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_shim.py");
        let mut command = self.command(&["serve", "--no-base", "--domain", DOMAIN, "--host-shim"]);
        command.arg(shim).args(more);
        if !more.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command
    }

    /// A template `base` that sandboxes start from.
    fn template(&self) {
        let new = NewTemplate::begin(&self.path("data/templates"), &"base".parse().unwrap()).unwrap();
        fs::write(new.rootfs(), b"rootfs").unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        let template = Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "base".into(), digest: digest.parse().unwrap() },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
            runtime: RuntimeConfig::default(),
            machine: Machine { cpus: 1, memory_mib: 64, disk_mib: 16 },
            snapshot_only: false,
        };
        new.publish(&template).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Sandboxes outlive their gateway.
        let needle = self.path("data").to_str().unwrap().to_owned();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if let (Some(pid), true) = (pid, String::from_utf8_lossy(&command).contains(&needle)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// A gateway that serves; killed with the test.
struct Served {
    child: Child,
    exports: Vec<(String, String)>,
    log: Receiver<String>,
}

impl Served {
    fn start(mut command: Command, exports: usize) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (lines, log) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
        let stdout = BufReader::new(child.stdout.take().unwrap()).lines();
        let exports = stdout.take(exports).map(|line| {
            let line = line.unwrap();
            let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        });
        Self { exports: exports.collect(), child, log }
    }

    fn export(&self, name: &str) -> &str {
        let found = self.exports.iter().find(|(known, _)| known == name);
        &found.unwrap_or_else(|| panic!("no {name} in {:?}", self.exports)).1
    }

    /// Waits for a line of the log with these words.
    fn says(&self, words: &str) -> String {
        loop {
            let line = self.log.recv_timeout(DEADLINE).unwrap_or_else(|error| panic!("{words:?}: {error}"));
            if line.contains(words) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn stop(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body of a whole answer.
fn call(stream: &mut (impl Read + Write), key: &str, request: &str, body: &str) -> io::Result<(u16, String)> {
    let length = body.len();
    let head = format!("{request} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {key}\r\nConnection: close\r\n");
    write!(stream, "{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned()))
}

/// A connection that trusts these certificates.
fn secure(
    address: SocketAddr,
    name: &str,
    trusted: &str,
) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(trusted.as_bytes()) {
        roots.add(cert.unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream);
    stream.conn.complete_io(&mut stream.sock)?;
    Ok(stream)
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

/// A fresh certificate for what is below the domain, in files that `serve` is told of; gives its PEM.
fn write_pair(host: &Host) -> String {
    let key = KeyPair::generate().unwrap();
    let cert = CertificateParams::new([format!("*.{DOMAIN}")]).unwrap().self_signed(&key).unwrap();
    let cert = pem("CERTIFICATE", cert.der());
    fs::write(host.path("cert.pem"), &cert).unwrap();
    fs::write(host.path("key.pem"), pem("PRIVATE KEY", key.serialized_der())).unwrap();
    cert
}

#[test]
fn plain_http_is_for_this_machine_unless_it_is_allowed() {
    let host = Host::new();
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:3000"] {
        let output = host.serve(&["--listen", listen]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("--tls-self-signed") && stderr.contains("--allow-plain-http"), "{stderr}");
    }
    let served = Served::start(host.serve(&["--listen", "0.0.0.0:0", "--allow-plain-http"]), 3);
    assert!(served.export("E2B_API_URL").starts_with("http://127.0.0.1:"));
    assert_eq!(served.stop(), Some(0));
    for wrong in [
        &["--tls-cert", "x"][..],
        &["--tls-key", "x"],
        &["--tls-self-signed", "--allow-plain-http"],
        &["--tls-self-signed", "--tls-cert", "x", "--tls-key", "y"],
        &["--team-requests", "0"],
        &["--keyless-requests", "some"],
    ] {
        assert_eq!(host.serve(wrong).output().unwrap().status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn an_authority_of_its_own_is_printed_and_vouches_for_it() {
    let host = Host::new();
    let ca = host.ok(&["ca", "--domain", "BOXES.example"]);
    let served = Served::start(host.serve(&["--tls-self-signed"]), 5);
    let url = served.export("E2B_API_URL");
    let address: SocketAddr = url.strip_prefix("https://").unwrap().parse().unwrap();
    assert_eq!(served.export("E2B_DOMAIN"), format!("{DOMAIN}:{}", address.port()));
    let file = served.export("NODE_EXTRA_CA_CERTS").trim_matches('\'').to_owned();
    assert_eq!(fs::read_to_string(file).unwrap(), ca);
    let key = served.export("E2B_API_KEY");
    for name in ["127.0.0.1", "localhost", DOMAIN, &format!("api.{DOMAIN}")] {
        let (status, body) = call(&mut secure(address, name, &ca).unwrap(), key, "GET /teams", "").unwrap();
        assert_eq!(status, 200, "{name}: {body}");
    }
    // What it said at its start is what it says later, and after a restart its clients still trust it.
    let printed: Vec<String> = host.ok(&["env"]).lines().map(str::to_owned).collect();
    let said: Vec<String> =
        served.exports.iter().map(|(name, value)| format!("export {name}={value}")).collect();
    assert_eq!(printed, said);
    assert_eq!(served.stop(), Some(0));
    let again = Served::start(host.serve(&["--tls-self-signed"]), 5);
    let address = again.export("E2B_API_URL").strip_prefix("https://").unwrap().parse().unwrap();
    secure(address, DOMAIN, &ca).unwrap();
    assert_eq!(host.ok(&["ca", "--domain", DOMAIN]), ca);
}

#[test]
fn a_hangup_reads_the_certificate_again() {
    let host = Host::new();
    let first = write_pair(&host);
    let (cert, key) = (host.path("cert.pem"), host.path("key.pem"));
    let files = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
    let served = Served::start(host.serve(&files), 4);
    let domain = served.export("E2B_DOMAIN").to_owned();
    let port = domain.strip_prefix(&format!("{DOMAIN}:")).unwrap();
    assert_eq!(served.export("E2B_API_URL"), format!("https://api.{domain}"));
    let (address, name) =
        (SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap())), format!("api.{DOMAIN}"));
    secure(address, &name, &first).unwrap();

    let second = write_pair(&host);
    served.signal(Signal::HUP);
    served.says("another TLS certificate from now on");
    secure(address, &name, &second).unwrap();
    assert!(secure(address, &name, &first).is_err());

    fs::write(&key, "broken").unwrap();
    served.signal(Signal::HUP);
    let line = served.says("stays the one it was");
    assert!(line.contains("key.pem: expected a private key in PEM"), "{line}");
    let api_key = served.export("E2B_API_KEY");
    let (status, _) = call(&mut secure(address, &name, &second).unwrap(), api_key, "GET /teams", "").unwrap();
    assert_eq!(status, 200);
    assert_eq!(served.stop(), Some(0));
    // To begin with, there has to be one.
    let output = host.serve(&files).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("key.pem: expected"), "{stderr}");
}

#[test]
fn a_backup_under_writes_is_a_database_that_another_gateway_serves() {
    let host = Host::new();
    host.template();
    let served = Served::start(host.serve(&["--max-cpus", "1000", "--max-memory", "100000"]), 3);
    let key = served.export("E2B_API_KEY").to_owned();
    let address = served.export("E2B_API_URL").strip_prefix("http://").unwrap().to_owned();
    let create = || {
        let body = r#"{"templateID":"base","timeout":3600}"#;
        let mut stream = TcpStream::connect(&address).unwrap();
        let (status, body) = call(&mut stream, &key, "POST /v2/sandboxes", body).unwrap();
        assert_eq!(status, 201, "{body}");
        let made: serde_json::Value = serde_json::from_str(&body).unwrap();
        made["sandboxID"].as_str().unwrap().to_owned()
    };
    let (copy, created) = (host.path("copy.db"), Mutex::new(BTreeSet::new()));
    let done = AtomicBool::new(false);
    let before = std::thread::scope(|threads| {
        let (begun, begins) = channel();
        for _ in 0..2 {
            let (begun, created, done, create) = (begun.clone(), &created, &done, &create);
            threads.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let id = create();
                    created.lock().unwrap().insert(id);
                    let _ = begun.send(());
                }
            });
        }
        for _ in 0..3 {
            begins.recv_timeout(DEADLINE).unwrap();
        }
        let before = created.lock().unwrap().clone();
        let made = host.run(&["backup", copy.to_str().unwrap()]);
        // One more, so that the two differ whatever the pace.
        begins.recv_timeout(DEADLINE).unwrap();
        done.store(true, Ordering::Relaxed);
        assert_eq!(made.0, 0, "{made:?}");
        before
    });
    assert!(!before.is_empty());
    assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    let database = rusqlite::Connection::open(&copy).unwrap();
    let mut query = database.prepare("SELECT id FROM sandboxes").unwrap();
    let copied: BTreeSet<String> =
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert!(before.is_subset(&copied), "what had been answered is in it");
    drop(query);
    drop(database);

    // It is not overwritten by mistake.
    let (code, _, stderr) = host.run(&["backup", copy.to_str().unwrap()]);
    assert!(code == 2 && stderr.contains("--force"), "{stderr}");
    let kept = fs::read(&copy).unwrap();
    let second = Host::new();
    fs::create_dir(second.path("data")).unwrap();
    fs::write(second.path("data/gateway.db"), &kept).unwrap();
    host.ok(&["backup", "--force", copy.to_str().unwrap()]);
    assert_ne!(fs::read(&copy).unwrap(), kept);
    assert_eq!(second.run(&["backup", "/nonexistent/folder/copy.db"]).0, 1);

    // The keys are good there, and sandboxes that are elsewhere are none.
    let other = Served::start(second.serve(&[]), 3);
    let address = other.export("E2B_API_URL").strip_prefix("http://").unwrap();
    let (status, listed) =
        call(&mut TcpStream::connect(address).unwrap(), &key, "GET /v2/sandboxes?limit=100", "").unwrap();
    assert_eq!((status, listed.as_str()), (200, "[]"));
    assert_eq!(other.stop(), Some(0));
}

#[test]
fn a_teams_rate_is_the_operators_to_change() {
    let host = Host::new();
    host.ok(&["teams", "create", "slow", "--requests", "1"]);
    let key = host.ok(&["keys", "create", "--team", "slow"]).trim().to_owned();
    let served = Served::start(host.serve(&[]), 3);
    let address = served.export("E2B_API_URL").strip_prefix("http://").unwrap();
    let ask = || call(&mut TcpStream::connect(address).unwrap(), &key, "GET /teams", "").unwrap().0;
    // Far more than the burst of ten.
    assert!((0..200).map(|_| ask()).any(|status| status == 429));
    host.ok(&["teams", "quota", "slow", "--requests", "unlimited"]);
    assert!((0..50).map(|_| ask()).all(|status| status == 200), "it holds at once");
    let teams: serde_json::Value = serde_json::from_str(&host.ok(&["teams", "list", "--json"])).unwrap();
    let rates: Vec<_> = teams.as_array().unwrap().iter().map(|team| &team["requests"]).collect();
    assert_eq!(rates, [&serde_json::Value::Null, &u32::MAX.into()]);
    host.ok(&["teams", "quota", "slow", "--requests", "default"]);
    assert_eq!(host.ok(&["teams", "list"]).matches("default").count(), 3, "the team's name, and two rates");
}
