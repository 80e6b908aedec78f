//! The client door against the Connect protocol: each RPC, in both codecs, over both versions of HTTP.

mod calls;
mod client;

use std::collections::BTreeSet;

use calls::{Call, Codec, Expected, RPCS, Round, Rpc, Shape, calls};
use client::{Agent, Answer, DEADLINE, Version, envelope, in_pieces, next_envelope, whole};
use http::StatusCode;
use http_body_util::BodyExt;
use prost::Message;
use serde_json::{Value, json};

const END: u8 = 0b10;

/// The status that the protocol gives a unary error (connectrpc.com/docs/protocol, "Error codes").
fn status_of(code: &str) -> u16 {
    match code {
        "invalid_argument" => 400,
        "unauthenticated" => 401,
        "permission_denied" => 403,
        "not_found" => 404,
        "already_exists" => 409,
        "resource_exhausted" => 429,
        "unimplemented" => 501,
        other => panic!("no call here fails with {other}"),
    }
}

#[test]
fn every_rpc_of_the_contract_is_called() {
    #[derive(Clone, PartialEq, Message)]
    struct Set {
        #[prost(message, repeated, tag = "1")]
        files: Vec<File>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct File {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "6")]
        services: Vec<Service>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        methods: Vec<Method>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Method {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(bool, tag = "5")]
        client_streaming: bool,
        #[prost(bool, tag = "6")]
        server_streaming: bool,
    }
    let set = Set::decode(envd_proto::DESCRIPTORS).unwrap();
    let mut contract = BTreeSet::new();
    for file in &set.files {
        for service in &file.services {
            for method in &service.methods {
                let shape = match (method.client_streaming, method.server_streaming) {
                    (false, false) => Shape::Unary,
                    (false, true) => Shape::ServerStream,
                    (true, false) => Shape::ClientStream,
                    (true, true) => panic!("{} streams both ways: no test can call that yet", method.name),
                };
                contract.insert((
                    format!("{}.{}/{}", file.package, service.name, method.name),
                    format!("{shape:?}"),
                ));
            }
        }
    }
    let called = RPCS.iter().map(|rpc| (rpc.name.to_owned(), format!("{:?}", rpc.shape))).collect();
    assert_eq!(contract, called);
}

#[tokio::test]
async fn every_rpc_in_both_codecs_over_both_versions() {
    let agent = Agent::start().await;
    for version in Version::ALL {
        for codec in [Codec::Json, Codec::Proto] {
            let mut round =
                Round { name: format!("{version:?}-{codec:?}").to_lowercase(), ..Round::default() };
            start_background(&agent, &round).await;
            for rpc in &RPCS {
                for call in calls(rpc.name, &agent, &round) {
                    if let Some(answer) = make(&agent, version, codec, rpc, &call).await
                        && let Some(id) = answer["watcherId"].as_str()
                    {
                        round.watcher = id.to_owned();
                    }
                }
            }
        }
    }
}

/// The processes that the calls of a round talk to.
async fn start_background(agent: &Agent, round: &Round) {
    let start = RPCS.iter().find(|rpc| rpc.name.ends_with("/Start")).unwrap();
    let mut wanted = vec![
        json!({ "process": { "cmd": "/bin/cat" }, "tag": format!("cat-{}", round.name) }),
        json!({ "process": { "cmd": "sleep", "args": ["1000"] }, "tag": format!("terminated-{}", round.name) }),
    ];
    wanted.push(json!({
        "process": { "cmd": "/bin/cat" },
        "pty": { "size": { "cols": 80, "rows": 24 } },
        "tag": format!("terminal-{}", round.name),
    }));
    for request in wanted {
        let call = Call {
            request,
            expected: Expected::Messages(vec![|answer| answer["event"]["start"]["pid"].is_u64()]),
        };
        make(agent, Version::Http1, Codec::Json, start, &call).await;
    }
}

