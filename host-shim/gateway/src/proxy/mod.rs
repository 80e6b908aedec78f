//! Requests to a sandbox's ports, its agent's among them: routed, authorised, streamed.
//!
//! ```text
//!   request ── route ──► sandbox, port ── may it? ──► 49983: the agent's client door, over a kept connection
//!                │                          │         49982: legacy::  (the first SDKs; it refuses secured ones)
//!                ▼                          ▼         other: the ports door, `CONNECT <port>`
//!              400                 401, 403, 502
//! ```
//!
//! Every request goes this way by itself: SDKs share one connection over many sandboxes and the control API. HTTP/1.1 is
//! spoken to the sandbox whatever the client speaks, so a server that knows nothing but HTTP/2 (gRPC) cannot be reached
//! this way. The gateway writes each request anew from what it understood: no byte of a client's framing gets through.
//!
//! Who may: the agent checks its access token itself, on each call. A port of the tenant's is public unless the sandbox
//! has a traffic token. Another team's sandbox is no different from one's own: ids cannot be guessed, tokens guard.

mod forward;
mod headers;
mod pool;
mod refusal;
pub mod route;
mod upgrade;
mod upstream;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, Request, StatusCode};
use hyper::body::Incoming;
use sandbox_folder::client::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fleet::Sandbox;
use crate::store::SandboxRecord;
use crate::{Gateway, identity, legacy};
use headers::ToPort;
use pool::Pool;
use refusal::Refusal;
use route::Target;

pub(crate) use refusal::discard;
pub(crate) use upstream::DialError;

/// The agent's port.
pub const AGENT_PORT: u16 = envd_proto::CLIENT_PORT as u16;

/// The connection that a request came on.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    /// Its other end.
    pub(crate) peer: SocketAddr,
    /// Whether it is TLS.
    pub(crate) secure: bool,
    /// Its place among the connections, until it and what it became have ended.
    pub(crate) _seat: Arc<OwnedSemaphorePermit>,
    /// What it becomes is tracked here.
    pub(crate) connections: TaskTracker,
    /// Cancelled when nothing may go on any longer.
    pub(crate) cut: CancellationToken,
}

/// The proxy of a gateway.
#[derive(Default)]
pub(crate) struct Proxy {
    pool: Arc<Pool>,
}

impl Proxy {
    /// Answers a request to a port of a sandbox.
    pub(crate) async fn answer(
        &self,
        gateway: &Arc<Gateway>,
        client: &Client,
        target: &Target,
        request: Request<Incoming>,
    ) -> Response {
        let method = request.method().clone();
        let response = match admit(gateway, target, request.headers()).await {
            Err(refusal) => refusal.answer_to(target, request).await,
            Ok(sandbox) if target.port == legacy::PORT => {
                legacy::serve(Arc::clone(gateway), sandbox, request.map(Body::new)).await
            }
            Ok(sandbox) => self.forward(gateway, client, &sandbox, target, request).await,
        };
        // A fixed word: the path is the client's.
        let route = if target.port == legacy::PORT { "legacy" } else { "proxy" };
        gateway.metrics.request_counted(&method, route, response.status());
        response
    }

    async fn forward(
        &self,
        gateway: &Arc<Gateway>,
        client: &Client,
        sandbox: &Arc<Sandbox>,
        target: &Target,
        mut request: Request<Incoming>,
    ) -> Response {
        let upgrade = upgrade::of_request(&mut request);
        if client.secure {
            headers::came_over_tls(request.headers_mut());
        }
        let peer = client.peer.ip();
        match forward::forward(gateway, &self.pool, sandbox, target, peer, request).await {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                upgrade::join(gateway, client, sandbox, upgrade, response)
            }
            Ok(response) => response,
            Err((refusal, Some(request))) => refusal.answer_to(target, *request).await,
            Err((refusal, None)) => refusal.answer(target),
        }
    }

    /// Lets go of connections that nobody needs, for as long as the gateway serves.
    pub(crate) async fn sweep(&self) {
        loop {
            tokio::time::sleep(pool::SWEEP).await;
            self.pool.sweep();
        }
    }
}

/// The sandbox, where a request with those headers may reach the port. One that is paused, and was created to be resumed by
/// requests, goes on first; the agent's own token is checked by the agent only then.
async fn admit(gateway: &Gateway, target: &Target, headers: &HeaderMap) -> Result<Arc<Sandbox>, Refusal> {
    let sandbox = gateway.fleet.get(&target.id).ok_or(Refusal::NotFound)?;
    let record = sandbox.record();
    // Before its Configure was acknowledged, and once its end was asked for, there is nobody to talk to.
    if !record.stage.is_alive() {
        return Err(Refusal::NotFound);
    }
    authorize(&record, target.port, headers)?;
    match gateway.fleet.wake(&sandbox).await {
        Ok(true) => Ok(sandbox),
        Ok(false) => Err(Refusal::NotFound),
        Err(error) if error.status == StatusCode::NOT_FOUND => Err(Refusal::NotFound),
        Err(error) => Err(Refusal::NotResumed(error.message)),
    }
}

fn authorize(record: &SandboxRecord, port: u16, headers: &HeaderMap) -> Result<(), Refusal> {
    // The agent checks by itself.
    let Some(token) = record.traffic_token.as_deref().filter(|_| port != AGENT_PORT) else { return Ok(()) };
    let given = headers.get(headers::TRAFFIC_TOKEN).ok_or(Refusal::NoTrafficToken)?;
    match given.to_str() {
        Ok(given) if identity::same(given, token) => Ok(()),
        _ => Err(Refusal::WrongTrafficToken),
    }
}

/// Opens a stream to a port of `sandbox`, its agent's among them, with nothing in between.
pub(crate) async fn open(sandbox: &Sandbox, port: u16) -> Result<Stream, DialError> {
    upstream::open(sandbox, listener(port), port).await
}

fn listener(port: u16) -> ToPort {
    if port == AGENT_PORT { ToPort::Agent } else { ToPort::Tenant }
}
