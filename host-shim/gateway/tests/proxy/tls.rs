//! The same port with TLS: what changes for clients is nothing, and what else may arrive there is told or ended.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request as AxumRequest;
use axum::routing::any;
use http::{Request, StatusCode};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tiffin_gateway::server::Limits;
use tiffin_gateway::tls::{Authority, PairFiles, Source, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::{Answer, Builder, DEADLINE, DOMAIN, Fake, Front, empty, eventually, full, http, to};

/// A sandbox that says how it was asked.
fn telling() -> Fake {
    let tell = any(|request: AxumRequest| async move {
        let header = |name: &str| {
            request.headers().get(name).map_or("none", |value| value.to_str().unwrap()).to_owned()
        };
        format!("{} {} {}", request.uri(), header("host"), header("x-forwarded-proto"))
    });
    Builder::default().port(80, http(Router::new().fallback(tell))).start("aaaa", "red")
}

struct Trusting {
    roots: RootCertStore,
}

impl Trusting {
    fn in_these(pem: &[u8]) -> Self {
        let mut roots = RootCertStore::empty();
        for cert in CertificateDer::pem_slice_iter(pem) {
            roots.add(cert.unwrap()).unwrap();
        }
        Self { roots }
    }

    /// A connection to a name, which speaks these protocols.
    async fn connect(
        &self,
        front: &Front,
        name: &str,
        protocols: &[&[u8]],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let stream = TcpStream::connect(front.address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
        tokio::time::timeout(DEADLINE, handshake).await.expect("no hang")
    }

    /// The certificate that a new connection sees.
    async fn sees(&self, front: &Front, name: &str) -> Vec<u8> {
        let stream = self.connect(front, name, &[]).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }
}

/// Over HTTP/1.1, on a connection of its own.
async fn ask(stream: TlsStream<TcpStream>, request: Request<crate::support::Body>) -> Answer {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let response = tokio::time::timeout(DEADLINE, sender.send_request(request)).await.expect("no hang");
    Answer::of(response.unwrap()).await
}

fn self_signed(folder: &Path) -> (Arc<Tls>, Trusting) {
    let authority = Authority::of(folder, DOMAIN);
    let clients = Trusting::in_these(authority.certificate().unwrap().as_bytes());
    (Arc::new(Tls::open(Source::SelfSigned(authority)).unwrap()), clients)
}

/// Files with a fresh certificate for the domain; gives its PEM and DER.
fn write_pair(files: &PairFiles) -> (String, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new([DOMAIN.to_owned(), format!("*.{DOMAIN}")]).unwrap();
    params.not_after = rcgen::date_time_ymd(2100, 1, 1);
    let cert = params.self_signed(&key).unwrap();
    let pem = pem("CERTIFICATE", cert.der());
    // Replaced, as every tool that renews does it.
    for (path, text) in [(&files.cert, &pem), (&files.key, &pem_of_key(&key))] {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }
    (pem, cert.der().to_vec())
}

fn pem_of_key(key: &KeyPair) -> String {
    pem("PRIVATE KEY", key.serialized_der())
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

#[tokio::test]
async fn every_name_of_the_domain_is_served_in_both_versions_of_http() {
    let (folder, sandbox) = (tempfile::tempdir().unwrap(), telling());
    let (tls, clients) = self_signed(folder.path());
    let front = Front::with(Some(tls), Limits::default(), &[&sandbox]).await;

    let host = format!("80-aaaa.{DOMAIN}");
    let stream = clients.connect(&front, &host, &[b"http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let request = Request::get("/a?b").header("host", &host).body(empty()).unwrap();
    assert_eq!(ask(stream, request).await.text, format!("/a?b {host} https"));
    // A client that names no protocol, by loopback's address, with what a proxy before it said.
    let stream = clients.connect(&front, "127.0.0.1", &[]).await.unwrap();
    let request = to("aaaa", 80, "/c").header("x-forwarded-proto", "gopher").body(empty()).unwrap();
    assert_eq!(ask(stream, request).await.text, "/c 127.0.0.1 gopher");

    // One connection for the control API and a sandbox.
    let stream = clients.connect(&front, &format!("api.{DOMAIN}"), &[b"h2", b"http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut get = async |url: String| {
        let response = sender.send_request(Request::get(url).body(empty()).unwrap());
        Answer::of(tokio::time::timeout(DEADLINE, response).await.expect("no hang").unwrap()).await
    };
    assert_eq!(get(format!("https://api.{DOMAIN}/health")).await.status, StatusCode::OK);
    assert_eq!(get(format!("https://{host}/d")).await.text, format!("/d {host} https"));
    let numbers = get(format!("https://api.{DOMAIN}/metrics")).await.text;
    assert!(numbers.contains(r#"tiffin_tls_handshakes_total{outcome="Done"} 3"#), "{numbers}");
    let ends =
        numbers.lines().find_map(|line| line.strip_prefix("tiffin_tls_certificate_end_timestamp_seconds "));
    assert!(ends.unwrap().parse::<i64>().unwrap() > jiff::Timestamp::now().as_second());

    assert!(clients.connect(&front, "boxes.example.org", &[]).await.is_err(), "another's name");
    // What is spoken by none of us ends the handshake (RFC 7301, 3.2).
    assert!(clients.connect(&front, DOMAIN, &[b"spdy/3"]).await.is_err());
}

#[tokio::test]
async fn uploads_and_downloads_pass_whole() {
    let folder = tempfile::tempdir().unwrap();
    let echo = any(|request: AxumRequest| async move { request.into_body() });
    let sandbox = Builder::default().port(80, http(Router::new().fallback(echo))).start("aaaa", "red");
    let (tls, clients) = self_signed(folder.path());
    let front = Front::with(Some(tls), Limits::default(), &[&sandbox]).await;
    // Larger than every buffer on the way, and than a record of TLS.
    let text: String = (0..500_000).map(|number| format!("{number:>8}")).collect();
    let stream = clients.connect(&front, DOMAIN, &[]).await.unwrap();
    let request = to("aaaa", 80, "/").method("POST").body(full(text.clone())).unwrap();
    assert!(ask(stream, request).await.text == text, "what came back is something else");
}

#[tokio::test]
async fn a_certificate_is_replaced_without_a_restart() {
    let (folder, sandbox) = (tempfile::tempdir().unwrap(), telling());
    let files = PairFiles { cert: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
    let (first, first_der) = write_pair(&files);
    let tls = Arc::new(Tls::open(Source::Files(files.clone())).unwrap());
    let front = Front::with(Some(Arc::clone(&tls)), Limits::default(), &[&sandbox]).await;
    let clients = Trusting::in_these(first.as_bytes());
    assert_eq!(clients.sees(&front, DOMAIN).await, first_der);
    let old = clients.connect(&front, DOMAIN, &[]).await.unwrap();

    // Nobody says so: the files alone.
    let (second, second_der) = write_pair(&files);
    let both = Trusting::in_these(format!("{first}{second}").as_bytes());
    let renewed = async {
        while both.sees(&front, DOMAIN).await != second_der {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, renewed).await.expect("the new certificate");
    // A connection from before is none the worse.
    let answer = ask(old, to("aaaa", 80, "/old").body(empty()).unwrap()).await;
    assert_eq!(answer.text, "/old 127.0.0.1 https");

    // A broken one is passed over, and the next good one taken at a word.
    fs::write(&files.cert, "half a certifi").unwrap();
    tls.reload();
    assert_eq!(both.sees(&front, DOMAIN).await, second_der);
    let (third, third_der) = write_pair(&files);
    let all = Trusting::in_these(format!("{second}{third}").as_bytes());
    tls.reload();
    let renewed = async {
        while all.sees(&front, DOMAIN).await != third_der {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, renewed).await.expect("the third certificate");
}

#[tokio::test]
async fn http_in_the_clear_is_told_and_other_noise_ended() {
    let (folder, sandbox) = (tempfile::tempdir().unwrap(), telling());
    let (tls, _) = self_signed(folder.path());
    let front = Front::with(Some(tls), Limits::default(), &[&sandbox]).await;
    for request in [
        "GET / HTTP/1.1\r\nhost: 80-aaaa.boxes.example\r\n\r\n",
        "POST /sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: k\r\ncontent-length: 5\r\n\r\nhello",
        "GET / HTTP/1.0\r\n\r\n",
    ] {
        let answer = front.talk(request).await;
        assert!(answer.starts_with("HTTP/1.") && answer[8..].starts_with(" 400 "), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(body["code"] == 400 && body["message"].as_str().unwrap().contains("https://"), "{body}");
    }
    let mut http2 = front.connect_http2().await;
    let response = http2.send_request(Request::get("http://x/").body(empty()).unwrap());
    let response = tokio::time::timeout(DEADLINE, response).await.expect("no hang").unwrap();
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    drop(http2);
    for noise in [
        &b"\x80\x2e\x01\0\x02"[..],
        b"\0",
        b"ssh-2.0",
        b"\x16\x03\x01\0\x04junk",
        b"\x16\xff\xff\xff\xff\xff",
    ] {
        let answer = front.talk(noise).await;
        assert!(!answer.contains("HTTP"), "{answer}");
    }
    assert_eq!(sandbox.dials(), 0);
}

/// The beginning of a ClientHello of 512 bytes.
const HALF_A_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

/// Bytes of a client's that the gateway has not read yet (proc(5), /proc/net/tcp).
fn unread(client: &TcpStream) -> u64 {
    let ends = (client.peer_addr().unwrap().port(), client.local_addr().unwrap().port());
    let port = |end: &str| u16::from_str_radix(end.rsplit(':').next().unwrap(), 16).unwrap();
    let table = fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mut lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let found = lines.find(|line| (port(line[1]), port(line[2])) == ends).expect("the connection is there");
    u64::from_str_radix(found[4].rsplit(':').next().unwrap(), 16).unwrap()
}

#[tokio::test]
async fn handshakes_have_a_time_and_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let (tls, clients) = self_signed(folder.path());
    let limits = Limits { handshakes: 2, handshake_timeout: Duration::from_millis(500), ..Limits::default() };
    let front = Front::with(Some(Arc::clone(&tls)), limits, &[]).await;
    // Those that stop anywhere are ended, and give back what they took.
    for begin in [&b""[..], b"\x16", HALF_A_HELLO, HALF_A_HELLO, b"GET / HTTP/1.1\r\n"] {
        front.talk(begin).await;
    }
    // A slow machine needs more than one try.
    let served = async {
        loop {
            if let Ok(stream) = clients.connect(&front, DOMAIN, &[]).await {
                return stream;
            }
        }
    };
    let stream = tokio::time::timeout(DEADLINE, served).await.expect("there is room");
    let numbers = ask(stream, Request::get("/metrics").header("host", "x").body(empty()).unwrap()).await.text;
    let late =
        numbers.lines().find_map(|line| line.strip_prefix(r#"tiffin_tls_handshakes_total{outcome="Late"} "#));
    assert!(late.unwrap().parse::<u32>().unwrap() >= 4, "{numbers}");

    // With every place taken, another waits until one is free.
    let limits = Limits { handshakes: 2, handshake_timeout: 10 * DEADLINE, ..Limits::default() };
    let mut front = Front::with(Some(tls), limits, &[]).await;
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(HALF_A_HELLO).await.unwrap();
        stuck.push(stream);
    }
    // Who has a place is read from.
    let taken = || stuck.iter().all(|stream| unread(stream) == 0);
    eventually("both have a place", taken).await;
    // A third gets no alert for what it sent, because nobody reads it.
    let mut third = TcpStream::connect(front.address).await.unwrap();
    third.write_all(b"\x16\x03\x01\0\x04junk").await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(300), third.read(&mut byte)).await;
    assert!(early.is_err() && unread(&third) == 9, "it was not the third: {early:?}");
    stuck.pop();
    let read = tokio::time::timeout(DEADLINE, third.read(&mut byte)).await.expect("its turn comes");
    assert!(read.is_ok());

    // Half-way handshakes do not keep a gateway from stopping.
    front.shutdown.cancel();
    front.stopped().await;
    eventually("the last one is ended", || stuck[0].try_read(&mut [0; 64]).is_ok_and(|read| read == 0)).await;
}