/// Makes a call and checks everything about its answer; gives the last message of a success.
async fn make(agent: &Agent, version: Version, codec: Codec, rpc: &Rpc, call: &Call) -> Option<Value> {
    let context = format!("{} {codec:?} {version:?} {}", rpc.name, call.request);
    let suffix = match codec {
        Codec::Json => "json",
        Codec::Proto => "proto",
    };
    // A request that is no message at all is sent as it is, in either codec.
    let message = |message: &Value| match message {
        Value::String(garbage) => garbage.clone().into_bytes(),
        message => rpc.encode(codec, message),
    };
    let (content_type, body) = match rpc.shape {
        Shape::Unary => (format!("application/{suffix}"), message(&call.request)),
        Shape::ServerStream => {
            (format!("application/connect+{suffix}"), envelope(0, &message(&call.request)))
        }
        Shape::ClientStream => {
            let messages = call.request.as_array().unwrap().iter();
            let bytes = messages.flat_map(|one| envelope(0, &message(one))).collect();
            (format!("application/connect+{suffix}"), bytes)
        }
    };
    // As the published clients send them.
    let encoding = if rpc.shape == Shape::Unary { "content-encoding" } else { "connect-content-encoding" };
    let accept = if rpc.shape == Shape::Unary { "accept-encoding" } else { "connect-accept-encoding" };
    let request = version
        .request("POST", &rpc.path())
        .header("content-type", &content_type)
        .header("connect-protocol-version", "1")
        .header(encoding, "identity")
        .header(accept, "identity");
    let request = match rpc.shape {
        Shape::Unary => request.body(whole(body)),
        _ => request.body(in_pieces(body, 7)),
    };
    let request = request.unwrap();

    if rpc.shape == Shape::Unary {
        let answer = agent.exchange(version, request).await;
        return match &call.expected {
            Expected::Messages(checks) => {
                assert_eq!(answer.status, StatusCode::OK, "{context}: {:?}", answer.body);
                assert_eq!(answer.header("content-type"), content_type, "{context}");
                let message = rpc.decode(codec, &answer.body);
                assert!(checks[0](&message), "{context}: {message}");
                Some(message)
            }
            Expected::Code(code) => {
                assert_unary_error(&answer, code, &context);
                None
            }
        };
    }

    let (parts, mut body) = agent.send(version, request).await.into_parts();
    if call.expected.is_unimplemented() && parts.status == StatusCode::NOT_IMPLEMENTED {
        // An RPC that the agent does not know at all has no shape yet: it answers as a unary call.
        return None;
    }
    assert_eq!(parts.status, StatusCode::OK, "{context}");
    assert_eq!(parts.headers["content-type"].to_str().unwrap(), content_type, "{context}");
    assert!(!parts.headers.contains_key("content-encoding"), "{context}: streams are not compressed");
    let mut checks = match &call.expected {
        Expected::Messages(checks) => checks.clone(),
        Expected::Code(_) => Vec::new(),
    }
    .into_iter();
    let mut input = Vec::new();
    let mut last = None;
    loop {
        while let Some((flags, message)) = next_envelope(&mut input) {
            if flags == END {
                let end: Value = serde_json::from_slice(&message).unwrap();
                match &call.expected {
                    Expected::Code(code) => {
                        assert_eq!(end["error"]["code"], *code, "{context}: {end}");
                        assert!(end["error"]["message"].is_string(), "{context}: {end}");
                        assert!(last.is_none(), "{context}: an error and a message");
                    }
                    Expected::Messages(_) => {
                        assert_eq!(end, json!({}), "{context}");
                        assert_eq!(checks.len(), 0, "{context}: the stream ended early, after {last:?}");
                    }
                }
                assert!(input.is_empty(), "{context}: bytes after the end");
                let rest = tokio::time::timeout(DEADLINE, body.collect()).await.expect("the end").unwrap();
                assert!(rest.to_bytes().is_empty(), "{context}: bytes after the end");
                return last;
            }
            assert_eq!(flags, 0, "{context}");
            let message = rpc.decode(codec, &message);
            let check = checks.next().unwrap_or_else(|| panic!("{context}: unexpected {message}"));
            assert!(check(&message), "{context}: {message}");
            last = Some(message);
            // These go on for as long as somebody listens: a look at the first message is enough.
            let endless = rpc.name.ends_with("/WatchDir")
                || matches!(call.request["process"]["cmd"].as_str(), Some("/bin/cat" | "sleep"));
            if endless && checks.len() == 0 {
                return last;
            }
        }
        let frame = tokio::time::timeout(DEADLINE, body.frame()).await.expect("a frame");
        let frame = frame.unwrap_or_else(|| panic!("{context}: no end frame after {last:?}")).unwrap();
        if let Ok(data) = frame.into_data() {
            input.extend_from_slice(&data);
        }
    }
}

