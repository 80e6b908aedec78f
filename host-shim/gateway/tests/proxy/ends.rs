//! Ends that nobody asked for, and the one that is asked for: the gateway's own.

use std::time::Duration;

use axum::Router;
use axum::routing::get;
use http::StatusCode;
use http_body_util::BodyExt;
use tiffin_gateway::server::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{
    AGENT, Builder, DEADLINE, Fake, Front, Serve, empty, eventually, http, raw, read_head, to,
};
use crate::upgrades::{WebSocket, echo_server};

/// A server that writes that much of an answer, and no more.
fn stuck(answer: &'static str) -> Serve {
    raw(move |mut stream| async move {
        read_head(&mut stream).await;
        let _ = stream.write_all(answer.as_bytes()).await;
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all).await;
    })
}

fn sandbox(answer: &'static str) -> Fake {
    Builder::default().port(AGENT, stuck(answer)).port(80, stuck(answer)).start("aaaa", "red")
}

#[tokio::test]
async fn a_sandbox_that_dies_before_its_answer_was_not_found() {
    for port in [AGENT, 80] {
        let mut sandbox = sandbox("HTTP/1.1 200");
        let front = Front::of(&[&sandbox]).await;
        let asking = async {
            let mut connection = front.connect().await;
            connection.send(to("aaaa", port, "/").body(empty()).unwrap()).await
        };
        let dying = async {
            let dials = std::sync::Arc::clone(&sandbox.dials);
            eventually("the request arrives", || dials.load(std::sync::atomic::Ordering::SeqCst) > 0).await;
            sandbox.die().await;
        };
        let (answer, ()) = tokio::join!(asking, dying);
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
        assert_eq!(answer.json()["message"], "The sandbox was not found");
        // And so it stays.
        let answer = front.send(to("aaaa", port, "/").body(empty()).unwrap()).await;
        assert_eq!(answer.json()["message"], "The sandbox was not found");
    }
}

#[tokio::test]
async fn a_sandbox_that_dies_in_its_answer_cuts_it() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        // Its end says nothing of a length: only the machine's death tells that this is not all.
        "HTTP/1.1 200 OK\r\n\r\nhello",
        "HTTP/1.0 200 OK\r\n\r\nhello",
    ] {
        for (port, http2) in [(AGENT, false), (80, false), (AGENT, true), (80, true)] {
            let mut sandbox = sandbox(answer);
            let front = Front::of(&[&sandbox]).await;
            let (mut first, mut second);
            let mut response = if http2 {
                second = front.connect_http2().await;
                let request = to("aaaa", port, &format!("http://{}/", front.address)).body(empty()).unwrap();
                let (mut head, body) = request.into_parts();
                head.headers.remove("host");
                second.send_request(http::Request::from_parts(head, body)).await.unwrap()
            } else {
                first = front.connect().await;
                first.open(to("aaaa", port, "/").body(empty()).unwrap()).await
            };
            assert_eq!(response.frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
            sandbox.die().await;
            let end = tokio::time::timeout(DEADLINE, response.frame()).await.expect("no hang");
            assert!(matches!(end, Some(Err(_))), "{answer:?} on {port} ended with {end:?}");
        }
    }
}

#[tokio::test]
async fn a_body_that_ends_with_its_connection_is_whole_while_the_sandbox_lives() {
    let server = || {
        raw(|mut stream| async move {
            read_head(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello").await;
        })
    };
    let agent = http(Router::new());
    let sandbox = Builder::default().port(AGENT, agent).port(80, server()).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut connection = front.connect().await;
    for _ in 0..3 {
        let answer = connection.send(to("aaaa", 80, "/").body(empty()).unwrap()).await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "hello"));
    }
}

#[tokio::test]
async fn a_websocket_ends_with_its_sandbox() {
    let mut sandbox = Builder::default().port(80, echo_server()).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut socket = WebSocket::open(&front, "aaaa", 80).await;
    socket.echo("hello").await;
    sandbox.die().await;
    socket.ended().await;
}

#[tokio::test]
async fn a_gateway_that_stops_lets_end_what_ends() {
    let (go, wait) = tokio::sync::watch::channel(false);
    let slow = get(move || {
        let mut wait = wait.clone();
        async move {
            wait.wait_for(|go| *go).await.unwrap();
            "done"
        }
    });
    let sandbox = Builder::default()
        .port(80, echo_server())
        .port(AGENT, http(Router::new().route("/", slow)))
        .start("aaaa", "red");
    // Longer than the test: nothing is cut.
    let limits = Limits { stream_drain: 10 * DEADLINE, ..Limits::default() };
    let mut front = Front::within(limits, &[&sandbox]).await;
    let mut socket = WebSocket::open(&front, "aaaa", 80).await;
    let idle = front.connect().await;
    let dials = sandbox.dials();
    let mut short = front.connect().await;
    let answering =
        tokio::spawn(async move { short.send(to("aaaa", AGENT, "/").body(empty()).unwrap()).await });
    eventually("the request arrives", || sandbox.dials() > dials).await;

    front.shutdown.cancel();
    eventually("nobody listens", || std::net::TcpStream::connect(front.address).is_err()).await;
    eventually("an idle connection is closed", || idle.sender.is_closed()).await;
    socket.echo("still there").await;
    go.send_replace(true);
    assert_eq!(answering.await.unwrap().text, "done");
    drop(socket);
    front.stopped().await;
}

#[tokio::test]
async fn a_gateway_that_stops_does_not_wait_for_streams() {
    let sandbox = Builder::default()
        .port(80, echo_server())
        .port(81, stuck("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"))
        .start("aaaa", "red");
    let limits = Limits { stream_drain: Duration::from_millis(100), ..Limits::default() };
    let mut front = Front::within(limits, &[&sandbox]).await;
    let mut socket = WebSocket::open(&front, "aaaa", 80).await;
    let mut connection = front.connect().await;
    let mut stream = connection.open(to("aaaa", 81, "/").body(empty()).unwrap()).await;
    assert_eq!(stream.frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
    front.shutdown.cancel();
    front.stopped().await;
    assert!(matches!(stream.frame().await, Some(Err(_))));
    socket.ended().await;
}

#[tokio::test]
async fn a_gateway_that_stops_waits_for_control_calls() {
    let limits = Limits { stream_drain: Duration::ZERO, ..Limits::default() };
    let mut front = Front::within(limits, &[]).await;
    let key = front.key().await;
    let mut stream = tokio::net::TcpStream::connect(front.address).await.unwrap();
    let head = format!(
        "POST /sandboxes HTTP/1.1\r\nhost: localhost\r\nx-api-key: {key}\r\nexpect: 100-continue\r\n\
         content-type: application/json\r\ncontent-length: 2\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The call runs: it asks for its body.
    let mut begun = [0; 25];
    let reading = tokio::time::timeout(DEADLINE, stream.read_exact(&mut begun));
    reading.await.expect("no hang").unwrap();
    assert_eq!(&begun, b"HTTP/1.1 100 Continue\r\n\r\n");
    front.shutdown.cancel();
    eventually("nobody listens", || std::net::TcpStream::connect(front.address).is_err()).await;
    stream.write_all(b"{}").await.unwrap();
    let mut answer = String::new();
    let reading = tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer));
    reading.await.expect("no hang").unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with('}'), "{answer}");
    front.stopped().await;
}
