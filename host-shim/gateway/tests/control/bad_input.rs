//! What no client should send: each gets its status and words, as JSON.

use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::gateway::{PATIENCE, TestGateway};

const CREATE: &str = "/v2/sandboxes";

#[tokio::test]
async fn bodies_that_are_no_json_or_of_wrong_types() {
    let gateway = TestGateway::start().await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let nested = format!("{{\"templateID\":\"base\",\"mcp\":{deep}}}");
    for (body, words) in [
        ("", "templateID"),
        ("{", "EOF while parsing"),
        ("nonsense", "expected"),
        ("[]", "invalid"),
        ("null", "invalid type"),
        ("{}", "missing field `templateID`"),
        (r#"{"templateID":"base"} x"#, "trailing"),
        (r#"{"templateID":7}"#, "templateID: invalid type"),
        (r#"{"templateID":null}"#, "templateID: invalid type"),
        (r#"{"templateID":"base","templateID":"base"}"#, "duplicate field"),
        (r#"{"templateID":"base","timeout":"300"}"#, "timeout: invalid type"),
        (r#"{"templateID":"base","timeout":-1}"#, "timeout: invalid value"),
        (r#"{"templateID":"base","timeout":1.5}"#, "timeout: invalid type"),
        (r#"{"templateID":"base","timeout":1e400}"#, "number out of range"),
        (r#"{"templateID":"base","timeout":0}"#, "invalid timeout 0: expected 1 to 2592000 seconds"),
        (r#"{"templateID":"base","timeout":18446744073709551615}"#, "invalid timeout"),
        (r#"{"templateID":"base","metadata":{"a":1}}"#, "metadata.a: invalid type"),
        (r#"{"templateID":"base","envVars":["A=1"]}"#, "envVars: invalid type"),
        (r#"{"templateID":"base","envVars":{"A=B":"1"}}"#, "envVars"),
        (r#"{"templateID":"base","envVars":{"A":"\u0000"}}"#, "envVars"),
        (r#"{"templateID":"base","secure":"yes"}"#, "secure: invalid type"),
        (r#"{"templateID":"base","allow_internet_access":"yes"}"#, "allow_internet_access: invalid type"),
        (r#"{"templateID":"base","network":[]}"#, "network"),
        (r#"{"templateID":""}"#, "invalid templateID"),
        (r#"{"templateID":"a\u0000b"}"#, "invalid templateID"),
        ("{\"templateID\":\"\u{fffd}\"}", "not found"),
        (nested.as_str(), "recursion limit"),
    ] {
        let answer = gateway.post_raw(CREATE, "application/json", body.to_owned()).await;
        let status = if words == "not found" { 404 } else { 400 };
        answer.refuses(status, words);
        assert!(answer.text.len() < 2000, "{} bytes", answer.text.len());
    }
    let long = json!({ "templateID": "x".repeat(600) }).to_string();
    gateway.post_raw(CREATE, "application/json", long).await.refuses(400, "invalid templateID \"xxx");
    gateway.post_raw(CREATE, "application/json", &b"{\"templateID\":\"\xff\"}"[..]).await.refuses(400, "");
    let large = json!({ "templateID": "base", "metadata": { "k": "v".repeat(64 << 10) } });
    gateway.post(CREATE, large).await.refuses(400, "metadata has 65537 bytes");
    let large = json!({ "templateID": "base", "envVars": { "k": "v".repeat(128 << 10) } });
    gateway.post(CREATE, large).await.refuses(400, "envVars");
    assert_eq!(gateway.get("/sandboxes").await.json(), json!([]));
}

#[tokio::test]
async fn what_is_not_served_is_refused_and_never_left_out() {
    let gateway = TestGateway::start().await;
    for (option, name) in [
        (json!({ "autoPauseMemory": false }), "autoPauseMemory"),
        (json!({ "mcp": { "browser": {} } }), "mcp"),
        (json!({ "iam": { "tokens": {} } }), "iam"),
        (json!({ "volumeMounts": [{ "name": "v", "path": "/v" }] }), "volumeMounts"),
        (json!({ "network": { "allowOut": ["1.1.1.1"] } }), "network.allowOut"),
        (json!({ "network": { "denyOut": ["0.0.0.0/0"] } }), "network.denyOut"),
        (json!({ "network": { "maskRequestHost": "x" } }), "network.maskRequestHost"),
        (json!({ "network": { "egressProxy": { "url": "x" } } }), "network.egressProxy"),
        (json!({ "network": { "rules": { "x": [{}] } } }), "network.rules"),
        (json!({ "network": { "dnsServers": ["1.1.1.1"] } }), "network.dnsServers"),
        (json!({ "network": { "httpsPorts": [443] } }), "network.httpsPorts"),
    ] {
        for route in ["/v2/sandboxes", "/sandboxes"] {
            let mut body = json!({ "templateID": "base" });
            body.as_object_mut().unwrap().extend(option.as_object().cloned().unwrap());
            gateway.post(route, body).await.refuses(400, name);
        }
    }
    let id = gateway.create(json!({})).await;
    let connect = format!("/v2/sandboxes/{id}/connect");
    for call in [&connect, &format!("/sandboxes/{id}/pause"), &format!("/sandboxes/{id}/resume")] {
        gateway.post(call, json!({ "memory": false })).await.refuses(400, "memory: false is not supported");
    }
    for route in tiffin_gateway::control::NOT_SERVED {
        let target = route.path.replace("{sandboxID}", &id).replace(['{', '}'], "");
        let answer = gateway.call(&gateway.ours, route.method.parse().unwrap(), &target, Value::Null).await;
        answer.refuses(501, "is not served by this gateway yet");
        assert!(answer.text.contains(route.what), "{answer:?}");
    }
    for call in ["fork", "snapshots"] {
        let target = format!("/sandboxes/{id}/{call}");
        gateway.post(&target, json!({ "memory": false, "count": 0 })).await.is(400);
    }
    gateway
        .post(&format!("/sandboxes/{id}/snapshots"), json!({ "name": "A b" }))
        .await
        .refuses(400, "invalid name");
    gateway
        .post(&format!("/sandboxes/{id}/snapshots"), json!({ "name": "base:v2" }))
        .await
        .refuses(400, "of a template");
    gateway
        .post(&format!("/sandboxes/{id}/fork"), json!({ "count": 101 }))
        .await
        .refuses(400, "expected 1 to 100");
    for query in ["limit=0", "limit=101", "nextToken=x", "name=A%20b"] {
        gateway.get(&format!("/snapshots?{query}")).await.is(400);
    }
    // A snapshot's id may have slashes and colons, percent-encoded.
    gateway.delete("/templates/team%2Fname%3Av1").await.refuses(404, "team/name:v1");
    gateway.delete("/templates/base").await.refuses(403, "its operator's to delete");
}

#[tokio::test]
async fn times_that_make_no_sense() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    for (route, body, words) in [
        ("timeout", json!({}), "missing field `timeout`"),
        ("timeout", Value::Null, "missing field `timeout`"),
        ("timeout", json!({ "timeout": null }), "timeout: invalid type"),
        ("timeout", json!({ "timeout": 2_592_001 }), "expected 0 to 2592000 seconds"),
        ("timeout", json!({ "timeout": "1" }), "timeout: invalid type"),
        ("refreshes", json!({ "duration": u64::MAX }), "invalid timeout"),
        ("refreshes", json!({ "duration": -1 }), "duration: invalid value"),
        ("connect", json!({ "timeout": u64::MAX }), "invalid timeout"),
        ("connect", json!([1, 2, 3]), ""),
    ] {
        gateway.post(&format!("/sandboxes/{id}/{route}"), body).await.refuses(400, words);
    }
    for query in ["start=x", "start=2&end=1", "end=1.5"] {
        gateway.get(&format!("/sandboxes/{id}/metrics?{query}")).await.refuses(400, "");
    }
    gateway.get("/sandboxes/metrics").await.refuses(400, "missing field `sandbox_ids`");
    let many: Vec<String> = (0..101).map(|n| format!("a{n}")).collect();
    gateway
        .get(&format!("/sandboxes/metrics?sandbox_ids={}", many.join(",")))
        .await
        .refuses(400, "at most 100");
    for query in ["limit=0", "limit=1001", "direction=up", "level=loud", "cursor=x"] {
        gateway.get(&format!("/v2/sandboxes/{id}/logs?{query}")).await.refuses(400, "");
    }
    gateway.get(&format!("/sandboxes/{id}/logs?start=now")).await.refuses(400, "start");
}

#[tokio::test]
async fn ids_that_are_paths_or_no_ids_are_of_no_sandbox() {
    let gateway = TestGateway::start().await;
    let id = gateway.create(json!({})).await;
    for bad in [
        "..%2f..%2fetc",
        "%2e%2e",
        "..",
        "a%00b",
        "%ff%fe",
        "UPPER",
        "a-b",
        "abc",
        "nosuchsandbox",
        &format!("{id}%2f"),
        &format!("{id}-other"),
        &format!("{}{id}", "a".repeat(60)),
        &"a".repeat(3000),
        "%22%3E%3Cscript%3E",
    ] {
        for (method, rest) in
            [(Method::GET, ""), (Method::DELETE, ""), (Method::POST, "/connect"), (Method::GET, "/logs")]
        {
            let answer =
                gateway.call(&gateway.ours, method, &format!("/sandboxes/{bad}{rest}"), Value::Null).await;
            answer.refuses(404, "doesn't exist or you don't have access to it");
            assert!(answer.text.len() < 300, "{answer:?}");
        }
    }
    gateway.get(&format!("/sandboxes/{}", "a".repeat(5000))).await.refuses(414, "longer than 4096 bytes");
    gateway.get("/sandboxes/").await.refuses(404, "");
    gateway.get("//sandboxes").await.refuses(404, "there is no GET");
    gateway.get(&format!("/sandboxes/x/../{id}")).await.refuses(404, "there is no GET");
    gateway.get(&format!("/sandboxes/{id}")).await.is(200);
}

#[tokio::test]
async fn a_template_name_is_no_path() {
    let gateway = TestGateway::start().await;
    for name in
        ["../templates/base", "/etc", "base/", "base/../base", ".", "..", "BASE", "base:v9", "x y", "base\\"]
    {
        gateway.post(CREATE, json!({ "templateID": name })).await.refuses(404, "not found");
    }
}

#[tokio::test]
async fn types_lengths_and_methods() {
    let gateway = TestGateway::start().await;
    let body = r#"{"templateID":"base"}"#;
    for content_type in
        ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data"]
    {
        gateway
            .post_raw(CREATE, content_type, body)
            .await
            .refuses(415, "expected a body of type application/json");
    }
    gateway.post_raw(CREATE, "Application/JSON; charset=utf-8", body).await.is(201);
    let huge = vec![b' '; (1 << 20) + 1];
    gateway.post_raw(CREATE, "application/json", huge).await.refuses(413, "longer than 1048576 bytes");

    for (method, target) in [
        (Method::PUT, "/sandboxes"),
        (Method::DELETE, "/v2/sandboxes"),
        (Method::POST, "/health"),
        (Method::PATCH, "/sandboxes/abcd"),
        (Method::from_bytes(b"BREW").unwrap(), "/sandboxes"),
    ] {
        let answer = gateway.call(&gateway.ours, method.clone(), target, Value::Null).await;
        answer.refuses(405, &format!("{target} does not take {method}"));
        assert!(answer.header("allow").is_some(), "{answer:?}");
    }
    let answer = gateway.get("/v9/sandboxes").await;
    answer.refuses(404, "there is no GET /v9/sandboxes");
}

#[tokio::test]
async fn request_ids_are_taken_over_where_they_are_plain() {
    let gateway = TestGateway::start().await;
    let send = |id: &'static [u8]| {
        let request = Request::get("/health").header("x-request-id", id).body(Full::default()).unwrap();
        gateway.send(request)
    };
    assert_eq!(send(b"abc-1.2_3").await.header("x-request-id"), Some("abc-1.2_3"));
    for bad in [&b""[..], b"a b", b"\xff", &[b'x'; 129]] {
        let made = send(bad).await;
        let id = made.header("x-request-id").unwrap();
        assert!(id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    }
}

#[tokio::test]
async fn a_body_that_comes_in_chunks_or_breaks_off() {
    let gateway = TestGateway::start().await;
    let head = |more: &str| {
        format!(
            "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-type: application/json\r\n\
             connection: close\r\n{more}\r\n",
            gateway.ours.as_str()
        )
    };
    let exchange = async |bytes: String, whole: bool| {
        let mut stream = gateway.connect().await;
        stream.write_all(bytes.as_bytes()).await.unwrap();
        if !whole {
            stream.shutdown().await.unwrap();
        }
        let mut answer = Vec::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end");
        read.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    // As JavaScript sends every body.
    let chunked = "5\r\n{\"tem\r\n12\r\nplateID\":\"base\"  }\r\n0\r\n\r\n";
    let answer = exchange(format!("{}{chunked}", head("transfer-encoding: chunked\r\n")), true).await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    // A body that ends before its length: nothing is created, nothing hangs.
    let answer = exchange(format!("{}{{\"templateID\":", head("content-length: 100\r\n")), false).await;
    assert!(!answer.contains(" 201 "), "{answer}");
    assert_eq!(gateway.get("/sandboxes").await.json().as_array().unwrap().len(), 1);
}