impl Expected {
    fn is_unimplemented(&self) -> bool {
        matches!(self, Self::Code("unimplemented"))
    }
}

fn assert_unary_error(answer: &Answer, code: &str, context: &str) {
    assert_eq!(answer.status.as_u16(), status_of(code), "{context}: {:?}", answer.body);
    // Errors are JSON in either codec.
    assert_eq!(answer.header("content-type"), "application/json", "{context}");
    assert_eq!(answer.code(), code, "{context}");
    assert!(answer.json()["message"].is_string(), "{context}");
}

#[tokio::test]
async fn what_is_no_call_is_refused_by_its_status() {
    let agent = Agent::start().await;
    for version in Version::ALL {
        for rpc in &RPCS {
            for method in ["GET", "PUT", "DELETE"] {
                let request = version.request(method, &rpc.path()).body(whole("")).unwrap();
                let answer = agent.exchange(version, request).await;
                assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {}", rpc.name);
                assert_eq!(answer.header("allow"), "POST", "{method} {}", rpc.name);
            }
            // Unary types for a stream and the other way round are as wrong as any other.
            let other = match rpc.shape {
                Shape::Unary => "application/connect+json",
                _ => "application/json",
            };
            for content_type in ["text/plain", "application/grpc", "application/x-protobuf", other] {
                let request = version.request("POST", &rpc.path()).header("content-type", content_type);
                let answer = agent.exchange(version, request.body(whole("{}")).unwrap()).await;
                assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{content_type} {}", rpc.name);
                assert!(answer.header("accept-post").contains("application/json"), "{}", rpc.name);
            }
        }
        for path in ["/process.Process/NoSuch", "/filesystem.Filesystem/", "/process.Process/Start/More"] {
            let request = version.request("POST", path).header("content-type", "application/json");
            let answer = agent.exchange(version, request.body(whole("{}")).unwrap()).await;
            assert_unary_error(&answer, "unimplemented", path);
        }
    }
}

#[tokio::test]
async fn encodings_and_parameters_that_change_nothing_are_accepted_and_others_are_not() {
    let agent = Agent::start().await;
    for version in Version::ALL {
        let list = |headers: &[(&str, &str)]| {
            let mut request = version.request("POST", "/process.Process/List");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            request.body(whole("{}")).unwrap()
        };
        let json = ("content-type", "application/json; charset=utf-8");
        let accepted =
            [("content-encoding", "identity"), ("accept-encoding", "gzip, br"), ("user-agent", "x")];
        for header in accepted {
            let answer = agent.exchange(version, list(&[json, header])).await;
            assert_eq!(answer.status, StatusCode::OK, "{header:?}");
            assert_eq!(answer.header("content-encoding"), "", "{header:?}");
        }
        let answer = agent.exchange(version, list(&[json, ("content-encoding", "gzip")])).await;
        assert_unary_error(&answer, "unimplemented", "gzip");
        let answer = agent.exchange(version, list(&[json, ("connect-timeout-ms", "soon")])).await;
        assert_unary_error(&answer, "invalid_argument", "a timeout that is none");
    }
}

