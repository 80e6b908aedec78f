//! The client against a server that speaks the Connect protocol as its specification says, and against ones that do not.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use envd_channel::envelope::{self, END_OF_STREAM};
use envd_proto::process::process_event::{DataEvent, EndEvent, Event, StartEvent, data_event};
use envd_proto::process::{
    CloseStdinResponse, ProcessEvent, SendInputRequest, SendInputResponse, StartRequest, StartResponse,
    process_input,
};

use prost::Message;
use sandbox_folder::client::{ClientError, Code, Dial, Exit, Output, SandboxClient};
use tokio::net::UnixListener;

fn event(event: Event) -> Bytes {
    let response = StartResponse { event: Some(ProcessEvent { event: Some(event) }) };
    envelope::encode(0, &response.encode_to_vec())
}

fn data(output: data_event::Output) -> Bytes {
    event(Event::Data(DataEvent { output: Some(output), ..Default::default() }))
}

fn stream(parts: &[Bytes]) -> Response {
    ([(header::CONTENT_TYPE, "application/connect+proto")], parts.concat()).into_response()
}

fn proto(message: &impl Message) -> Response {
    ([(header::CONTENT_TYPE, "application/proto")], message.encode_to_vec()).into_response()
}

struct Server {
    client: SandboxClient,
    _dir: tempfile::TempDir,
}

fn serve(router: Router) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("door");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let dial: Dial = Arc::new(move |port| {
        assert_eq!(port, envd_proto::CLIENT_PORT);
        let path = path.clone();
        Box::pin(async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok(Box::new(stream) as sandbox_folder::client::Stream)
        })
    });
    Server { client: SandboxClient::new(dial), _dir: dir }
}

fn start_answers(parts: Vec<Bytes>) -> Server {
    serve(Router::new().route("/process.Process/Start", post(move || async move { stream(&parts) })))
}

#[tokio::test]
async fn a_process_prints_reads_and_ends() {
    let input = Arc::new(Mutex::new(Vec::new()));
    let (seen, closed) = (Arc::clone(&input), Arc::clone(&input));
    let start = |headers: HeaderMap, body: Bytes| async move {
        assert_eq!(headers["x-access-token"], "secret");
        assert_eq!(headers[header::AUTHORIZATION], "Basic dXNlcjo=");
        let mut decoder = envelope::Decoder::default();
        decoder.push(&body);
        let request = StartRequest::decode(decoder.envelope().unwrap().unwrap().message).unwrap();
        assert_eq!(request.process.unwrap().args, ["-c", "x"]);
        stream(&[
            event(Event::Start(StartEvent { pid: 7, ..Default::default() })),
            data(data_event::Output::Stdout(Bytes::from_static(b"\xff\0"))),
            data(data_event::Output::Stderr(Bytes::from_static(b"oops"))),
            event(Event::End(EndEvent { exit_code: 3, exited: true, ..EndEvent::default() })),
            envelope::encode(END_OF_STREAM, b"{}"),
        ])
    };
    let send = |body: Bytes| async move {
        let request = SendInputRequest::decode(body).unwrap();
        if let Some(process_input::Input::Stdin(bytes)) = request.input.unwrap().input {
            seen.lock().unwrap().push(bytes);
        }
        proto(&SendInputResponse {})
    };
    let close = || async move {
        closed.lock().unwrap().push(Bytes::from_static(b"EOF"));
        proto(&CloseStdinResponse {})
    };
    let server = serve(
        Router::new()
            .route("/process.Process/Start", post(start))
            .route("/process.Process/SendInput", post(send))
            .route("/process.Process/CloseStdin", post(close)),
    );
    let client = server.client.with_token("secret").with_user("user");
    let config = envd_proto::process::ProcessConfig {
        cmd: "sh".into(),
        args: vec!["-c".into(), "x".into()],
        ..Default::default()
    };
    let request = StartRequest { process: Some(config), ..Default::default() };
    let mut process = client.start(request).await.unwrap();
    assert_eq!(process.pid(), 7);
    let mut stdin = process.stdin();
    for chunk in ["a", "b", "c"] {
        stdin.write(Bytes::from(chunk)).await.unwrap();
    }
    stdin.close().await.unwrap();
    assert_eq!(*input.lock().unwrap(), ["a", "b", "c", "EOF"]);
    assert_eq!(process.next().await.unwrap(), Output::Stdout(Bytes::from_static(b"\xff\0")));
    let rest = process.output().await.unwrap();
    assert_eq!((rest.exit, rest.stdout, rest.stderr), (Exit::Code(3), vec![], b"oops".to_vec()));
}

#[tokio::test]
async fn a_refused_start_has_its_code_in_the_stream_or_in_the_status() {
    let end = envelope::encode(END_OF_STREAM, br#"{"error":{"code":"not_found","message":"no such file"}}"#);
    let server = start_answers(vec![end]);
    let error = server.client.output("nope", [""; 0]).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
    let server = serve(Router::new().route(
        "/process.Process/Start",
        post(|| async { (StatusCode::UNAUTHORIZED, r#"{"code":"unauthenticated","message":"no token"}"#) }),
    ));
    let error = server.client.output("true", [""; 0]).await.unwrap_err();
    assert_eq!(error.to_string(), "no token (unauthenticated)");
    let server = serve(Router::new());
    let error = server.client.output("true", [""; 0]).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unimplemented));
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_no_end_of_a_process() {
    let started = event(Event::Start(StartEvent { pid: 1, ..Default::default() }));
    let cut = data(data_event::Output::Stdout(Bytes::from_static(b"half"))).slice(..8);
    for rest in [
        vec![],
        vec![cut],
        vec![envelope::encode(END_OF_STREAM, b"{}")],
        vec![Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff])],
        vec![Bytes::from_static(&[0, 0, 0, 0, 1, 0xff])],
        vec![event(Event::End(EndEvent::default()))],
    ] {
        let server = start_answers([vec![started.clone()], rest].concat());
        let error = server.client.output("true", [""; 0]).await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn an_endless_answer_to_a_unary_call_is_cut_off() {
    let endless = || async {
        Body::from_stream(futures::stream::repeat_with(|| {
            Ok::<_, std::io::Error>(Bytes::from_static(&[0; 65536]))
        }))
    };
    let server = serve(Router::new().route("/process.Process/List", post(endless)));
    assert!(matches!(server.client.processes().await, Err(ClientError::Protocol { .. })));
}

#[tokio::test]
async fn files_go_in_and_out() {
    let stored = Arc::new(Mutex::new(Bytes::new()));
    let (put, got) = (Arc::clone(&stored), Arc::clone(&stored));
    let upload = move |headers: HeaderMap, body: Bytes| async move {
        assert_eq!(headers[header::CONTENT_TYPE], "application/octet-stream");
        *put.lock().unwrap() = body;
        "[]"
    };
    let download = move |uri: axum::http::Uri| async move {
        match uri.query() {
            Some("path=/a%20b") => got.lock().unwrap().clone().into_response(),
            _ => (StatusCode::NOT_FOUND, r#"{"code":404,"message":"path does not exist"}"#).into_response(),
        }
    };
    let server = serve(Router::new().route("/files", get(download).post(upload)));
    let contents: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    server.client.write_file("/a b", contents.clone()).await.unwrap();
    assert!(server.client.read_file("/a b").await.unwrap() == contents);
    assert_eq!(server.client.read_file("/none").await.unwrap_err().code(), Some(Code::NotFound));
}
