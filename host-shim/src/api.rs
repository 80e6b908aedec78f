//! `api.sock`: HTTP/1.1 and JSON for whoever owns the sandbox.

use std::path::PathBuf;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use sandbox_folder::State;
use sandbox_folder::calls::{ConfigureRequest, PauseRequest, TargetRequest};
use sandbox_folder::network::NetworkRequest;
use sandbox_folder::stop::StopRequest;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::run::GRACE;

/// The longest body that is read: a Configure with the largest environment that the agent takes fits twice.
const MAX_BODY: usize = 512 << 10;

/// The grace of the sandbox's processes, once somebody has asked for its end: the shortest that was asked for.
pub type Stop = Option<Duration>;

/// What the owner wants of a sandbox that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A parked sandbox is to be somebody's.
    Configure(Box<ConfigureRequest>),
    /// It is to be written down and ended.
    Pause,
    /// A template is to be made of it.
    Snapshot(PathBuf),
    /// Others are to go on from it.
    Fork(PathBuf),
    /// What its network does is to be told, after this change if there is one.
    Network(Option<NetworkRequest>),
}

/// A request, and where its answer goes: a JSON object, or why there is none.
#[derive(Debug)]
pub struct Call {
    /// What is asked for.
    pub request: Request,
    /// Where the answer goes. Nobody may wait for it any more.
    pub reply: oneshot::Sender<Result<Value, Error>>,
}

#[derive(Clone)]
struct Api {
    state: watch::Receiver<State>,
    stop: watch::Sender<Stop>,
    calls: mpsc::Sender<Call>,
}

/// Serves until `end`, and then until every answer is given. `POST /stop` tells `stop` how long the sandbox's processes may take to end; what takes
/// longer goes to `calls`, one at a time.
pub async fn serve(
    listener: UnixListener,
    state: watch::Receiver<State>,
    stop: watch::Sender<Stop>,
    calls: mpsc::Sender<Call>,
    end: CancellationToken,
) {
    // axum accepts for as long as it is polled, and reports no error.
    let serving = axum::serve(listener, router(Api { state, stop, calls }));
    let _ = serving.with_graceful_shutdown(end.cancelled_owned()).await;
}

