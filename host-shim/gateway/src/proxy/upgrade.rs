//! A connection that became something else, a WebSocket mostly: bytes both ways until either side ends.

use std::sync::Arc;

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::Client;
use crate::fleet::Sandbox;

/// What a request's connection may become; to be taken before the request is sent.
pub(super) fn of_request(request: &mut Request<Incoming>) -> OnUpgrade {
    hyper::upgrade::on(request)
}

/// Joins the two sides of a `101 Switching Protocols`, once its head has been written to the client.
pub(super) fn join(
    client: &Client,
    sandbox: &Arc<Sandbox>,
    near: OnUpgrade,
    response: Response<Body>,
) -> Response<Body> {
    let (mut head, body) = response.into_parts();
    let far = head.extensions.remove::<OnUpgrade>();
    let (client_place, sandbox) = (client.clone(), Arc::clone(sandbox));
    client.connections.spawn(async move {
        // It holds the connection to the sandbox, and the client its place among the connections.
        let _body = body;
        let Some(far) = far else { return };
        let pipe = async {
            let (near, far) = tokio::try_join!(near, far)?;
            let (mut near, mut far) = (TokioIo::new(near), TokioIo::new(far));
            // One direction may end before the other.
            tokio::io::copy_bidirectional(&mut near, &mut far).await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        };
        tokio::select! {
            // Whatever broke, both sides see their connection end.
            _ = pipe => {}
            () = sandbox.gone() => {}
            () = client_place.cut.cancelled() => {}
        }
    });
    Response::from_parts(head, Body::empty())
}
