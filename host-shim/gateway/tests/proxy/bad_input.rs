//! Clients that do not mean well.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::StatusCode;
use tiffin_gateway::server::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{AGENT, Builder, DEADLINE, Fake, Front, Serve, empty, full, raw, to};

type Seen = Arc<Mutex<Vec<u8>>>;

/// A server that answers each head and keeps every byte that it got.
fn recorder(seen: &Seen) -> Serve {
    let seen = Arc::clone(seen);
    raw(move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut head = Vec::new();
            while let Ok(byte) = stream.read_u8().await {
                seen.lock().unwrap().push(byte);
                head.push(byte);
                if head.ends_with(b"\r\n\r\n") {
                    head.clear();
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            }
        }
    })
}

fn recording() -> (Fake, Seen) {
    let seen = Seen::default();
    let sandbox =
        Builder::default().port(80, recorder(&seen)).port(AGENT, recorder(&seen)).start("aaaa", "red");
    (sandbox, seen)
}

const TO: &str = "host: localhost\r\ne2b-sandbox-id: aaaa\r\n";

#[tokio::test]
async fn what_is_not_one_clear_request_is_refused_here() {
    let (sandbox, seen) = recording();
    let front = Front::of(&[&sandbox]).await;
    for port in [80, AGENT] {
        let to = format!("{TO}e2b-sandbox-port: {port}\r\n");
        for (what, request) in [
            (
                "two lengths",
                format!("POST / HTTP/1.1\r\n{to}content-length: 1\r\ncontent-length: 2\r\n\r\nab"),
            ),
            ("a list of lengths", format!("POST / HTTP/1.1\r\n{to}content-length: 1, 2\r\n\r\nab")),
            ("a signed length", format!("POST / HTTP/1.1\r\n{to}content-length: +1\r\n\r\na")),
            ("a negative length", format!("POST / HTTP/1.1\r\n{to}content-length: -1\r\n\r\n")),
            (
                "a length beyond all",
                format!("POST / HTTP/1.1\r\n{to}content-length: 99999999999999999999\r\n\r\n"),
            ),
            ("a folded line", format!("GET / HTTP/1.1\r\n{to}x-a: 1\r\n x-b: 2\r\n\r\n")),
            ("a space before the colon", format!("GET / HTTP/1.1\r\n{to}content-length : 1\r\n\r\na")),
            ("no last chunked", format!("POST / HTTP/1.1\r\n{to}transfer-encoding: chunked, gzip\r\n\r\n")),
            ("an unknown coding", format!("POST / HTTP/1.1\r\n{to}transfer-encoding: xchunked\r\n\r\n")),
            (
                "chunks before 1.1",
                format!("POST / HTTP/1.0\r\n{to}transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
            ),
            ("a NUL", format!("GET / HTTP/1.1\r\n{to}x-a: \0\r\n\r\n")),
            ("a lone CR", format!("GET / HTTP/1.1\r\n{to}x-a: 1\rx-b: 2\r\n\r\n")),
            ("no host", "GET / HTTP/1.1\r\ne2b-sandbox-id: aaaa\r\ne2b-sandbox-port: 80\r\n\r\n".into()),
            ("two hosts", format!("GET / HTTP/1.1\r\n{to}host: localhost\r\n\r\n")),
            ("another target", format!("GET http://80-bbbb.localhost/ HTTP/1.1\r\n{to}\r\n")),
            ("two ids", format!("GET / HTTP/1.1\r\n{to}e2b-sandbox-id: bbbb\r\n\r\n")),
            (
                "another id",
                "GET / HTTP/1.1\r\nhost: 80-aaaa.localhost\r\ne2b-sandbox-id: bbbb\r\n\r\n".into(),
            ),
            ("no port", format!("GET / HTTP/1.1\r\n{TO}\r\n")),
            ("port 0", format!("GET / HTTP/1.1\r\n{TO}e2b-sandbox-port: 0\r\n\r\n")),
            ("no version", format!("GET /\r\n{to}\r\n")),
            ("a space in the target", format!("GET / x HTTP/1.1\r\n{to}\r\n")),
        ] {
            let request = request.replacen("HTTP/1.1\r\n", "HTTP/1.1\r\nconnection: close\r\n", 1);
            let answer = front.talk(&request).await;
            assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{what}: {answer:?}");
            assert!(!answer[1..].contains("HTTP/1.1 "), "{what}: a second answer: {answer:?}");
        }
    }
    assert_eq!(sandbox.dials(), 0, "{:?}", String::from_utf8_lossy(&seen.lock().unwrap()));
}

/// RFC 9112, 6.3: with both a length and chunks, the chunks count, and the connection ends. Bare line feeds may end lines
/// (2.2). What the sandbox gets is written anew: one request, one framing.
#[tokio::test]
async fn a_second_request_cannot_hide_in_a_body() {
    let hidden = "GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n";
    for port in [80, AGENT] {
        let to = format!("{TO}e2b-sandbox-port: {port}\r\n");
        for (what, request) in [
            (
                "chunks, then a length",
                format!(
                    "POST /seen HTTP/1.1\r\n{to}transfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\n{hidden}"
                ),
            ),
            (
                "a length, then chunks",
                format!(
                    "POST /seen HTTP/1.1\r\n{to}content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
                ),
            ),
            (
                "bare line feeds",
                format!("POST /seen HTTP/1.1\r\n{to}connection: close\r\ncontent-length: 0\n\n{hidden}"),
            ),
        ] {
            let (sandbox, seen) = recording();
            let front = Front::of(&[&sandbox]).await;
            let answer = front.talk(&request).await;
            assert!(answer.starts_with("HTTP/1.1 "), "{what}: {answer:?}");
            assert!(!answer[1..].contains("HTTP/1.1 "), "{what}: a second answer: {answer:?}");
            let seen = String::from_utf8_lossy(&seen.lock().unwrap()).to_lowercase();
            assert!(!seen.contains("hidden"), "{what}: {seen:?}");
            assert_eq!(seen.matches(" http/1.1\r\n").count(), 1, "{what}: {seen:?}");
            let framings =
                seen.matches("content-length:").count() + seen.matches("transfer-encoding:").count();
            assert!(framings <= 1, "{what}: {seen:?}");
        }
        // A chunk that is none: the request breaks off, and so does what the sandbox gets.
        for chunk in ["zz\r\n", "5\nhello\n0\n\n", "-1\r\n", "fffffffffffffffff\r\n", "5 \rx\r\nhello\r\n"] {
            let (sandbox, seen) = recording();
            let front = Front::of(&[&sandbox]).await;
            let request =
                format!("POST /seen HTTP/1.1\r\n{to}transfer-encoding: chunked\r\n\r\n{chunk}{hidden}");
            let answer = front.talk(&request).await;
            assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{chunk:?}: {answer:?}");
            let seen = String::from_utf8_lossy(&seen.lock().unwrap()).to_lowercase();
            assert!(!seen.contains("hidden") && !seen.ends_with("0\r\n\r\n"), "{chunk:?}: {seen:?}");
        }
    }
}

#[tokio::test]
async fn a_head_beyond_its_limits_is_refused() {
    let (sandbox, _) = recording();
    let front = Front::of(&[&sandbox]).await;
    let to = format!("{TO}e2b-sandbox-port: 80\r\nconnection: close\r\n");
    let long = format!("GET / HTTP/1.1\r\n{to}x-long: {}\r\n\r\n", "a".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\n{to}{}\r\n", "x-many: 1\r\n".repeat(200));
    let target = format!("GET /{} HTTP/1.1\r\n{to}\r\n", "a".repeat(70_000));
    let longer = format!("GET / HTTP/1.1\r\n{to}x-long: {}\r\n\r\n", "a".repeat(2_000_000));
    for request in [long, many, target, longer] {
        let answer = front.talk(&request).await;
        let refused = ["HTTP/1.1 431 ", "HTTP/1.1 414 "].iter().any(|status| answer.starts_with(status));
        assert!(refused, "{answer:?}");
    }
    let mut second = front.connect_http2().await;
    let uri = format!("http://{}/", front.address);
    let long = http::Request::get(&uri).header("x-long", "a".repeat(100_000)).body(empty()).unwrap();
    if let Ok(response) = second.send_request(long).await {
        assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    }
    assert_eq!(sandbox.dials(), 0);
}

#[tokio::test]
async fn connect_is_not_served() {
    let (sandbox, _) = recording();
    let front = Front::of(&[&sandbox]).await;
    for target in ["80-aaaa.localhost:80", "127.0.0.1:22"] {
        let answer = front
            .talk(format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\nconnection: close\r\n\r\n"))
            .await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer:?}");
    }
    assert_eq!(sandbox.dials(), 0);
}

#[tokio::test]
async fn a_slow_head_does_not_hold_a_connection() {
    let (sandbox, _) = recording();
    let limits = Limits { connections: 4, header_timeout: Duration::from_millis(500), ..Limits::default() };
    let front = Front::within(limits, &[&sandbox]).await;
    // As many as there may be, each stuck somewhere else.
    let mut stuck = Vec::new();
    for begin in ["", "PRI * HT", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\nhost: loc"] {
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(begin.as_bytes()).await.unwrap();
        stuck.push(stream);
    }
    // There is room again, without any of them having gone.
    let request = to("aaaa", 80, "/").body(empty()).unwrap();
    let answer = tokio::time::timeout(DEADLINE, front.send(request)).await.expect("there is room");
    assert_eq!(answer.status, StatusCode::OK);
    for mut stream in stuck {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
        let _ = ended.expect("the gateway ends it");
    }
}

#[tokio::test]
async fn what_is_no_http_behind_a_port_is_said() {
    for bytes in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"HTTP/1.1 2000 x\r\n\r\n", b"\0\0\0\0\0\0\0\0\0\0", b""] {
        let server = raw(move |mut stream| async move {
            let mut byte = [0];
            let _ = stream.read(&mut byte).await;
            let _ = stream.write_all(bytes).await;
        });
        let sandbox = Builder::default().port(AGENT, server.clone()).port(22, server).start("aaaa", "red");
        let front = Front::of(&[&sandbox]).await;
        for port in [22, AGENT] {
            let request = to("aaaa", port, "/").method("POST").body(full("x")).unwrap();
            let answer = front.send(request).await;
            assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
            let message = answer.json()["message"].as_str().unwrap().to_owned();
            assert!(message.starts_with("The sandbox is running but the port gave no answer: "), "{message}");
        }
    }
}
