//! Bodies: as they come, however long, in both directions, and with their trailers.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::Request;
use axum::routing::{get, post};
use bytes::Bytes;
use envd_channel::envelope;
use envd_proto::process::process_event::{Event, data_event};
use envd_proto::process::{ProcessConfig, StartRequest, StartResponse};
use futures::StreamExt;
use futures::channel::mpsc;
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use prost::Message;
use tokio::io::AsyncReadExt;

use crate::support::{
    AGENT, Agent, Body, Builder, DEADLINE, Front, empty, eventually, full, http, raw, read_head, to,
};

pub(crate) fn exec(id: &str, script: &str) -> http::Request<Body> {
    let args = vec!["-c".to_owned(), script.to_owned()];
    let process = ProcessConfig { cmd: "/bin/sh".into(), args, ..Default::default() };
    let start = StartRequest { process: Some(process), stdin: Some(false), ..Default::default() };
    to(id, AGENT, "/process.Process/Start")
        .method("POST")
        .header("content-type", "application/connect+proto")
        .body(full(envelope::encode(0, &start.encode_to_vec())))
        .unwrap()
}

/// The events of a process.
pub(crate) struct Events {
    body: Incoming,
    decoder: envelope::Decoder,
}

impl Events {
    pub(crate) fn of(response: http::Response<Incoming>) -> Self {
        assert_eq!(response.status(), StatusCode::OK);
        Self { body: response.into_body(), decoder: envelope::Decoder::default() }
    }

