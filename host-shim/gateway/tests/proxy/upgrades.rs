//! WebSockets and whatever else a connection becomes.

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::routing::any;
use http::StatusCode;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{AGENT, Builder, DEADLINE, Front, Http1, Serve, empty, http, raw, read_head, to};

/// A server whose WebSockets say what they hear.
pub(crate) fn echo_server() -> Serve {
    http(Router::new().route(
        "/ws",
        any(|upgrade: WebSocketUpgrade| async {
            upgrade.on_upgrade(|mut socket| async move {
                while let Some(Ok(message)) = socket.recv().await {
                    if socket.send(message).await.is_err() {
                        break;
                    }
                }
            })
        }),
    ))
}

pub(crate) struct WebSocket {
    stream: TokioIo<hyper::upgrade::Upgraded>,
    _connection: Http1,
}

impl WebSocket {
    pub(crate) async fn open(front: &Front, id: &str, port: u16) -> Self {
        let mut connection = front.connect().await;
        let request = to(id, port, "/ws")
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let response = connection.open(request.body(empty()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(response.headers()["upgrade"], "websocket");
        assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
        Self { stream, _connection: connection }
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) {
        let reading = self.stream.read_u8();
        let read = tokio::time::timeout(DEADLINE, reading).await.expect("no hang");
        assert!(read.is_err(), "{read:?}");
    }

    /// Sends a text of less than 126 bytes and reads it back.
    pub(crate) async fn echo(&mut self, text: &str) {
        // RFC 6455, 5.2: a final text frame, masked with zeros.
        let length = u8::try_from(text.len()).unwrap();
        let mut frame = vec![0x81, 0x80 | length, 0, 0, 0, 0];
        frame.extend_from_slice(text.as_bytes());
        self.stream.write_all(&frame).await.unwrap();
        let mut back = vec![0; text.len() + 2];
        let reading = self.stream.read_exact(&mut back);
        tokio::time::timeout(DEADLINE, reading).await.expect("no hang").unwrap();
        assert_eq!(back, [&[0x81, length], text.as_bytes()].concat());
    }
}

#[tokio::test]
async fn a_websocket_echoes() {
    let sandbox = Builder::default().port(8765, echo_server()).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut socket = WebSocket::open(&front, "aaaa", 8765).await;
    for text in ["hello", "", "again"] {
        socket.echo(text).await;
    }
}

fn upgrade_request(port: u16, protocol: &str) -> http::Request<crate::support::Body> {
    to("aaaa", port, "/").header("connection", "upgrade").header("upgrade", protocol).body(empty()).unwrap()
}

#[tokio::test]
async fn one_direction_of_a_pipe_may_end_before_the_other() {
    let server = raw(|mut stream| async move {
        let asked = read_head(&mut stream).await;
        assert!(
            asked.contains("upgrade: anything/1\r\n") && asked.contains("connection: upgrade\r\n"),
            "{asked}"
        );
        // The first bytes of the new protocol come with the head of the answer.
        let answer =
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: anything/1\r\n\r\nwelcome ";
        stream.write_all(answer).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        stream.write_all(said.to_uppercase().as_bytes()).await.unwrap();
    });
    let sandbox = Builder::default().port(7, server).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut connection = front.connect().await;
    let response = connection.open(upgrade_request(7, "anything/1")).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    stream.write_all(b"half closed").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer)).await.expect("no hang").unwrap();
    assert_eq!(answer, "welcome HALF CLOSED");
}

#[tokio::test]
async fn an_upgrade_that_may_not_pass_is_a_plain_request() {
    let server = || {
        raw(|mut stream| async move {
            let asked = read_head(&mut stream).await.to_lowercase();
            let answer =
                if asked.contains("upgrade") { "HTTP/1.1 500 Bad\r\n" } else { "HTTP/1.1 200 OK\r\n" };
            stream.write_all(format!("{answer}content-length: 0\r\n\r\n").as_bytes()).await.unwrap();
        })
    };
    let sandbox = Builder::default().port(7, server()).port(AGENT, server()).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    for request in [upgrade_request(7, "h2c"), upgrade_request(AGENT, "websocket")] {
        assert_eq!(front.send(request).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_server_that_switches_unasked_is_refused() {
    let server = raw(|mut stream| async move {
        read_head(&mut stream).await;
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        let _ = stream.read_u8().await;
    });
    let sandbox = Builder::default().port(7, server.clone()).port(AGENT, server).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    for port in [7, AGENT] {
        let answer = front.send(to("aaaa", port, "/").body(empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{answer:?}");
    }
}
