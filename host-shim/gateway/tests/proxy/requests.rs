//! One request at a time: where it goes, what goes with it, and what is said when it cannot go.

use axum::Router;
use axum::extract::Request;
use axum::response::IntoResponse;
use axum::routing::any;
use http::StatusCode;
use serde_json::json;
use tiffin_gateway::store::Stage;

use crate::support::{AGENT, Builder, DOMAIN, Front, Serve, empty, full, http, to};

/// Says who it is and what came.
fn echo(name: &'static str) -> Serve {
    http(Router::new().fallback(any(move |request: Request| async move {
        let (head, body) = request.into_parts();
        let mut lines = vec![format!("{name} {} {} {:?}", head.method, head.uri, head.version)];
        for (key, value) in &head.headers {
            lines.push(format!("{key}: {}", value.to_str().unwrap()));
        }
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        lines.push(String::from_utf8_lossy(&body).into_owned());
        ([("keep-alive", "timeout=5"), ("x-kept", "1")], lines.join("\n")).into_response()
    })))
}

#[tokio::test]
async fn each_request_on_one_connection_goes_its_own_way() {
    let first = Builder::default()
        .access_token("one")
        .port(AGENT, echo("one"))
        .port(80, echo("one:80"))
        .start("aaaa", "red");
    let second = Builder::default().access_token("two").port(AGENT, echo("two")).start("bbbb", "blue");
    let front = Front::of(&[&first, &second]).await;
    let mut connection = front.connect().await;
    for round in 0..20 {
        for (id, name) in [("aaaa", "one"), ("bbbb", "two")] {
            let body = format!("round {round}");
            let request = to(id, AGENT, "/x?y=z").method("POST").header("x-access-token", name);
            let answer = connection.send(request.body(full(body.clone())).unwrap()).await;
            assert_eq!(answer.status, StatusCode::OK);
            assert!(answer.text.starts_with(&format!("{name} POST /x?y=z HTTP/1.1\n")), "{answer:?}");
            assert!(answer.text.contains(&format!("x-access-token: {name}\n")), "{answer:?}");
            assert!(answer.text.ends_with(&body), "{answer:?}");
        }
        // By label, and to the control API, on the same connection.
        let labelled = http::Request::get("/").header("host", format!("80-aaaa-6532622b.{DOMAIN}"));
        let answer = connection.send(labelled.body(empty()).unwrap()).await;
        assert!(answer.text.starts_with("one:80 GET / "), "{answer:?}");
        let control = http::Request::get("/nothing/there").header("host", "127.0.0.1");
        let answer = connection.send(control.body(empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
    }
    // Small calls of the agent's shared their connection to the sandbox; the tenant's port had one for each.
    assert_eq!(second.dials(), 1);
    assert_eq!(first.dials(), 1 + 20);
}

#[tokio::test]
async fn secrets_and_hop_by_hop_headers_stay_here() {
    let sandbox = Builder::default().port(AGENT, echo("agent")).port(8080, echo("app")).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    for port in [AGENT, 8080] {
        let request = to("aaaa", port, "/")
            .header("x-api-key", "e2b_secret")
            .header("x-access-token", "token-secret")
            .header("e2b-traffic-access-token", "traffic-secret")
            .header("authorization", "Basic dXNlcjo=")
            .header("connection", "x-named")
            .header("x-named", "1")
            .header("x-plain", "1");
        let answer = front.send(request.body(empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::OK);
        for gone in ["e2b_secret", "traffic-secret", "x-named", "e2b-sandbox", "connection"] {
            assert!(!answer.text.contains(gone), "{gone} got through to {port}: {}", answer.text);
        }
        assert!(answer.text.contains("x-plain: 1") && answer.text.contains("authorization: Basic dXNlcjo="));
        assert_eq!(answer.text.contains("token-secret"), port == AGENT, "{}", answer.text);
        assert_eq!(answer.text.contains("x-forwarded-for: 127.0.0.1"), port != AGENT, "{}", answer.text);
        assert!(!answer.headers.contains_key("keep-alive"));
        assert_eq!(answer.headers["x-kept"], "1");
    }
}

#[tokio::test]
async fn errors_are_in_the_words_that_sdks_look_for() {
    let sandbox = Builder::default().port(AGENT, echo("agent")).start("aaaa", "red");
    let starting = Builder::default().stage(Stage::Starting).port(AGENT, echo("no")).start("bbbb", "red");
    let ending = Builder::default().stage(Stage::Ending).port(AGENT, echo("no")).start("cccc", "red");
    let front = Front::of(&[&sandbox, &starting, &ending]).await;
    for id in ["zzzz", "bbbb", "cccc"] {
        for port in [AGENT, 3000] {
            let request = to(id, port, "/").method("POST").body(full(vec![0; 100_000])).unwrap();
            let answer = front.send(request).await;
            assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
            let expected = json!({"sandboxId": id, "message": "The sandbox was not found", "code": 502});
            assert_eq!(answer.json(), expected);
            assert_eq!(answer.headers["should-retry"], "false");
            assert_eq!(answer.headers["content-type"], "application/json");
        }
    }
    assert_eq!(starting.dials() + ending.dials(), 0);
    let answer = front.send(to("aaaa", 3000, "/").body(empty()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    let message = "The sandbox is running but port is not open";
    let expected = json!({"sandboxId": "aaaa", "message": message, "port": 3000, "code": 502});
    assert_eq!(answer.json(), expected);
}

#[tokio::test]
async fn private_ports_need_the_traffic_token() {
    let sandbox = Builder::default()
        .traffic_token("right")
        .access_token("envd")
        .port(AGENT, echo("agent"))
        .port(3000, echo("app"))
        .start("aaaa", "red");
    let open = Builder::default().access_token("envd").port(3000, echo("app")).start("bbbb", "red");
    let front = Front::of(&[&sandbox, &open]).await;
    let ask = async |id: &str, port, headers: &[(&str, &str)]| {
        let mut request = to(id, port, "/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        front.send(request.body(empty()).unwrap()).await
    };
    let (right, wrong) = (("e2b-traffic-access-token", "right"), ("e2b-traffic-access-token", "wrong"));
    let secured = "Sandbox is secured with traffic access token.";
    for (headers, message) in [
        (&[][..], format!("{secured} Token header 'e2b-traffic-access-token' is missing")),
        (&[wrong], format!("{secured} Provided token in header 'e2b-traffic-access-token' is invalid")),
    ] {
        for port in [3000, 49982] {
            let answer = ask("aaaa", port, headers).await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN);
            assert_eq!(answer.json(), json!({"sandboxId": "aaaa", "message": message, "code": 403}));
        }
    }
    assert_eq!(sandbox.dials(), 0);
    assert_eq!(ask("aaaa", 3000, &[right]).await.status, StatusCode::OK);
    // The agent guards itself, and public ports need nothing.
    assert_eq!(ask("aaaa", AGENT, &[]).await.status, StatusCode::OK);
    assert_eq!(ask("bbbb", 3000, &[]).await.status, StatusCode::OK);
    // What the gateway does with the sandbox's own token is not for who comes without one.
    for (id, headers) in [("aaaa", &[right][..]), ("aaaa", &[right, ("x-access-token", "x")]), ("bbbb", &[])]
    {
        let answer = ask(id, 49982, headers).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{answer:?}");
    }
}

#[tokio::test]
async fn http2_reaches_a_server_of_http1() {
    let sandbox = Builder::default().port(AGENT, echo("agent")).port(80, echo("app")).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut connection = front.connect_http2().await;
    let request = http::Request::post(format!("http://80-aaaa.{DOMAIN}/x?y"))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(full("hello"))
        .unwrap();
    let answer = crate::support::Answer::of(connection.send_request(request).await.unwrap()).await;
    assert!(answer.text.starts_with("app POST /x?y HTTP/1.1\n"), "{answer:?}");
    assert!(answer.text.contains(&format!("host: 80-aaaa.{DOMAIN}\n")), "{answer:?}");
    assert!(answer.text.contains("cookie: a=1; b=2\n") && answer.text.ends_with("hello"), "{answer:?}");
    assert!(!answer.headers.contains_key("keep-alive"));
}

#[tokio::test]
async fn a_connection_that_the_agent_closed_meanwhile_is_replaced() {
    // It closes after each answer without saying so.
    let agent = crate::support::raw(|mut stream| async move {
        crate::support::read_head(&mut stream).await;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            .await
            .unwrap();
    });
    let sandbox = Builder::default().port(AGENT, agent).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut connection = front.connect().await;
    for _ in 0..5 {
        let answer = connection.send(to("aaaa", AGENT, "/").body(empty()).unwrap()).await;
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "ok"));
    }
}