    /// The next event; `None` at the stream's end.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(envelope) = self.decoder.envelope().unwrap() {
                if envelope.end {
                    assert_eq!(envelope.message, "{}");
                    return None;
                }
                return StartResponse::decode(envelope.message).unwrap().event.unwrap().event;
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.expect("no hang");
            self.decoder.push(&frame.expect("more").unwrap().into_data().unwrap());
        }
    }

    /// What it prints next.
    pub(crate) async fn printed(&mut self) -> Bytes {
        match self.next().await {
            Some(Event::Data(data)) => match data.output.unwrap() {
                data_event::Output::Stdout(bytes) => bytes,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn every_frame_of_a_process_comes_when_it_is_there() {
    let agent = Agent::start("aaaa", "red").await;
    let front = Front::of(&[&agent.fake]).await;
    // Each line waits for a sign that the one before it was seen.
    let signs = agent.home.path().join("signs");
    assert!(std::process::Command::new("mkfifo").arg(&signs).status().unwrap().success());
    // Held open for both: opening waits for nobody, and no reader sees an end.
    let mut sign = std::fs::File::options().read(true).write(true).open(&signs).unwrap();
    let script = format!("for i in 1 2 3; do echo line $i; read sign < {}; done", signs.display());
    for http2 in [false, true] {
        let request = exec("aaaa", &script);
        let (mut first, mut second);
        let response = if http2 {
            second = front.connect_http2().await;
            let (mut head, body) = request.into_parts();
            head.uri = format!("http://{}{}", front.address, head.uri).parse().unwrap();
            head.headers.remove("host");
            second.send_request(http::Request::from_parts(head, body)).await.unwrap()
        } else {
            first = front.connect().await;
            first.open(request).await
        };
        let mut events = Events::of(response);
        assert!(matches!(events.next().await, Some(Event::Start(_))));
        for line in 1..=3 {
            assert_eq!(events.printed().await, format!("line {line}\n"));
            std::io::Write::write_all(&mut sign, b"seen\n").unwrap();
        }
        assert!(matches!(events.next().await, Some(Event::End(end)) if end.exit_code == 0));
        assert_eq!(events.next().await, None);
    }
}

#[tokio::test]
async fn a_file_goes_up_and_down_through_the_real_agent() {
    let agent = Agent::start("aaaa", "red").await;
    let front = Front::of(&[&agent.fake]).await;
    let path = agent.home.path().join("file");
    let target = format!("/files?path={}", path.display());
    let contents: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut connection = front.connect().await;
    let upload = to("aaaa", AGENT, &target)
        .method("POST")
        .header("content-type", "application/octet-stream")
        .body(full(contents.clone()))
        .unwrap();
    let answer = connection.send(upload).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert!(std::fs::read(&path).unwrap() == contents);
    let response = connection.open(to("aaaa", AGENT, &target).body(empty()).unwrap()).await;
    assert!(response.into_body().collect().await.unwrap().to_bytes() == contents);
    // A head without its body, then the same connection again.
    let response = connection.open(to("aaaa", AGENT, &target).method("HEAD").body(empty()).unwrap()).await;
    assert_eq!(response.headers()["content-length"], contents.len().to_string());
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
    assert_eq!(connection.send(to("aaaa", AGENT, "/health").body(empty()).unwrap()).await.status, 204);
}

/// Frames that the test makes as it goes.
fn channel_body() -> (mpsc::Sender<Frame<Bytes>>, Body) {
    let (sender, receiver) = mpsc::channel(0);
    (sender, BodyExt::boxed(StreamBody::new(receiver.map(Ok::<_, Infallible>))))
}

#[tokio::test]
async fn both_directions_flow_at_once() {
    let sandbox = Builder::default()
        .port(80, http(Router::new().route("/", post(|request: Request| async { request.into_body() }))))
        .start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut connection = front.connect().await;
    let (mut sender, body) = channel_body();
    let mut response = connection.open(to("aaaa", 80, "/").method("POST").body(body).unwrap()).await;
    for round in 0..10 {
        let text = Bytes::from(format!("round {round}"));
        futures::SinkExt::send(&mut sender, Frame::data(text.clone())).await.unwrap();
        let frame =
            tokio::time::timeout(DEADLINE, response.frame()).await.expect("no hang").unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), text);
    }
    drop(sender);
    assert!(response.frame().await.is_none());
}

const BIG: u64 = 64 << 20;

#[tokio::test]
async fn a_big_body_is_not_held() {
    let chunk = Bytes::from(vec![7; 64 << 10]);
    let made = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&made);
    let download = get(move || {
        let (chunk, made) = (chunk.clone(), Arc::clone(&counted));
        let chunks = futures::stream::iter(0..BIG / (64 << 10)).map(move |_| {
            made.fetch_add(64 << 10, Ordering::SeqCst);
            Ok::<_, Infallible>(chunk.clone())
        });
        async { axum::body::Body::from_stream(chunks) }
    });
    let taken = Arc::new(AtomicU64::new(0));
    let (go, wait) = tokio::sync::watch::channel(false);
    let counted = Arc::clone(&taken);
    let upload = post(move |request: Request| {
        let (taken, mut wait) = (Arc::clone(&counted), wait.clone());
        async move {
            wait.wait_for(|go| *go).await.unwrap();
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                taken.fetch_add(frame.unwrap().into_data().unwrap().len() as u64, Ordering::SeqCst);
            }
            taken.load(Ordering::SeqCst).to_string()
        }
    });
    let router = Router::new().route("/down", download).route("/up", upload);
    let sandbox = Builder::default().port(80, http(router)).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;

    // A reader that does not read stops the writer: what is on the way is in the sockets and a few buffers.
    let mut connection = front.connect().await;
    let mut response = connection.open(to("aaaa", 80, "/down").body(empty()).unwrap()).await;
    let on_the_way = settled(&made).await;
    assert!(on_the_way < BIG / 4, "{on_the_way} bytes are held");
    let mut got = 0;
    while let Some(frame) = response.frame().await {
        got += frame.unwrap().into_data().unwrap().len() as u64;
    }
    assert_eq!(got, BIG);

    // The same the other way.
    let sent = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&sent);
    let chunk = Bytes::from(vec![7; 64 << 10]);
    let chunks = futures::stream::iter(0..BIG / (64 << 10)).map(move |_| {
        counted.fetch_add(64 << 10, Ordering::SeqCst);
        Ok::<_, Infallible>(Frame::data(chunk.clone()))
    });
    let request = to("aaaa", 80, "/up").method("POST").body(BodyExt::boxed(StreamBody::new(chunks))).unwrap();
    let uploading = tokio::spawn(async move { front.send(request).await.text });
    let on_the_way = settled(&sent).await;
    assert!(on_the_way > 0 && on_the_way < BIG / 4, "{on_the_way} bytes are held");
    go.send_replace(true);
    assert_eq!(uploading.await.unwrap(), BIG.to_string());
}

