//! A sandbox with a token: what is refused is answered, whatever its client is sending.

mod support_service;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};
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
    const LENGTH: usize = 64 << 20;
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
