//! Who gets a tunnel, and how it ends.

use http::Method;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Error;

use crate::support::{Front, TestBox, Tunnel, echo, soon};

/// The status and the text of a refusal.
async fn refused(front: &Front, headers: &[(&'static str, &str)], id: &str) -> (u16, String) {
    match front.dial(headers, id).await {
        Err(Error::Http(response)) => {
            let body = response.body().clone().unwrap_or_default();
            (response.status().as_u16(), String::from_utf8(body).unwrap())
        }
        other => panic!("{other:?}"),
    }
}

async fn works(tunnel: &Tunnel) {
    let mut stream = tunnel.connect(7).await;
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    soon("the echo", stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"hello");
}

#[tokio::test]
async fn it_takes_the_teams_key_or_the_sandboxs_token_and_tells_others_nothing() {
    let front = Front::start().await;
    let TestBox { id, token, .. } = &front.sandbox([(7, echo())]).await;
    let other = front.sandbox([]).await;
    let missing: String = id.chars().rev().collect();
    let (ours, theirs) = (front.ours.as_str(), front.theirs.as_str());
    let bearer = format!("Bearer {ours}");
    let with_client_id = format!("{id}-6532622b");
    for (headers, id) in [
        (&[("x-api-key", ours)][..], id),
        (&[("authorization", &bearer)], id),
        (&[("x-access-token", token)], id),
        (&[("x-api-key", ours), ("x-access-token", "not looked at")], id),
        (&[("x-access-token", token)], &with_client_id),
    ] {
        works(&Tunnel::over(front_dial(&front, headers, id).await)).await;
    }
    for (headers, status, words) in [
        (&[][..], 401, "authorization header is missing"),
        (&[("x-api-key", "e2b_wrong")], 401, "Cannot get the team"),
        (&[("x-api-key", theirs)], 404, "doesn't exist or you don't have access to it"),
        // A key that is not theirs is not mended by a token.
        (&[("x-api-key", theirs), ("x-access-token", token)], 404, "doesn't exist or you don't have access"),
        (&[("x-access-token", "wrong")], 401, "the access token is not"),
        (&[("x-access-token", "")], 401, "the access token is not"),
        (&[("x-access-token", &other.token)], 401, "the access token is not"),
        (&[("e2b-traffic-access-token", token)], 401, "authorization header is missing"),
    ] {
        let (there, absent) = (refused(&front, headers, id).await, refused(&front, headers, &missing).await);
        assert!(there.0 == status && there.1.contains(words), "{headers:?}: {there:?}");
        assert_eq!((there.0, there.1.replace(id, &missing)), absent, "{headers:?}");
    }
    let target = format!("/v1/sandboxes/{id}/tunnel");
    let plain = front.call(&[("x-api-key", ours)], Method::GET, &target, Value::Null).await;
    assert!(plain.0 == 400 && plain.1.contains("Connection"), "{plain:?}");
    let posted = front.call(&[("x-api-key", ours)], Method::POST, &target, Value::Null).await;
    assert_eq!(posted.0, 405);
}

async fn front_dial(
    front: &Front,
    headers: &[(&'static str, &str)],
    id: &str,
) -> tokio_tungstenite::WebSocketStream<tokio::net::TcpStream> {
    front.dial(headers, id).await.unwrap_or_else(|error| panic!("{headers:?}: {error}"))
}

#[tokio::test]
async fn a_sandbox_has_four_tunnels_and_a_place_comes_back() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let other = front.sandbox([(7, echo())]).await;
    let mut tunnels = Vec::new();
    for _ in 0..4 {
        tunnels.push(front.tunnel(&sandbox.id).await);
    }
    let key = [("x-api-key", front.ours.as_str())];
    let (status, text) = refused(&front, &key, &sandbox.id).await;
    assert!(status == 429 && text.contains("too many tunnels to this sandbox"), "{text}");
    works(&front.tunnel(&other.id).await).await;
    tunnels.pop();
    let again = async {
        while front.dial(&key, &sandbox.id).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    soon("the place is free", again).await;
    for tunnel in &tunnels {
        works(tunnel).await;
    }
}

#[tokio::test]
async fn a_sandbox_that_ends_is_told_by_a_code_of_its_own() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let (tunnel, idle) = (front.tunnel(&sandbox.id).await, front.tunnel(&sandbox.id).await);
    let mut stream = tunnel.connect(7).await;
    let key = [("x-api-key", front.ours.as_str())];
    let target = format!("/sandboxes/{}", sandbox.id);
    assert_eq!(front.call(&key, Method::DELETE, &target, Value::Null).await.0, 204);
    let mut rest = Vec::new();
    let _ = soon("the stream ends", stream.read_to_end(&mut rest)).await;
    let ended = (4410, "the sandbox has ended".to_owned());
    assert_eq!(tunnel.closed().await, ended);
    assert_eq!(idle.closed().await, ended);
    assert_eq!(refused(&front, &key, &sandbox.id).await.0, 404);
}

#[tokio::test]
async fn a_sandbox_that_does_not_answer_is_told_on_the_stream() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    let socket = front.gateway.config.data.sandboxes().join(&sandbox.id).join("vsock.sock");
    std::fs::remove_file(socket).unwrap();
    let (_stream, answer) = tunnel.ask("CONNECT 7\n").await;
    assert_eq!(answer, "ERR 502 the sandbox was not found\n");
}

#[tokio::test]
async fn a_gateway_that_stops_says_so() {
    let front = Front::start().await;
    let sandbox = front.sandbox([(7, echo())]).await;
    let tunnel = front.tunnel(&sandbox.id).await;
    works(&tunnel).await;
    front.shutdown.cancel();
    assert_eq!(tunnel.closed().await, (1001, "the gateway stops; the sandbox goes on".to_owned()));
}