/// The count once it no longer grows.
async fn settled(count: &AtomicU64) -> u64 {
    let mut last = u64::MAX;
    loop {
        let now = count.load(Ordering::SeqCst);
        if now == last && now > 0 {
            return now;
        }
        last = now;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn trailers_are_kept() {
    let echo = |request: Request| async move {
        let body = request.into_body().collect().await.unwrap();
        let trailers = body.trailers().cloned().unwrap_or_default();
        let frames = [Ok::<_, Infallible>(Frame::data(body.to_bytes())), Ok(Frame::trailers(trailers))];
        let body = axum::body::Body::new(StreamBody::new(futures::stream::iter(frames)));
        ([("trailer", "x-sum")], body)
    };
    let sandbox =
        Builder::default().port(80, http(Router::new().route("/", post(echo)))).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_static("42"));
    let frames = [Ok(Frame::data(Bytes::from("data"))), Ok(Frame::trailers(trailers.clone()))];
    let request = to("aaaa", 80, "/")
        .method("POST")
        .header("te", "trailers")
        .header("trailer", "x-sum")
        .body(BodyExt::boxed(StreamBody::new(futures::stream::iter(frames))))
        .unwrap();
    let mut connection = front.connect().await;
    let response = connection.open(request).await;
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers(), Some(&trailers));
    assert_eq!(body.to_bytes(), "data");
}

#[tokio::test]
async fn a_get_may_have_a_body_of_unknown_length() {
    let sandbox = Builder::default()
        .port(80, http(Router::new().route("/", get(|request: Request| async { request.into_body() }))))
        .start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let text = front
        .talk(
            "GET / HTTP/1.1\r\nhost: 80-aaaa.localhost\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n\
             5\r\nhello\r\n0\r\n\r\n",
        )
        .await;
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("hello"), "{text}");
}

#[tokio::test]
async fn a_client_that_waits_is_told_to_go_on() {
    let sandbox = Builder::default()
        .port(80, http(Router::new().route("/", post(|request: Request| async { request.into_body() }))))
        .start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let ask = async |id: &str| {
        use tokio::io::AsyncWriteExt;
        let mut stream = tokio::net::TcpStream::connect(front.address).await.unwrap();
        let head = format!(
            "POST / HTTP/1.1\r\nhost: 80-{id}.localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\
             connection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = String::new();
        while !text.ends_with("\r\n\r\n") {
            let byte = tokio::time::timeout(DEADLINE, stream.read_u8()).await.expect("no hang").unwrap();
            text.push(char::from(byte));
        }
        (stream, text)
    };
    let (mut stream, text) = ask("aaaa").await;
    assert_eq!(text, "HTTP/1.1 100 Continue\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"hello").await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.starts_with("HTTP/1.1 200 OK\r\n") && rest.ends_with("hello"), "{rest}");
    // A refusal comes without the body being asked for.
    let (_, text) = ask("zzzz").await;
    assert!(text.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{text}");
}

#[tokio::test]
async fn who_goes_takes_the_other_side_along() {
    let (gone, mut left) = tokio::sync::mpsc::unbounded_channel();
    // One answers nothing, one begins and goes on for ever.
    let silent = gone.clone();
    let silent = raw(move |mut stream| {
        let gone = silent.clone();
        async move {
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all).await;
            gone.send("silent").unwrap();
        }
    });
    let endless = raw(move |mut stream| {
        let gone = gone.clone();
        async move {
            use tokio::io::AsyncWriteExt;
            read_head(&mut stream).await;
            let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
            stream.write_all(head).await.unwrap();
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all).await;
            gone.send("endless").unwrap();
        }
    });
    let sandbox =
        Builder::default().port(1, silent.clone()).port(2, endless).port(AGENT, silent).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    for port in [1, AGENT] {
        let mut connection = front.connect().await;
        let sending = connection.sender.send_request(to("aaaa", port, "/").body(empty()).unwrap());
        let dialled = sandbox.dials() + 1;
        let waiting = tokio::spawn(sending);
        eventually("the request arrives", || sandbox.dials() >= dialled).await;
        drop(connection);
        waiting.abort();
        let who = tokio::time::timeout(DEADLINE, left.recv()).await.expect("the sandbox sees it");
        assert_eq!(who, Some("silent"));
    }
    for http2 in [false, true] {
        let request = to("aaaa", 2, "/");
        let (first, second);
        let mut response = if http2 {
            let mut sender = front.connect_http2().await;
            let request = request.uri(format!("http://{}/", front.address)).body(empty()).unwrap();
            let (mut head, body) = request.into_parts();
            head.headers.remove("host");
            let response = sender.send_request(http::Request::from_parts(head, body)).await.unwrap();
            second = Some(sender);
            first = None;
            response
        } else {
            let mut connection = front.connect().await;
            let response = connection.open(request.body(empty()).unwrap()).await;
            first = Some(connection);
            second = None;
            response
        };
        assert_eq!(response.frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
        // With HTTP/2 the stream alone ends, the connection stays.
        drop((response, first));
        let who = tokio::time::timeout(DEADLINE, left.recv()).await.expect("the sandbox sees it");
        assert_eq!(who, Some("endless"));
        drop(second);
    }
}
