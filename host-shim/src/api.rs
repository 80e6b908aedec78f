//! `api.sock`: HTTP/1.1 and JSON for whoever owns the sandbox.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use sandbox_folder::State;
use sandbox_folder::stop::StopRequest;
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::run::GRACE;

/// Verbs of the contract that this version does not carry out.
const LATER: [&str; 6] = ["/configure", "/pause", "/resume", "/snapshot", "/fork", "/network"];

/// The grace of the sandbox's processes, once somebody has asked for its end: the shortest that was asked for.
pub type Stop = Option<Duration>;

#[derive(Clone)]
struct Api {
    state: watch::Receiver<State>,
    stop: watch::Sender<Stop>,
}

/// Serves until it is dropped. `POST /stop` tells `stop` how long the sandbox's processes may take to end.
pub async fn serve(listener: UnixListener, state: watch::Receiver<State>, stop: watch::Sender<Stop>) {
    // axum accepts for as long as it is polled, and reports no error.
    let _ = axum::serve(listener, router(Api { state, stop })).await;
}

fn router(api: Api) -> Router {
    let mut router = Router::new()
        .route("/info", get(info))
        .route("/metrics", get(metrics))
        .route("/stop", post(stop))
        .fallback(|| async {
            error(StatusCode::NOT_FOUND, "no such call: there are /info, /metrics and /stop")
        });
    for path in LATER {
        let refusal = move || async move {
            error(StatusCode::NOT_IMPLEMENTED, &format!("{path} is not there in this version of host-shim"))
        };
        router = router.route(path, post(refusal));
    }
    router.with_state(api)
}

async fn info(Extract(api): Extract<Api>) -> Json<State> {
    Json(api.state.borrow().clone())
}

async fn metrics(Extract(api): Extract<Api>) -> impl IntoResponse {
    let mut text = String::from("# TYPE tiffin_start_phase_milliseconds gauge\n");
    for phase in &api.state.borrow().phases {
        // A name is printable ASCII (Timings); the two characters with a meaning inside quotes are not in it.
        let name = phase.name.replace(['"', '\\'], "");
        text.push_str(&format!("tiffin_start_phase_milliseconds{{phase=\"{name}\"}} {}\n", phase.ms));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

async fn stop(Extract(api): Extract<Api>, body: Bytes) -> Response {
    let asked = match StopRequest::parse(&body) {
        Ok(request) => request.grace_ms.map_or(GRACE, |ms| Duration::from_millis(ms.into())),
        Err(reason) => return error(StatusCode::BAD_REQUEST, &reason),
    };
    api.stop.send_modify(|grace| *grace = Some(grace.map_or(asked, |grace| grace.min(asked))));
    (StatusCode::ACCEPTED, Json(json!({ "stopping": true }))).into_response()
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "code": status.as_u16(), "message": message }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_folder::{Lifecycle, Phase, STATE_VERSION};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn call(path: &std::path::Path, request: &str) -> String {
        call_with(path, request, "").await
    }

    async fn call_with(path: &std::path::Path, request: &str, body: &str) -> String {
        let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
        let length = body.len();
        let head = format!(
            "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_owner_reads_and_stops_and_learns_what_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let state = State {
            schema_version: STATE_VERSION,
            id: "abc1".parse().unwrap(),
            phase: Lifecycle::Running,
            shim_pid: 1,
            vmm_pid: Some(2),
            accelerator: Some("tcg".into()),
            channel: Some("serial".into()),
            agent_version: None,
            phases: vec![Phase { name: "agent.a\"b".into(), ms: 1.5 }],
            labels: Default::default(),
            end: None,
        };
        let (_sender, receiver) = watch::channel(state);
        let stop = watch::Sender::new(None);
        let serving = tokio::spawn(serve(UnixListener::bind(&path).unwrap(), receiver, stop.clone()));

        let info = call(&path, "GET /info").await;
        assert!(info.starts_with("HTTP/1.1 200") && info.contains(r#""phase":"running""#), "{info}");
        let metrics = call(&path, "GET /metrics").await;
        assert!(metrics.contains("tiffin_start_phase_milliseconds{phase=\"agent.ab\"} 1.5\n"), "{metrics}");
        for later in LATER {
            let answer = call(&path, &format!("POST {later}")).await;
            assert!(
                answer.starts_with("HTTP/1.1 501") && answer.contains("not there in this version"),
                "{answer}"
            );
        }
        assert!(call(&path, "GET /novel").await.starts_with("HTTP/1.1 404"));
        for bad in ["{", "[]", r#"{"grace_ms":-1}"#, r#"{"grace_ms":"0"}"#] {
            let answer = call_with(&path, "POST /stop", bad).await;
            assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("grace_ms"), "{bad}: {answer}");
        }
        assert_eq!(*stop.borrow(), None);
        // The shortest grace counts, whatever comes later.
        for (body, expected) in [
            ("", GRACE),
            (r#"{"grace_ms":50,"novel":1}"#, Duration::from_millis(50)),
            ("{}", Duration::from_millis(50)),
            (r#"{"grace_ms":0}"#, Duration::ZERO),
        ] {
            assert!(call_with(&path, "POST /stop", body).await.starts_with("HTTP/1.1 202"));
            assert_eq!(*stop.borrow(), Some(expected));
        }
        serving.abort();
    }
}