fn router(api: Api) -> Router {
    let call = |request: fn(&[u8]) -> Result<Request, String>| {
        post(move |Extract(api): Extract<Api>, body: Bytes| async move {
            match request(&body) {
                Ok(request) => api.call(request).await,
                Err(reason) => error(StatusCode::BAD_REQUEST, &reason),
            }
        })
    };
    Router::new()
        .route("/info", get(info))
        .route("/metrics", get(metrics))
        .route("/stop", post(stop))
        .route("/configure", call(|body| Ok(Request::Configure(Box::new(object(body)?)))))
        .route("/pause", call(|body| object(body).map(|PauseRequest {}| Request::Pause)))
        .route("/snapshot", call(|body| target(body).map(Request::Snapshot)))
        .route("/fork", call(|body| target(body).map(Request::Fork)))
        .route(
            "/network",
            get(network).merge(call(|body| object(body).map(|wish| Request::Network(Some(wish))))),
        )
        .fallback(|| async {
            let there = "/info, /metrics, /stop, /configure, /pause, /snapshot, /fork and /network";
            error(StatusCode::NOT_FOUND, &format!("no such call: there are {there}"))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(api)
}

impl Api {
    async fn call(&self, request: Request) -> Response {
        let (reply, answer) = oneshot::channel();
        // The receiver is gone with the sandbox.
        let ended = || error(StatusCode::CONFLICT, "the sandbox is ending");
        if self.calls.send(Call { request, reply }).await.is_err() {
            return ended();
        }
        match answer.await {
            Ok(Ok(done)) => Json(done).into_response(),
            Ok(Err(failed)) => {
                let status = match &failed {
                    Error::Conflict(_) => StatusCode::CONFLICT,
                    failed if failed.is_full() => StatusCode::INSUFFICIENT_STORAGE,
                    failed if failed.is_bad_input() => StatusCode::BAD_REQUEST,
                    _ => StatusCode::INTERNAL_SERVER_ERROR,
                };
                error(status, &failed.to_string())
            }
            Err(_) => ended(),
        }
    }
}

/// A body that may be absent.
fn object<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    let body = if body.is_empty() { b"{}" } else { body };
    // By way of a map: serde would also read a struct from a list.
    let invalid = |error: serde_json::Error| format!("expected a JSON object: {error}");
    let object: serde_json::Map<String, Value> = serde_json::from_slice(body).map_err(invalid)?;
    serde_json::from_value(object.into()).map_err(invalid)
}

fn target(body: &[u8]) -> Result<PathBuf, String> {
    let TargetRequest { path } = object(body)?;
    if path.is_absolute() {
        return Ok(path);
    }
    Err(format!("expected an absolute path, got {}", path.display()))
}

async fn info(Extract(api): Extract<Api>) -> Json<State> {
    Json(api.state.borrow().clone())
}

async fn network(Extract(api): Extract<Api>) -> Response {
    api.call(Request::Network(None)).await
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
            start: None,
            booted_because: None,
            generation: None,
            phases: vec![Phase { name: "agent.a\"b".into(), ms: 1.5 }],
            labels: Default::default(),
            end: None,
        };
        let (_sender, receiver) = watch::channel(state);
        let stop = watch::Sender::new(None);
        let (calls, mut called) = mpsc::channel(1);
        let (listener, end) = (UnixListener::bind(&path).unwrap(), CancellationToken::new());
        let serving = tokio::spawn(serve(listener, receiver, stop.clone(), calls, end.clone()));

        let info = call(&path, "GET /info").await;
        assert!(info.starts_with("HTTP/1.1 200") && info.contains(r#""phase":"running""#), "{info}");
        let metrics = call(&path, "GET /metrics").await;
        assert!(metrics.contains("tiffin_start_phase_milliseconds{phase=\"agent.ab\"} 1.5\n"), "{metrics}");
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
        for (path_of_call, bad) in [
            ("/pause", "[]"),
            ("/pause", r#"{"now":true}"#),
            ("/fork", "{}"),
            ("/fork", r#"{"path":"relative"}"#),
            ("/snapshot", ""),
            ("/network", r#"{"novel":1}"#),
            ("/network", r#"{"allow":"10.0.0.0/8"}"#),
            ("/configure", r#"{"novel":1}"#),
            ("/configure", r#"{"id":"UPPER"}"#),
        ] {
            let answer = call_with(&path, &format!("POST {path_of_call}"), bad).await;
            assert!(answer.starts_with("HTTP/1.1 400"), "{path_of_call} {bad}: {answer}");
        }
        let conflict = Error::Conflict("it is not parked".to_owned());
        for (request, body, expected, answer, status) in [
            ("/pause", "", Request::Pause, Ok(json!({"stopped_ms": 1})), "200"),
            ("/fork", r#"{"path":"/f"}"#, Request::Fork("/f".into()), Ok(json!({})), "200"),
            ("/configure", "{}", Request::Configure(Box::default()), Err(conflict), "409"),
            ("/network", "{}", Request::Network(Some(NetworkRequest::default())), Ok(json!({})), "200"),
            ("/network", "", Request::Network(None), Ok(json!({})), "200"),
        ] {
            let method = if expected == Request::Network(None) { "GET" } else { "POST" };
            let request = format!("{method} {request}");
            let (said, ()) = tokio::join!(call_with(&path, &request, body), async {
                let call = called.recv().await.unwrap();
                assert_eq!(call.request, expected);
                call.reply.send(answer).unwrap();
            });
            assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{said}");
        }
        drop(called);
        assert!(call(&path, "POST /pause").await.starts_with("HTTP/1.1 409"), "the sandbox is ending");
        // What was accepted is answered, and then nothing is served any more.
        let asked = tokio::spawn({
            let path = path.clone();
            async move { call(&path, "GET /info").await }
        });
        assert!(asked.await.unwrap().starts_with("HTTP/1.1 200"));
        end.cancel();
        serving.await.unwrap();
        assert!(tokio::net::UnixStream::connect(&path).await.is_err());
    }
}
