//! Many at once, and none lost.

use axum::Router;
use axum::extract::Request;
use axum::routing::post;
use envd_proto::process::process_event::Event;
use http_body_util::BodyExt;

use crate::streams::{Events, exec};
use crate::support::{Agent, Builder, Front, full, http, to};
use crate::upgrades::{WebSocket, echo_server};

#[tokio::test]
async fn five_hundred_idle_websockets() {
    let sandbox = Builder::default().port(80, echo_server()).start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let mut sockets = Vec::new();
    for _ in 0..500 {
        sockets.push(WebSocket::open(&front, "aaaa", 80).await);
    }
    for (number, socket) in sockets.iter_mut().enumerate() {
        socket.echo(&format!("number {number}")).await;
    }
}

#[tokio::test]
async fn two_hundred_exec_streams() {
    let agent = Agent::start("aaaa", "red").await;
    let front = Front::of(&[&agent.fake]).await;
    let gate = agent.home.path().join("gate");
    // All of them run at the same time: they wait for one file.
    let script =
        format!("echo begun $NUMBER; while ! [ -e {} ]; do sleep 0.2; done; echo ended", gate.display());
    let mut streams = Vec::new();
    for number in 0..200 {
        let mut connection = front.connect().await;
        let script = format!("NUMBER={number}; {script}");
        let mut events = Events::of(connection.open(exec("aaaa", &script)).await);
        assert!(matches!(events.next().await, Some(Event::Start(_))));
        assert_eq!(events.printed().await, format!("begun {number}\n"));
        streams.push((connection, events));
    }
    std::fs::write(gate, "").unwrap();
    for (_connection, events) in &mut streams {
        assert_eq!(events.printed().await, "ended\n");
        assert!(matches!(events.next().await, Some(Event::End(end)) if end.exit_code == 0));
        assert_eq!(events.next().await, None);
    }
}

#[tokio::test]
async fn a_hundred_streams_of_one_http2_connection() {
    let sandbox = Builder::default()
        .port(80, http(Router::new().route("/", post(|request: Request| async { request.into_body() }))))
        .start("aaaa", "red");
    let front = Front::of(&[&sandbox]).await;
    let connection = front.connect_http2().await;
    let uri = format!("http://{}/", front.address);
    let asking = (0..100).map(|number: u32| {
        let mut connection = connection.clone();
        let (mut head, body) = to("aaaa", 80, &uri)
            .method("POST")
            .body(full(number.to_le_bytes().repeat(50_000)))
            .unwrap()
            .into_parts();
        head.headers.remove("host");
        async move {
            let response = connection.send_request(http::Request::from_parts(head, body)).await.unwrap();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert!(body == number.to_le_bytes().repeat(50_000), "stream {number}");
        }
    });
    futures::future::join_all(asking).await;
    assert_eq!(sandbox.dials(), 100);
}