#[tokio::test]
async fn messages_that_are_too_long_exhaust_a_limit() {
    const LIMIT: usize = envd_proto::limits::MAX_CONNECT_MESSAGE;
    let agent = Agent::start().await;
    for version in Version::ALL {
        let request = version.request("POST", "/filesystem.Filesystem/Stat");
        let body = format!(r#"{{"path":"{}"}}"#, "x".repeat(LIMIT));
        let request = request.header("content-type", "application/json").body(whole(body)).unwrap();
        assert_unary_error(&agent.exchange(version, request).await, "resource_exhausted", "unary");

        // A stream's message says its length ahead: it is refused before it has come.
        let mut begin = vec![0];
        begin.extend_from_slice(&u32::try_from(LIMIT + 1).unwrap().to_be_bytes());
        begin.extend_from_slice(b"{}");
        let request = version.request("POST", "/process.Process/Start");
        let request = request.header("content-type", "application/connect+json");
        let answer = agent.exchange(version, request.body(whole(begin)).unwrap()).await;
        assert_eq!((answer.status, answer.body[0]), (StatusCode::OK, END));
        let end: Value = serde_json::from_slice(&answer.body[5..]).unwrap();
        assert_eq!(end["error"]["code"], "resource_exhausted");
    }
}

#[tokio::test]
async fn bodies_of_unknown_length_are_read_to_their_end() {
    let agent = Agent::start().await;
    for version in Version::ALL {
        let path = agent.path(&format!("chunked-{version:?}"));
        let request = version.request("POST", &format!("/files?path={path}"));
        let request = request.header("content-type", "application/octet-stream");
        let content: Vec<u8> = (0..100_000u32).map(|n| (n % 253) as u8).collect();
        let answer = agent.exchange(version, request.body(in_pieces(content.clone(), 999)).unwrap()).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        assert!(std::fs::read(&path).unwrap() == content);

        let request = version.request("POST", "/filesystem.Filesystem/Stat");
        let request = request.header("content-type", "application/json");
        let body = in_pieces(format!(r#"{{"path":"{path}"}}"#), 3);
        let answer = agent.exchange(version, request.body(body).unwrap()).await;
        assert_eq!(answer.json()["entry"]["size"], "100000");
    }
}

#[tokio::test]
async fn a_page_of_any_origin_may_call_and_read() {
    let agent = Agent::start().await;
    for version in Version::ALL {
        let request = version
            .request("OPTIONS", "/process.Process/Start")
            .header("origin", "https://example.com")
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,connect-protocol-version,content-type");
        let answer = agent.exchange(version, request.body(whole("")).unwrap()).await;
        assert_eq!(answer.status, StatusCode::NO_CONTENT);
        assert_eq!(answer.header("access-control-allow-origin"), "*");
        assert!(answer.header("access-control-allow-methods").contains("POST"));
        let allowed = answer.header("access-control-allow-headers").to_lowercase();
        for name in ["authorization", "connect-protocol-version", "content-type"] {
            assert!(allowed.contains(name), "{allowed}");
        }

        for (path, expected) in
            [("/process.Process/List", StatusCode::OK), ("/nowhere", StatusCode::NOT_FOUND)]
        {
            let request = version.request("POST", path).header("content-type", "application/json");
            let request = request.header("origin", "null");
            let answer = agent.exchange(version, request.body(whole("{}")).unwrap()).await;
            assert_eq!(answer.status, expected);
            assert_eq!(answer.header("access-control-allow-origin"), "*", "{path}");
            assert!(answer.header("access-control-expose-headers").contains("Connect-Content-Encoding"));
        }
        let request = version.request("OPTIONS", "/process.Process/List").body(whole("")).unwrap();
        assert_eq!(agent.exchange(version, request).await.status, StatusCode::METHOD_NOT_ALLOWED);
    }
}
