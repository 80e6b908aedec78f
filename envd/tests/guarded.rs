//! A sandbox with a token: what is refused is answered, whatever its client is sending.

mod support_service;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support_service::{DEADLINE, Host, Service};

/// A service whose sandbox has the token `secret`.
fn guarded() -> (Service, Host) {
    let service = Service::start();
    let (mut host, _) = service.host();
    assert_eq!(host.ask(json!({"configure": {"accessToken": "secret"}}))["error"], Value::Null);
    (service, host)
}

fn connect(service: &Service) -> UnixStream {
    let stream = UnixStream::connect(service.at("envd.sock")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The status line of an answer, and its body.
fn answer(stream: &mut impl BufRead) -> (String, String) {
    let (mut status, mut line, mut length) = (String::new(), String::new(), 0);
    stream.read_line(&mut status).unwrap();
    while stream.read_line(&mut line).unwrap() > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status.trim().to_owned(), String::from_utf8(body).unwrap())
}

#[test]
fn a_refused_call_is_answered_although_its_client_sends_all_before_it_reads() {
    const LENGTH: usize = 16 << 20;
    let (service, _host) = guarded();
    let folder = service.folder.path().display();
    for (what, head, expected) in [
        ("a wrong token", "POST /files?path=/x HTTP/1.1\r\nx-access-token: wrong\r\n".to_owned(), "401"),
        ("no path", "POST /files HTTP/1.1\r\nx-access-token: secret\r\n".to_owned(), "400"),
        (
            "a folder",
            format!("POST /files?path={folder}&username=root HTTP/1.1\r\nx-access-token: secret\r\n"),
            "400",
        ),
        (
            "no such user",
            "POST /files?path=/x&username=nobody-here HTTP/1.1\r\nx-access-token: secret\r\n".into(),
            "401",
        ),
        ("a wrong method", "PUT /files?path=/x HTTP/1.1\r\nx-access-token: secret\r\n".to_owned(), "405"),
        ("a wrong path", "POST /nothing HTTP/1.1\r\n".to_owned(), "404"),
        ("a call with a wrong token", "POST /process.Process/List HTTP/1.1\r\n".to_owned(), "401"),
    ] {
        let mut stream = BufReader::new(connect(&service));
        let fields =
            format!("host: x\r\ncontent-type: application/octet-stream\r\ncontent-length: {LENGTH}\r\n\r\n");
        stream.get_mut().write_all(format!("{head}{fields}").as_bytes()).unwrap();
        let piece = vec![b'x'; 1 << 20];
        for sent in 0..LENGTH / piece.len() {
            stream
                .get_mut()
                .write_all(&piece)
                .unwrap_or_else(|error| panic!("{what}: {error} after {sent} MiB"));
        }
        let (status, body) = answer(&mut stream);
        assert!(status.starts_with(&format!("HTTP/1.1 {expected}")), "{what}: {status} {body}");
        // All was taken, so the connection goes on.
        stream.get_mut().write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        assert!(answer(&mut stream).0.starts_with("HTTP/1.1 204"), "{what}");
    }
}

#[test]
fn a_client_that_waits_for_the_word_to_send_is_told_no() {
    let (service, _host) = guarded();
    let mut stream = connect(&service);
    stream
        .write_all(
            b"POST /files?path=/x HTTP/1.1\r\nhost: x\r\nx-access-token: wrong\r\nexpect: 100-continue\r\n\
              content-type: application/octet-stream\r\ncontent-length: 1000000\r\n\r\n",
        )
        .unwrap();
    // It ends with the connection: the body will never come.
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert!(all.starts_with("HTTP/1.1 401"), "{all}");
}

/// `v1_` and the base64 of SHA-256 of `path:operation:user:token[:expiration]`, without padding.
fn signature(path: &str, operation: &str, token: &str, expiration: Option<u64>) -> String {
    let mut text = format!("{path}:{operation}::{token}");
    if let Some(expiration) = expiration {
        text.push_str(&format!(":{expiration}"));
    }
    let signature = format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(Sha256::digest(text)));
    let escaped = signature.replace('+', "%2B").replace('/', "%2F");
    let expiration = expiration.map_or_else(String::new, |at| format!("&signature_expiration={at}"));
    format!("path={path}&signature={escaped}{expiration}")
}

#[test]
fn a_signature_opens_one_file_for_one_operation_until_it_expires() {
    let (service, _host) = guarded();
    let path = service.at("signed").display().to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let call = |method: &str, query: String, more: &str| {
        let mut stream = BufReader::new(connect(&service));
        let body = if method == "POST" { "signed" } else { "" };
        let request = format!(
            "{method} /files?{query} HTTP/1.1\r\nhost: x\r\n{more}content-type: application/octet-stream\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        answer(&mut stream)
    };
    let later = Some(now + 1000);
    let (status, body) = call("POST", signature(&path, "write", "secret", None), "");
    assert_eq!(status, "HTTP/1.1 200 OK", "{body}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "signed");
    assert_eq!(call("POST", signature(&path, "write", "secret", later), "").0, "HTTP/1.1 200 OK");
    for expiration in [None, later] {
        let read = call("GET", signature(&path, "read", "secret", expiration), "");
        assert_eq!((read.0.as_str(), read.1.as_str()), ("HTTP/1.1 200 OK", "signed"));
    }
    let invalid = "the signature is not valid";
    for (method, query, more, expected) in [
        ("GET", signature(&path, "read", "secret", Some(now - 10)), "", "signature is already expired"),
        ("POST", signature(&path, "write", "secret", Some(now - 10)), "", "signature is already expired"),
        ("GET", signature(&path, "write", "secret", None), "", invalid),
        ("POST", signature(&path, "read", "secret", None), "", invalid),
        ("GET", signature(&path, "read", "other", None), "", invalid),
        ("GET", signature("/etc/passwd", "read", "secret", None).replace("/etc/passwd", &path), "", invalid),
        ("GET", signature(&path, "read", "secret", later) + "0", "", invalid),
        ("GET", signature(&path, "read", "secret", None) + "&username=root", "", invalid),
        ("GET", format!("path={path}"), "", "X-Access-Token is missing"),
        // A token that is given counts.
        ("GET", signature(&path, "read", "secret", None), "x-access-token: wrong\r\n", "missing or wrong"),
    ] {
        let (status, body) = call(method, query.clone(), more);
        assert_eq!(status, "HTTP/1.1 401 Unauthorized", "{method} {query}: {body}");
        let error: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(error["code"], 401);
        assert!(error["message"].as_str().unwrap().contains(expected), "{method} {query}: {body}");
    }
}
